"""A minute's tour: each part at work on real audio, with figures from this machine.

What is shown is measured while it runs, once; perf/ holds the benchmarks that compare with others.
"""

from __future__ import annotations

import queue
import resource
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from . import _mel_task, inference_memory
from ._sched import Priority, Scheduler
from .audio import SAMPLE_RATE, load_audio
from .events import Closed, Committed, Event, Final, Partial
from .features import HOP_LENGTH
from .models import load_model
from .pools import AudioBufferPool, PoolLimits
from .stt import OptimizedSTTFactory, PerformanceOptimizedSTT

__all__ = ["run"]

_CLIPS = Path(__file__).parent / "assets" / "demo"
_WINDOW_S = 30
_BURST = 16


def run() -> None:
    """Show everything, on standard output."""
    started = time.perf_counter()
    show = _Screen()
    _show_buffers(show)
    _show_inference_memory(show)
    _show_scheduler(show)
    _show_stealing(show)
    with OptimizedSTTFactory.create_optimized() as stt:
        _show_stream(show, stt)
        _show_engine(show, stt)
        show.heading("Report")
        for line in stt.get_performance_report().splitlines():
            show.line(line)
        health = stt.health(probe_s=10)
        show.line("Healthy." if health.ok else " ".join(health.problems))
    show.line(f"\nAll of it took {time.perf_counter() - started:.0f} s.")


class _Screen:
    """Standard output; a line that changes is rewritten on a terminal, and left out elsewhere."""

    def __init__(self) -> None:
        self._is_terminal = sys.stdout.isatty()
        self._live = False

    def heading(self, text: str) -> None:
        """Begin a part."""
        self.line(f"\n{text}\n{'-' * len(text)}")

    def line(self, text: str) -> None:
        """Write a line that stays."""
        print(("\r\x1b[K" if self._live else "") + text, flush=True)
        self._live = False

    def live(self, text: str) -> None:
        """Write a line that the next one replaces."""
        if self._is_terminal:
            columns = shutil.get_terminal_size().columns
            print(f"\r\x1b[K{text[: columns - 1]}", end="", flush=True)
            self._live = True


def _clips() -> Iterator[NDArray[np.float32]]:
    for file in sorted(_CLIPS.glob("*.flac")):
        yield load_audio(file).samples


def _median(measure: Callable[[], float], count: int) -> float:
    return statistics.median(measure() for _ in range(count))


def _faults() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def _show_buffers(show: _Screen) -> None:
    show.heading("Memory pools: buffers for 16 windows of 30 s, taken and written")
    n_samples = _WINDOW_S * SAMPLE_RATE
    pool = AudioBufferPool(PoolLimits(max_size=64))
    pool.reserve(n_samples, _BURST)

    def take_pooled() -> float:
        started = time.perf_counter()
        buffers = [pool.acquire(n_samples) for _ in range(_BURST)]
        for buffer in buffers:
            buffer.array[::1024] = 1
        seconds = time.perf_counter() - started
        for buffer in buffers:
            buffer.release()
        return seconds

    def take_new() -> float:
        started = time.perf_counter()
        arrays = [np.empty(n_samples, np.float32) for _ in range(_BURST)]
        for array in arrays:
            array[::1024] = 1
        return time.perf_counter() - started

    for name, take in (("np.empty", take_new), ("AudioBufferPool", take_pooled)):
        take()
        faults = _faults()
        seconds = _median(take, 9)
        faults = (_faults() - faults) // 9
        show.line(f"{name:16} {seconds * 1e3:8.3f} ms   {faults:6} page faults")
    pool.close()


def _show_inference_memory(show: _Screen) -> None:
    show.heading("Inference memory: the encoder on two windows of 30 s")
    model = load_model("pico", "cpu", cpu_threads=1)
    noise = np.random.default_rng(0).standard_normal((2, model.n_mels, 3000), dtype=np.float32)

    def encode() -> float:
        started = time.perf_counter()
        model.encode(noise)
        return time.perf_counter() - started

    for mode in ("off", "pool"):
        inference_memory.configure(mode)
        if mode == "pool" and not inference_memory.statistics().limit:
            break
        encode()
        faults = _faults()
        seconds = _median(encode, 5)
        faults = (_faults() - faults) // 5
        show.line(f"{mode:16} {seconds * 1e3:8.1f} ms   {faults:6} page faults")
    show.line(f"It is {inference_memory.status()}.")


