"""One-shot requests: a recording, of any length, through the utterance pipeline."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Hashable
from concurrent.futures import Future
from dataclasses import replace
from functools import partial
from os import PathLike
from traceback import clear_frames
from typing import Literal, cast

import numpy as np
from numpy.typing import NDArray

from ._sched import Priority
from .audio import AudioInput, load_audio
from .latency import StageTimings
from .plan import Plan
from .pools import AudioBuffer
from .segmentation import Cutter, WindowCut
from .transcript import Transcript, Transcription
from .utterance import Final, Utterance, UtterancePipeline
from .vad import FRAME_SAMPLES

__all__ = ["Request"]

# Audio that one task looks at before others have their turn.
_BLOCK_SAMPLES = 32 * FRAME_SAMPLES
_SLICE_BLOCKS = 10


class Request:
    """A recording on its way to its text.

    Parameters
    ----------
    pipeline
        The engine's.
    plan
        How to transcribe it.
    audio
        The recording. An array is copied before this returns, and files are read by the executor.
    flushes
        Samples at which the windows are cut and the search for speech begins anew.
    on_over
        Called once with the request when it is done, failed or cancelled, and holds nothing more.
    on_read
        Called once with the seconds of its audio, when they are known.

    Raises
    ------
    AudioError
        If `audio` is no audio, where that can be told without reading a file.

    Attributes
    ----------
    future : Future of Transcription
        Cancelling it takes back all that the model has not begun with.
    outcome : str
        ``"completed"``, ``"failed"`` or ``"cancelled"``, once it is over.
    error : Exception or None
        Why it failed.
    timings : StageTimings
        Of a completed request.
    duration : float
        Seconds of audio, once it is read.
    """

    def __init__(
        self,
        pipeline: UtterancePipeline,
        plan: Plan,
        audio: AudioInput,
        *,
        on_over: Callable[[Request], None],
        priority: Priority = Priority.NORMAL,
        deadline: float | None = None,
        client: Hashable | None = None,
        flushes: tuple[int, ...] = (),
        on_read: Callable[[float], None] | None = None,
    ) -> None:
        self._started = time.perf_counter()
        self._pipeline = pipeline
        self._plan = plan
        self._priority = priority
        self._on_over: Callable[[Request], None] | None = on_over
        self._on_read = on_read
        self._flushes = [*flushes]
        self._lock = threading.Lock()
        self._is_reading = False  # somebody is in `_read`, or about to be
        self._has_more = True
        self._is_over = False
        self.outcome: Literal["completed", "failed", "cancelled"] = "cancelled"
        self._ingest_s = 0.0
        self._transcript = Transcript(pipeline.results, pipeline.model.tokenizer)
        self._cutter: Cutter | None = None
        self._source: AudioInput | None = audio
        self._samples: NDArray[np.float32] | None = None
        self._buffer: AudioBuffer | None = None
        self._resolve: Callable[[], None] | None = None
        self.future: Future[Transcription] = Future()
        self.error: BaseException | None = None
        self.timings = StageTimings()
        self.duration = 0.0
        if not (isinstance(audio, str | PathLike) or hasattr(audio, "read")):
            self._load()
        self._utterance = Utterance(
            pipeline,
            plan,
            on_final=self._take,
            on_progress=self.read,
            on_settled=self._finish,
            on_failed=self._fail,
            priority=priority,
            deadline=deadline,
            client=client,
        )
        self._ingest_s += time.perf_counter() - self._started
        self.future.add_done_callback(self._note_cancelled)

    def read(self) -> None:
        """Have the executor look at more of the audio, if there is room for its windows."""
        with self._lock:
            if self._is_reading or self._is_over or not self._has_more:
                return
            self._is_reading = True
        self._pipeline.executor.submit_nowait(self._read, priority=self._priority)

    def _read(self) -> None:
        """Look at the next stretch of audio."""
        has_more = False
        try:
            if self._source is not None and not self._is_over:
                started = time.perf_counter()
                self._load()
                self._ingest_s += time.perf_counter() - started
            has_more = not self._is_over and self._cut_slice()
        except BaseException as error:
            self._utterance.cancel()
            clear_frames(error.__traceback__)  # of the audio
            self._fail(error)
            if not isinstance(error, Exception):
                raise
        finally:
            self._pause(has_more)

    def _pause(self, has_more: bool) -> None:
        """End a stretch of reading, and begin the next one if there is room for its windows."""
        with self._lock:
            self._is_reading = False
            self._has_more = has_more
            is_over = self._is_over
        if is_over:
            self._release()
        elif not has_more:
            self._utterance.finish()
        elif self._utterance.has_room:
            self.read()

    def _load(self) -> None:
        """Bring the audio to 16 kHz mono."""
        source, self._source = self._source, None
        audio = load_audio(cast(AudioInput, source))
        samples = audio.samples
        if isinstance(source, np.ndarray) and np.may_share_memory(samples, source):
            # The caller may change the array at once.
            self._buffer = self._pipeline.buffers.acquire(max(len(samples), 1))
            samples = self._buffer.array[: len(samples)]
            samples[:] = audio.samples
        self._samples = samples
        self._ends = [*(at for at in self._flushes if at < len(samples)), len(samples)]
        self.duration = audio.duration
        self._warnings = (*self._plan.warnings, *audio.warnings)
        on_read, self._on_read = self._on_read, None
        if on_read is not None:
            on_read(self.duration)

    def _cut_slice(self) -> bool:
        """Add the windows of the next stretch; return whether anything follows it."""
        samples = self._samples
        if samples is None:
            return False
        if self._cutter is None:
            self._cutter = Cutter(self._plan.segmentation, self._plan.options.vad)
        cutter = self._cutter
        started = time.perf_counter()
        for _ in range(_SLICE_BLOCKS):
            start, end = cutter.position, self._ends[0]
            past = min(start + _BLOCK_SAMPLES, end - (end - start) % FRAME_SAMPLES)
            events = cutter.push(samples[start:past]) if past > start else []
            if end - past < FRAME_SAMPLES:
                events += cutter.flush(samples[past:end])
                self._ends.pop(0)
            for event in events:
                if isinstance(event, WindowCut):
                    self._ingest_s += time.perf_counter() - started
                    self._utterance.add(event, samples[event.start : event.end])
                    started = time.perf_counter()
            if not self._ends or (events and not self._utterance.has_room):
                break
        self._ingest_s += time.perf_counter() - started
        return bool(self._ends)

    def _take(self, final: Final) -> None:
        try:
            self._transcript.add(final)
        except Exception as error:  # without memory; no part of the text may be missing
            self._utterance.cancel()
            self._fail(error)

    def _finish(self) -> None:
        """Make the result."""
        try:
            self._complete()
        except Exception as error:
            self._fail(error)

    def _complete(self) -> None:
        started = time.perf_counter()
        self.timings = replace(
            self._utterance.timings,
            ingest=self._ingest_s,
            delivery=started - (self._utterance.text_at or started),
            total=started - self._started,
        )
        transcription = self._transcript.finish(
            self._plan.language, self.duration, self.timings, self._warnings
        )
        self._end("completed", partial(self.future.set_result, transcription))

    def _fail(self, error: BaseException) -> None:
        self.error = error
        self._end("failed", partial(self.future.set_exception, error))

    def _note_cancelled(self, future: Future[Transcription]) -> None:
        if future.cancelled():
            self._utterance.cancel()
            self._end("cancelled", None)

    def _end(
        self,
        outcome: Literal["completed", "failed", "cancelled"],
        resolve: Callable[[], None] | None,
    ) -> None:
        """Let go of what is held, and then resolve the future; only the first call counts."""
        with self._lock:
            if self._is_over:
                return
            # From here on it cannot be cancelled; and who waits for one that was is told.
            if not self.future.set_running_or_notify_cancel():
                outcome, resolve = "cancelled", None
            self._is_over = True
            self.outcome = outcome
            self._resolve = resolve
            is_reading = self._is_reading
        if not is_reading:
            self._release()

    def _release(self) -> None:
        self._source = self._samples = None
        buffer, self._buffer = self._buffer, None
        if buffer is not None:
            buffer.release()
        self._transcript.release()
        # Whoever keeps the future keeps this request, but not the engine.
        self._on_read = None
        on_over, self._on_over = self._on_over, None
        if on_over is not None:
            on_over(self)
        resolve, self._resolve = self._resolve, None
        if resolve is not None:
            resolve()
