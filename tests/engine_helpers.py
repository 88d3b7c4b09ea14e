"""What the tests of the engine share: holding it up at a known place, and waiting for its rest."""

import itertools
import threading
from contextlib import contextmanager

import numpy as np
from waiting import eventually

from speechrnt.models import Model


def assert_at_rest(engine):
    """Wait until nothing is under way, and check that nothing is held and all adds up."""

    def is_at_rest():
        now = engine.statistics()
        is_held = now.audio_buffers.in_use or now.results.in_use
        return not (now.live or is_held or now.dispatcher.running)

    eventually(is_at_rest, "rest")
    now = engine.statistics()
    requests = now.requests
    assert requests["accepted"] == sum(requests[o] for o in ("completed", "failed", "cancelled"))
    jobs = now.dispatcher
    assert jobs.submitted == jobs.completed + jobs.failed + jobs.cancelled + jobs.expired


class Gate:
    """A place where whoever comes waits until the gate is opened."""

    def __init__(self):
        self.reached = threading.Event()
        self.arrived = threading.Semaphore(0)
        self.opened = threading.Event()

    def wait(self):
        self.reached.set()
        self.arrived.release()
        assert self.opened.wait(60)


@contextmanager
def held(monkeypatch, method="encode", owner=Model, first=None):
    """Hold up every call of a function that begins inside the block, or only so many of them."""
    gate = Gate()
    original = getattr(owner, method)
    numbers = itertools.count()

    def wait_first(*args, **kwargs):
        if first is None or next(numbers) < first:
            gate.wait()
        return original(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(owner, method, wait_first)
        try:
            yield gate
        finally:
            gate.opened.set()


def occupied(engine, gate, clip):
    """Have every worker of a model that is held up wait at the gate; return the requests."""
    futures = []
    for _ in range(engine.model.whisper.num_workers):
        futures.append(engine.transcribe_async(clip, "en", priority=0))
        assert gate.arrived.acquire(timeout=60)
    return futures


@contextmanager
def spied(monkeypatch, method, owner=Model):
    """Note the arguments of every call of a method inside the block."""
    calls = []
    original = getattr(owner, method)

    def note(*args, **kwargs):
        calls.append((args, kwargs))
        return original(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(owner, method, note)
        yield calls


def with_pauses(clips, seconds=0.8):
    """Put recordings together, with silence between."""
    pause = np.zeros(int(seconds * 16_000), dtype=np.float32)
    return np.concatenate([part for clip in clips for part in (clip, pause)])


def trimmed(clip):
    """Return a recording without the silence around it."""
    loud = np.flatnonzero(np.abs(clip) > 0.02)
    return clip[loud[0] : loud[-1] + 1]