def _show_scheduler(show: _Screen) -> None:
    show.heading("Scheduler: an urgent task behind 2000 others of 20 µs")

    def task() -> None:
        end = time.perf_counter() + 20e-6
        while time.perf_counter() < end:
            pass

    waits: list[float] = []

    def urgent(submitted: float) -> None:
        waits.append(time.perf_counter() - submitted)

    with Scheduler(workers=2) as scheduler:
        for name, priority in (("as NORMAL", Priority.NORMAL), ("as CRITICAL", Priority.CRITICAL)):
            for _ in range(2000):
                scheduler.submit_nowait(task)
            scheduler.submit(urgent, time.perf_counter(), priority=priority).result()
            scheduler.drain()
            show.line(f"{name:16} {waits[-1] * 1e3:8.3f} ms until it starts")
        done = scheduler.statistics()
    shares = ", ".join(f"{worker.executed}" for worker in done.workers)
    show.line(f"{sum(done.executed.values())} tasks, by worker: {shares}")


def _show_stealing(show: _Screen) -> None:
    show.heading("Work stealing: features of 64 windows of 10 s, spawned by one task")
    samples = np.random.default_rng(0).uniform(-0.1, 0.1, 10 * SAMPLE_RATE).astype(np.float32)
    features = np.empty((64, 80, len(samples) // HOP_LENGTH), np.float32)

    def spawn(scheduler: Scheduler, done: queue.SimpleQueue[float | None]) -> None:
        for window in features:
            _mel_task.spawn(
                scheduler, Priority.NORMAL, samples, window, lambda maximum, _: done.put(maximum)
            )

    for name, stealing in (("without", False), ("with stealing", True)):
        done: queue.SimpleQueue[float | None] = queue.SimpleQueue()
        with Scheduler(workers=2, stealing=stealing) as scheduler:
            started = time.perf_counter()
            scheduler.submit(spawn, scheduler, done).result()
            for _ in features:
                done.get()
            seconds = time.perf_counter() - started
            scheduler.drain()
            work = scheduler.statistics()
        shares = ", ".join(f"{worker.executed}" for worker in work.workers)
        show.line(f"{name:16} {seconds * 1e3:8.1f} ms   by worker: {shares}; {work.stolen} stolen")


def _show_stream(show: _Screen, stt: PerformanceOptimizedSTT) -> None:
    show.heading("Streaming: four recordings at the pace they were spoken")
    pause = np.zeros(int(0.6 * SAMPLE_RATE), np.float32)
    pieces = [piece for clip in list(_clips())[:4] for piece in (clip, pause)]
    samples = np.concatenate(pieces)
    # Shown by this thread, which is the one that can end where nothing can be written any more.
    events: queue.SimpleQueue[Event] = queue.SimpleQueue()

    def follow(event: Event) -> None:
        if isinstance(event, Partial):
            show.live(f"{event.audio_s:5.1f} s  {event.stable_text} ({event.unstable_text})")
        elif isinstance(event, Committed):
            show.live(f"{event.audio_s:5.1f} s  + {event.delta}")
        elif isinstance(event, Final):
            after = "" if event.ttfs_s is None else f"  ({event.ttfs_s * 1e3:.0f} ms after speech)"
            show.line(f"{event.audio_s:5.1f} s  {event.text}{after}")

    stream = stt.stream(callback=events.put)
    step = SAMPLE_RATE // 10
    started = time.perf_counter()
    for start in range(0, len(samples), step):
        time.sleep(max(started + start / SAMPLE_RATE - time.perf_counter(), 0))
        stream.push(samples[start : start + step])
        while not events.empty():
            follow(events.get())
    streamed = stream.finalize().result()
    while not isinstance(event := events.get(timeout=10), Closed):
        follow(event)
    whole = stt.transcribe_async(samples).result()
    same = "the same" if whole.text == streamed.text else "NOT the same"
    show.line(f"In one piece the recording gives {same} text.")


def _show_engine(show: _Screen, stt: PerformanceOptimizedSTT) -> None:
    show.heading("All together: 32 requests in four languages, and an urgent one")
    clips = list(_clips())
    finished: queue.SimpleQueue[str] = queue.SimpleQueue()
    started = time.perf_counter()
    futures = [stt.transcribe_async(clips[index % len(clips)]) for index in range(32)]
    urgent = stt.transcribe_async(clips[0], priority=Priority.CRITICAL)
    urgent.add_done_callback(lambda _: finished.put("urgent"))
    for future in futures:
        future.add_done_callback(lambda _: finished.put("normal"))
    ahead = 0
    for done in range(1, 34):
        ahead += finished.get() == "normal" and not urgent.done()
        s = stt.get_performance_statistics()
        queued = sum(s.dispatcher.queued.values())
        show.live(
            f"{done:2} of 33 done, {queued:2} windows wait, {s.mean_batch_size:.1f} a batch, "
            f"{s.total_memory_usage_mb:.0f} MiB"
        )
    seconds = time.perf_counter() - started
    audio_s = sum(future.result().duration for future in [*futures, urgent])
    show.line(f"{audio_s:.0f} s of audio in {seconds:.2f} s: {audio_s / seconds:.0f} x real time")
    show.line(f"{ahead} of the 32 were done before the urgent request, which came last.")
    for text in dict.fromkeys(f"{f.result().language}: {f.result().text}" for f in futures):
        show.line(f"  {text}")
