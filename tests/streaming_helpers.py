"""What the tests of streams share: recordings, the one-shot text, and waiting without a clock."""

import time
import wave
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise

import numpy as np
from waiting import eventually

from speechrnt import Overloaded
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


def settle(stream, are_told=True):
    """Wait until all that was pushed is worked off: as if the audio came very slowly.

    And until the stream's callback, if it has one, has been called with what came of it.
    """
    events = stream._events

    def is_quiet():
        if are_told and events._callback is not None and (events._events or events._is_calling):
            return False
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


def push_slowly(stream, samples, chunk_s=0.1, are_told=True):
    """Push audio piece by piece, each one when all is quiet."""
    step = round(chunk_s * RATE)
    for start in range(0, len(samples), step):
        stream.push(samples[start : start + step])
        settle(stream, are_told)


def streamed(stt, pieces, language=None, **options):
    """Push pieces, ``None`` being a flush, and return what finalize gives."""
    stream = stt.stream(language=language, **options)
    for piece in pieces:
        if piece is None:
            stream.flush()
        else:
            while True:
                try:
                    stream.push(piece)
                    break
                except Overloaded:
                    time.sleep(0.01)
    return stream.finalize().result(WAIT_S)


def cut(samples, places):
    places = [0, *sorted(places), len(samples)]
    return [samples[a:b] for a, b in pairwise(places)]


@contextmanager
def paused(stream):
    """Keep a stream from looking at its audio for a while."""
    with stream._lock:
        assert not stream._is_working
        stream._is_working = True
    try:
        yield
    finally:
        with stream._lock:
            stream._is_working = False
        stream._wake()


def looked_after_by_hand(stt, stream):
    """Have an engine not look after a stream; return a function that does, at given seconds."""
    stream._options = replace(stream._options, idle_timeout_s=None)
    check, stream.check = stream.check, lambda *_: None
    rounds = stt._maintenance.rounds
    eventually(lambda: stt._maintenance.rounds > rounds)  # the one under way is over

    def look(*seconds):
        for each in seconds:
            check(1e6 + each, 30.0)

    return look


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
