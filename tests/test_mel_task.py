"""Features as native tasks: the same bits as in the caller, and a callback for each."""

import gc
import sys
import threading
import weakref

import numpy as np
import pytest
from sched_helpers import Blocker

from speechrnt import Priority, Scheduler, SchedulerClosed, _mel
from speechrnt._mel_task import compute, spawn

NORMAL = Priority.NORMAL


def expected(pcm, n_mels, frames):
    return _mel.log10_mel(pcm, n_mels)[:, :frames]


def noise(n, seed=0):
    return np.random.default_rng(seed).normal(0, 0.1, n).astype(np.float32)


@pytest.mark.parametrize("n_mels", [80, 128])
@pytest.mark.parametrize("n_samples", [0, 1, 160, 1000, 16_000, 100_001])
def test_features_are_those_of_the_kernel(n_mels, n_samples):
    pcm = noise(n_samples)
    out = np.empty((n_mels, max(n_samples // 160, 1)), dtype=np.float32)
    maximum = compute(pcm, out)
    np.testing.assert_array_equal(out, expected(pcm, n_mels, out.shape[1]))
    assert maximum == out.max()


def test_rows_may_be_apart_from_each_other():
    pcm = noise(1600)
    memory = np.full((80, 64), 7, dtype=np.float32)
    whole = np.empty((80, 10), dtype=np.float32)
    compute(pcm, whole)
    with pytest.raises((ValueError, BufferError)):
        compute(pcm, memory[:, :10])  # not contiguous, as declared
    assert (memory == 7).all()


def test_a_task_gives_the_same_as_the_caller(scheduler, clips):
    done = threading.Semaphore(0)
    results = {}

    def note(index):
        return lambda *result: (results.__setitem__(index, result), done.release())

    outs = [np.empty((80, len(clip) // 160), dtype=np.float32) for clip in clips]
    for index, (clip, out) in enumerate(zip(clips, outs, strict=True)):
        spawn(scheduler, Priority(index % 4), clip, out, note(index))
    for _ in clips:
        assert done.acquire(timeout=60)
    for index, (clip, out) in enumerate(zip(clips, outs, strict=True)):
        np.testing.assert_array_equal(out, expected(clip, 80, out.shape[1]))
        maximum, seconds = results[index]
        assert maximum == out.max()
        assert seconds > 0


def test_a_task_of_a_task_may_be_taken_by_another_worker(scheduler):
    """The spawning worker waits inside its task, so only the other one can do it."""
    finished = threading.Event()
    out = np.empty((80, 10), dtype=np.float32)

    def parent():
        spawn(scheduler, NORMAL, noise(1600), out, lambda *result: finished.set())
        return finished.wait(60)

    assert scheduler.submit(parent).result(60)
    assert scheduler.statistics().stolen == 1


def test_arguments_live_until_the_task_is_done_and_no_longer(scheduler):
    class Watched(np.ndarray):
        pass

    finished = threading.Event()
    pcm = noise(16_000).view(Watched)
    out = np.empty((80, 100), dtype=np.float32)
    watched, before = weakref.ref(pcm), expected(np.asarray(pcm), 80, 100)
    with Blocker(scheduler, workers=2):
        spawn(scheduler, NORMAL, pcm, out, lambda *result: finished.set())
        del pcm
        gc.collect()
        assert watched() is not None
    assert finished.wait(60)
    scheduler.drain(60)
    assert watched() is None
    np.testing.assert_array_equal(out, before)


def test_tasks_hold_no_reference_afterwards(scheduler):
    finished = threading.Semaphore(0)
    out = np.empty((80, 1), dtype=np.float32)
    pcm = noise(160)

    def done(*result):
        finished.release()

    before = sys.getrefcount(done), sys.getrefcount(out), sys.getrefcount(pcm)
    for _ in range(1000):
        spawn(scheduler, NORMAL, pcm, out, done)
    for _ in range(1000):
        assert finished.acquire(timeout=60)
    scheduler.drain(60)
    assert (sys.getrefcount(done), sys.getrefcount(out), sys.getrefcount(pcm)) == before


def test_a_scheduler_that_ends_says_so_to_every_task():
    scheduler = Scheduler(workers=1)
    begun, go_on = threading.Event(), threading.Event()
    scheduler.submit_nowait(lambda: (begun.set(), go_on.wait(60)))
    assert begun.wait(60)
    results = []
    for _ in range(5):
        out = np.empty((80, 10), dtype=np.float32)
        spawn(scheduler, NORMAL, noise(1600), out, lambda *result: results.append(result))
    scheduler.shutdown(wait=False, cancel_futures=True)
    go_on.set()
    scheduler.shutdown()
    assert results == [(None, 0.0)] * 5


def test_a_scheduler_that_has_ended_takes_nothing():
    scheduler = Scheduler(workers=1)
    scheduler.shutdown()
    out = np.empty((80, 10), dtype=np.float32)
    called = []
    with pytest.raises(SchedulerClosed, match="shut down"):
        spawn(scheduler, NORMAL, noise(1600), out, called.append)
    assert not called


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_callback_that_raises_is_reported_and_the_worker_goes_on(scheduler, monkeypatch):
    reported = []
    monkeypatch.setattr(threading, "excepthook", reported.append)
    finished = threading.Event()

    def fail(*result):
        raise ValueError("no good")

    out = np.empty((80, 10), dtype=np.float32)
    spawn(scheduler, NORMAL, noise(1600), out, fail)
    scheduler.drain(60)
    spawn(scheduler, NORMAL, noise(1600), out, lambda *result: finished.set())
    assert finished.wait(60)
    assert [report.exc_type for report in reported] == [ValueError]


@pytest.mark.parametrize(
    ("n_samples", "shape"),
    [(1600, (79, 10)), (1600, (80, 0)), (1600, (80, 12)), (159, (80, 2))],
)
def test_shapes_that_cannot_be_are_refused_before_anything_is_touched(scheduler, n_samples, shape):
    pcm, out = noise(n_samples), np.full(shape, 7, dtype=np.float32)
    with pytest.raises(ValueError, match="out"):
        compute(pcm, out)
    with pytest.raises(ValueError, match="out"):
        spawn(scheduler, NORMAL, pcm, out, print)
    assert (out == 7).all()


def test_other_types_are_refused(scheduler):
    out = np.empty((80, 10), dtype=np.float32)
    with pytest.raises(ValueError, match="dtype"):
        compute(np.zeros(1600), out)
    with pytest.raises(TypeError):
        compute(None, out)
    with pytest.raises(TypeError):
        spawn(object(), NORMAL, noise(1600), out, print)
