"""Transcripts as text, JSON and subtitles."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import asdict
from typing import TextIO

from .results import Segment, TranscriptionInfo

__all__ = ["WRITERS", "format_timestamp", "write_json", "write_srt", "write_text", "write_vtt"]


def format_timestamp(
    seconds: float, always_include_hours: bool = False, decimal_marker: str = "."
) -> str:
    """Return a time as ``[HH:]MM:SS.mmm``.

    Parameters
    ----------
    seconds
        The time; not negative.
    always_include_hours
        Write the hours also when they are 0.
    decimal_marker
        What stands before the milliseconds.

    Raises
    ------
    ValueError
        If the time is negative.
    """
    if seconds < 0:
        raise ValueError(f"seconds: must not be negative, but is {seconds}")
    minutes, milliseconds = divmod(round(seconds * 1000), 60_000)
    hours, minutes = divmod(minutes, 60)
    hours_part = f"{hours:02d}:" if hours or always_include_hours else ""
    return (
        f"{hours_part}{minutes:02d}:{milliseconds // 1000:02d}"
        f"{decimal_marker}{milliseconds % 1000:03d}"
    )


def write_text(segments: Iterable[Segment], info: TranscriptionInfo, file: TextIO) -> None:
    """Write the text, a line per segment."""
    for segment in segments:
        print(segment.text.strip(), file=file)


def write_json(segments: Iterable[Segment], info: TranscriptionInfo, file: TextIO) -> None:
    """Write everything known as one JSON object on one line."""
    records = [asdict(segment) for segment in segments]
    document = {
        "language": info.language,
        "language_probability": info.language_probability,
        "duration": info.duration,
        "warnings": info.warnings,
        "text": "".join(record["text"] for record in records).strip(),
        "segments": records,
    }
    print(json.dumps(document, ensure_ascii=False), file=file)


def write_srt(segments: Iterable[Segment], info: TranscriptionInfo, file: TextIO) -> None:
    """Write SubRip subtitles."""
    for number, segment in enumerate(segments, start=1):
        print(f"{number}\n{_cue(segment, ',')}\n", file=file)


def write_vtt(segments: Iterable[Segment], info: TranscriptionInfo, file: TextIO) -> None:
    """Write WebVTT subtitles."""
    print("WEBVTT\n", file=file)
    for segment in segments:
        print(f"{_cue(segment, '.')}\n", file=file)


WRITERS: dict[str, Callable[[Iterable[Segment], TranscriptionInfo, TextIO], None]] = {
    "text": write_text,
    "json": write_json,
    "srt": write_srt,
    "vtt": write_vtt,
}
"""The writers by format name."""


def _cue(segment: Segment, decimal_marker: str) -> str:
    start, end = (
        format_timestamp(max(seconds, 0.0), True, decimal_marker)
        for seconds in (segment.start, segment.end)
    )
    # An arrow inside the text would be read as a timing line.
    text = segment.text.strip().replace("-->", "->")
    return f"{start} --> {end}\n{text}"
