"""Transcripts as text, JSON and subtitles."""

from __future__ import annotations

import codecs
import json
from collections.abc import Callable, Iterable
from dataclasses import asdict
from html import escape
from io import TextIOBase
from typing import TextIO, TypeAlias

from .results import Segment, TranscriptionInfo

__all__ = ["WRITERS", "format_timestamp", "write_json", "write_srt", "write_text", "write_vtt"]


_Text: TypeAlias = "TextIO | TextIOBase"


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


def write_text(
    segments: Iterable[Segment], info: TranscriptionInfo, file: _Text, name: str = ""
) -> None:
    """Write the text, a line per segment."""
    for segment in segments:
        print(" ".join(_lines(segment)), file=file)


def write_json(
    segments: Iterable[Segment], info: TranscriptionInfo, file: _Text, name: str = ""
) -> None:
    """Write everything known, and the recording's name, as one JSON object on one line.

    Where `file` has another encoding than UTF-8, what is not ASCII is written as JSON's escapes.
    """
    records = [asdict(segment) for segment in segments]
    document = {
        "file": name,
        "language": info.language,
        "language_probability": info.language_probability,
        "duration": info.duration,
        "warnings": info.warnings,
        "text": "".join(record["text"] for record in records).strip(),
        "segments": records,
    }
    encoding = file.encoding or "utf-8"  # None: characters are kept as they are
    ascii_only = codecs.lookup(encoding).name != "utf-8"
    print(json.dumps(document, ensure_ascii=ascii_only), file=file)


def write_srt(
    segments: Iterable[Segment], info: TranscriptionInfo, file: _Text, name: str = ""
) -> None:
    """Write SubRip subtitles."""
    for number, segment in enumerate(segments, start=1):
        # An arrow inside the text would be read as a timing line.
        text = "\n".join(_lines(segment)).replace("-->", "->")
        print(f"{number}\n{_times(segment, ',')}\n{text}\n", file=file)


def write_vtt(
    segments: Iterable[Segment], info: TranscriptionInfo, file: _Text, name: str = ""
) -> None:
    """Write WebVTT subtitles."""
    print("WEBVTT\n", file=file)
    for segment in segments:
        text = escape("\n".join(_lines(segment)), quote=False)
        print(f"{_times(segment, '.')}\n{text}\n", file=file)


WRITERS: dict[str, Callable[[Iterable[Segment], TranscriptionInfo, _Text, str], None]] = {
    "text": write_text,
    "json": write_json,
    "srt": write_srt,
    "vtt": write_vtt,
}
"""The writers by format name; they take segments, info, the file to write to, and the recording's
name."""


def _lines(segment: Segment) -> list[str]:
    # An empty line would end a subtitle.
    return [line.strip() for line in segment.text.splitlines() if line.strip()]


def _times(segment: Segment, decimal_marker: str) -> str:
    start, end = (
        format_timestamp(max(seconds, 0.0), True, decimal_marker)
        for seconds in (segment.start, segment.end)
    )
    return f"{start} --> {end}"
