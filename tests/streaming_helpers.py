"""What the tests of streams share: recordings, the one-shot text, and waiting without a clock."""

import wave

import numpy as np
from waiting import eventually

from speechrnt.events import Committed, Final
from speechrnt.oneshot import Request

WAIT_S = 60
RATE = 16_000


def silence(seconds):
    return np.zeros(round(seconds * RATE), np.float32)


def load(path):
    """Return the samples of a WAV file."""
    with wave.open(str(path)) as file:
        data = file.readframes(file.getnframes())
    return (np.frombuffer(data, "<i2") / 2**15).astype(np.float32)


def trimmed(samples):
    """Return the samples without the silence around them."""
    loud = np.flatnonzero(np.abs(samples) > 0.02)
    return samples[loud[0] : loud[-1] + 1]


class Recordings:
    """The shipped recordings, put together to longer ones."""

    def __init__(self, samples, manifest):
        self.by_language = {}
        for sample in manifest:
            audio = load(samples / sample["file"])
            self.by_language.setdefault(sample["lang"], []).append(audio)

    def joined(self, language, count, pause_s, skip=0):
        """Return so many recordings of a language, with pauses between."""
        all_of_them = self.by_language[language]
        pieces = []
        for index in range(skip, skip + count):
            pieces += [trimmed(all_of_them[index % len(all_of_them)]), silence(pause_s)]
        return np.concatenate(pieces)

    def spoken(self, language, count, skip=0):
        """Return so many recordings of a language one after the other, as they were spoken."""
        all_of_them = self.by_language[language]
        return np.concatenate(
            [all_of_them[index % len(all_of_them)] for index in range(skip, skip + count)]
        )


def one_shot(stt, samples, language=None, flushes=(), **options):
    """Transcribe a recording, cut where a stream was flushed."""
    plan = stt._checked_plan(language, options)
    request = Request(stt._pipeline, plan, samples, on_over=lambda _: None, flushes=tuple(flushes))
    request.read()
    return request.future.result(WAIT_S)


def said(transcription):
    """Return what must be equal: everything but times on the clock and scores."""
    segments = [(s.id, s.seek, s.start, s.end, s.text, s.tokens) for s in transcription.segments]
    return transcription.text, segments, transcription.language, transcription.duration


def settle(stream):
    """Wait until all that was pushed is worked off: as if the audio came very slowly."""

    def is_quiet():
        if stream.snapshot.state == "closed":
            return True
        with stream._lock:
            return not (
                stream._is_working
                or stream._news
                or stream._audio
                or stream._pending
                or stream._drop_partial
            )

    eventually(is_quiet)


def push_slowly(stream, samples, chunk_s=0.1):
    """Push audio piece by piece, each one when all is quiet."""
    step = round(chunk_s * RATE)
    for start in range(0, len(samples), step):
        stream.push(samples[start : start + step])
        settle(stream)


class Log:
    """A callback that keeps the events."""

    def __init__(self):
        self.events = []

    def __call__(self, event):
        self.events.append(event)

    def of(self, kind):
        return [event for event in self.events if isinstance(event, kind)]

    @property
    def names(self):
        return [type(event).__name__ for event in self.events]

    def wait(self, kind, count=1):
        """Wait for events of a kind, and return the last."""
        eventually(lambda: len(self.of(kind)) >= count)
        return self.of(kind)[-1]

    def windows(self):
        """Return for each final what was committed before it, and the final."""
        windows, committed = [], ""
        for event in self.events:
            if isinstance(event, Committed):
                committed += event.delta
            elif isinstance(event, Final):
                windows.append((committed, event))
                committed = ""
        return windows
