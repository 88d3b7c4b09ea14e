"""A recording, or what comes on standard input, as a stream whose events are shown as they come."""

from __future__ import annotations

import json
import shutil
import threading
import time
import unicodedata
from collections.abc import Iterator
from dataclasses import fields
from typing import BinaryIO, TextIO

from .audio import PCM_ENCODINGS, SAMPLE_RATE, Audio
from .errors import Overloaded
from .events import Closed, Committed, Error, Event, Final, Overload, Partial
from .pcm import AudioChunk
from .streaming import Stream
from .transcript import Transcription

__all__ = ["EventPrinter", "pcm_chunks", "play", "recorded_chunks"]

CHUNK_S = 0.1

_START_OF_LINE = "\r\x1b[K"


def recorded_chunks(audio: Audio, speed: float) -> Iterator[AudioChunk]:
    """Yield a recording piece by piece, each one when it would have been spoken.

    Parameters
    ----------
    audio
        The recording.
    speed
        How many times faster than that.
    """
    size = round(CHUNK_S * SAMPLE_RATE)
    started = time.monotonic()
    for at in range(0, len(audio.samples), size):
        chunk = audio.samples[at : at + size]
        wait_s = started + (at + len(chunk)) / SAMPLE_RATE / speed - time.monotonic()
        if wait_s > 0:
            time.sleep(wait_s)
        yield chunk


def pcm_chunks(file: BinaryIO, sample_rate: int, encoding: str) -> Iterator[AudioChunk]:
    """Yield the bytes of a file as they come."""
    size = max(round(CHUNK_S * sample_rate), 1) * PCM_ENCODINGS[encoding]
    # Not more than one read of the system, which returns what is there.
    read = getattr(file, "read1", file.read)
    while chunk := read(size):
        yield chunk


def play(stream: Stream, chunks: Iterator[AudioChunk], printer: EventPrinter) -> Transcription:
    """Push chunks to a stream that a printer follows, and wait for its end.

    Raises
    ------
    SpeechRNTError
        What the stream raises.
    OSError
        If what was printed could not be written.
    """
    for chunk in chunks:
        while True:
            try:
                stream.push(chunk)
                break
            except Overloaded as error:
                time.sleep(error.retry_after_s or CHUNK_S)
        if printer.error is not None:
            stream.cancel()
            raise printer.error
    result = stream.finalize().result()
    printer.closed.wait()
    if printer.error is not None:
        raise printer.error
    return result


class EventPrinter:
    """A stream's callback that writes its events.

    On a terminal the open window is one line, written again with each partial, and each final
    replaces it. Elsewhere each event is a line. With `as_json`, each event is a line of JSON.

    Attributes
    ----------
    error : OSError or None
        Why nothing can be written.
    closed : Event
        Set when there is nothing more to come.
    """

    def __init__(self, out: TextIO, as_json: bool) -> None:
        self._out = out
        self._write = self._write_json if as_json else self._write_line
        if not as_json and out.isatty():
            self._write = self._write_again
        self.error: OSError | None = None
        self.closed = threading.Event()

    def __call__(self, event: Event) -> None:
        """Write an event."""
        try:
            if self.error is None:
                self._write(event)
                self._out.flush()
        except OSError as error:
            self.error = error
        finally:
            if isinstance(event, Closed):
                self.closed.set()

    def _write_json(self, event: Event) -> None:
        values = {field.name: getattr(event, field.name) for field in fields(event)}
        segment = values.pop("segment", None)
        if segment is not None:
            values |= {"start_s": segment.start, "end_s": segment.end}
        line = {"event": type(event).__name__, **values}
        # Escapes what the encoding may lack: that of backslashreplace would be none in JSON.
        ascii_only = (self._out.encoding or "").lower().replace("-", "") != "utf8"
        print(json.dumps(line, ensure_ascii=ascii_only), file=self._out)

    def _write_line(self, event: Event) -> None:
        if (words := _words_of(event)) is not None:
            print(f"{event.audio_s:8.2f}  {words}", file=self._out)

    def _write_again(self, event: Event) -> None:
        columns = shutil.get_terminal_size().columns
        if isinstance(event, Partial):
            text = _last_columns(event.text, columns - 1)
            print(end=f"{_START_OF_LINE}{text}", file=self._out)
        elif isinstance(event, Final):
            print(end=_START_OF_LINE, file=self._out)
            if event.text:
                print(event.text, file=self._out)
        elif isinstance(event, Error | Overload):
            print(f"{_START_OF_LINE}{_words_of(event)}", file=self._out)
        elif isinstance(event, Closed):
            print(end=_START_OF_LINE, file=self._out)


def _words_of(event: Event) -> str | None:
    """Return what a line says of an event; None for one that goes without saying."""
    if isinstance(event, Partial):
        return f"partial    {event.text}"
    if isinstance(event, Committed):
        return f"committed  {event.delta.strip()}"
    if isinstance(event, Final):
        return f"final      {event.text}"
    if isinstance(event, Overload):
        return f"overload   partials every {event.partial_interval_s:g} s"
    if isinstance(event, Error):
        return f"error      {event.code}: {event.message}"
    return None


def _last_columns(text: str, columns: int) -> str:
    """Return the end of a text, as much of it as a terminal shows in so many columns."""
    widths = [2 if unicodedata.east_asian_width(each) in "WF" else 1 for each in text]
    start, used = len(text), 0
    while start and used + widths[start - 1] <= columns:
        start -= 1
        used += widths[start]
    if start:  # room for the mark
        while used >= columns:
            used -= widths[start]
            start += 1
        return "…" + text[start:]
    return text
