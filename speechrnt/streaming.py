"""Streaming utterances: audio in as it comes, partial and final text out.

Each stream is a strand: what happens to it waits in its inbox, and one task of the scheduler at a
time works that off, in order. Finals take the same way as one-shot requests, through an
`Utterance`, so that they depend on the samples alone; partials come from the window that is open,
when there is something new in it and the model can spare the time, and influence nothing.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Executor as ThreadExecutor
from concurrent.futures import Future
from dataclasses import dataclass, fields
from functools import partial
from types import TracebackType
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from typing_extensions import Self

from ._sched import Priority
from .agreement import LocalAgreement, join_words, split_words
from .arrivals import Arrivals
from .audio import SAMPLE_RATE
from .errors import OptionError, Overloaded, SpeechRNTError, UtteranceClosed
from .event_queue import EventQueue
from .events import (
    Closed,
    Committed,
    Error,
    Event,
    Final,
    Overload,
    Partial,
    SpeechEnded,
    SpeechStarted,
)
from .features import HOP_LENGTH
from .growing_mel import GrowingLogMel
from .pcm import AudioChunk, PcmReader
from .plan import Plan
from .sample_buffer import SampleBuffer
from .segmentation import Cutter, Pause, SpeechEnd, SpeechStart, WindowCut
from .segmentation import Event as Cut
from .stream_types import Pressure, StreamCounters, StreamOptions, StreamSnapshot, StreamState
from .transcript import Transcript, Transcription
from .utterance import Final as WindowFinal
from .utterance import Preview, Utterance, UtterancePipeline, add_text
from .vad import FRAME_SAMPLES

__all__ = ["Stream"]

logger = logging.getLogger("speechrnt")

# What a task works off before others have their turn.
_BLOCK_SAMPLES = 32 * FRAME_SAMPLES
_STEPS_PER_TASK = 4

# Partials of one stream take at most this share of a model worker.
_PARTIAL_SHARE = 0.25
_LONGEST_PARTIAL_INTERVAL_S = 8.0
# With so much work waiting they come half as often, and with so little twice as often again.
_BUSY_BACKLOG_S = 0.5
_CALM_BACKLOG_S = 0.1
# A partial that has not begun by then is out of date.
_PARTIAL_DEADLINE_S = 2.0

# Pieces smaller than this wait in one, so that those of one sample take no more memory than others.
_PIECE_SAMPLES = 2048

# Without audio for so long, a stream holds what it needs and not more.
_COMPACT_AFTER_S = 1.0


@dataclass(eq=False)
class _Pending:
    """A window that is cut, until its final comes."""

    agreement: LocalAgreement
    from_flush: bool
    spoken_at: float | None  # when the end of its speech arrived


class Stream:
    """One streaming utterance; made by `PerformanceOptimizedSTT.stream`.

    Any thread may call any method. Audio is taken in the order of the calls.

    Its events go to a callback or come from ``async for``, of one coroutine. ``async with``
    finalizes it at the end, or cancels it if an exception leaves the block.

    Attributes
    ----------
    utterance_id : str
        Its name.
    """

    def __init__(
        self,
        utterance_id: str,
        pipeline: UtterancePipeline,
        plan: Plan,
        options: StreamOptions,
        *,
        counters: StreamCounters,
        threads: ThreadExecutor,
        on_over: Callable[[Stream, Callable[[], None]], None],
        make_plan: Callable[[Mapping[str, Any]], Plan],
        callback: Callable[[Event], object] | None = None,
        sample_rate: int = SAMPLE_RATE,
        encoding: str = "s16",
        priority: Priority = Priority.NORMAL,
    ) -> None:
        self.utterance_id = utterance_id
        self._pipeline = pipeline
        self._plan = plan
        self._options = options
        self._counters = counters
        self._on_over = on_over
        self._make_plan = make_plan
        self._priority = priority
        self._has_callback = callback is not None
        self._events = EventQueue(callback, threads, self._wake, counters.add)

        self._push_lock = threading.Lock()  # keeps pushes in order; never held by the strand
        self._reader = PcmReader(sample_rate, encoding)

        self._lock = threading.Lock()
        # Guarded by it.
        self._news: deque[Callable[[], None]] = deque()  # of the model; go first
        self._audio: deque[NDArray[np.float32] | Callable[[], None]] = deque()
        self._is_working = False
        self._state: StreamState = "open"
        self._arrivals = Arrivals()
        self._room_waiters: list[tuple[asyncio.AbstractEventLoop, asyncio.Future[None]]] = []

        # Written with the lock or by the strand, one of them each, and read by all.
        self._received = 0
        self._processed = 0
        self._last_push = time.monotonic()
        self._future: Future[Transcription] | None = None
        self._unclaimed: Future[Transcription] | None = None  # of a stream that ended by itself
        self._is_compact = True
        self._shown = "", "", ""  # finals, and what is stable and unstable of the window after them

        # Of `check`.
        self._seen: tuple[int, int] | None = None
        self._seen_at = 0.0
        self._has_stalled = False

        # The strand's own, from here on.
        self._samples = SampleBuffer(pipeline.buffers)
        self._mel = GrowingLogMel(pipeline.model.n_mels, pipeline.buffers)  # of the open window
        self._cutter = Cutter(plan.segmentation, plan.options.vad)
        self._utterance = Utterance(
            pipeline,
            plan,
            on_final=lambda final: self._post(partial(self._take_final, final)),
            on_progress=self._wake,
            on_settled=lambda: self._post(self._settle),
            on_failed=lambda error: self._post(partial(self._fail, error)),
            priority=priority,
            client=object(),
        )
        self._transcript = Transcript(pipeline.results, pipeline.model.tokenizer)
        self._pending: dict[int, _Pending] = {}  # by the start of the window
        self._agreement = LocalAgreement()
        self._drop_partial: Callable[[], None] | None = None  # of the partial on its way
        self._partial_at = 0  # samples of the last partial
        self._partial_interval_s = options.partial_interval_s
        self._reflected = 0  # samples that the text so far takes into account
        self._told = 0  # samples that finals have come to
        self._is_flushing = False
        self._language = plan.language or ""

    # What the user calls.

    def push(self, chunk: AudioChunk) -> Pressure:
        """Take the next piece of audio, of any length. Never blocks for long.

        Parameters
        ----------
        chunk
            Samples (int16, int32, float32 or float64, one-dimensional) or bytes of the stream's
            encoding, at its sample rate. Free again after the call.

        Raises
        ------
        Overloaded
            If too much waits already. Nothing was taken; try again later, or `apush`.
        InvalidAudioError
            If this is no piece of audio. Nothing was taken.
        UtteranceClosed
            If the stream takes no more audio.
        """
        self._pipeline.dispatcher.check_process()
        with self._push_lock:
            self._check_open()
            buffered_s = self._buffered_s()
            if buffered_s > self._options.max_buffered_s:
                self._counters.add("refused_chunks")
                raise Overloaded(
                    f"utterance {self.utterance_id!r}: {buffered_s:.1f} s of audio wait, more than "
                    f"the {self._options.max_buffered_s} s allowed",
                    max(self._pipeline.dispatcher.backlog_s, 0.05),
                )
            samples = self._reader.read(chunk)
            self._enqueue(samples)
        return Pressure(self._buffered_s(), self._lag_s())

    async def apush(self, chunk: AudioChunk) -> Pressure:
        """Take the next piece of audio, as soon as there is room for it.

        Raises
        ------
        InvalidAudioError, UtteranceClosed
            As `push` does.
        """
        while True:
            try:
                return self.push(chunk)
            except Overloaded:
                loop = asyncio.get_running_loop()
                waiter = (loop, loop.create_future())
                with self._lock:
                    self._room_waiters.append(waiter)
                # It may have become free in between.
                if self._buffered_s() <= self._options.max_buffered_s:
                    self._tell_of_room()
                await waiter[1]

    def flush(self) -> None:
        """Have a final for all that was pushed, pause or not; the stream goes on.

        Raises
        ------
        UtteranceClosed
            If the stream takes no more audio.
        """
        self._pipeline.dispatcher.check_process()
        with self._push_lock:
            self._check_open()
            self._post_audio(partial(self._flush, is_end=False))

    def finalize(self) -> Future[Transcription]:
        """Take no more audio; return a future of the whole text.

        A stream that ended by itself, for its length or because no audio came, may be finalized
        once, too, for its text.

        Raises
        ------
        UtteranceClosed
            If it was finalized before, cancelled, or failed.
        """
        self._pipeline.dispatcher.check_process()
        with self._push_lock:
            future, self._unclaimed = self._unclaimed, None
            if future is None:
                future = Future()
                with self._lock:
                    self._check_open()
                    self._state = "finalizing"
                    self._future = future
                self._post_end(self._reader.finish())
        future.add_done_callback(self._note_cancelled)
        return future

    def update(self, **options: Any) -> None:
        """Transcribe what is pushed from now on with other options.

        Parameters
        ----------
        **options
            Some of `UtteranceOptions`, but not those about speech and pauses.

        Raises
        ------
        OptionError
            If an option is unknown, out of range, or about speech and pauses.
        UtteranceClosed
            If the stream takes no more audio.
        """
        with self._push_lock:
            self._check_open()
            plan = self._make_plan({**_changed(self._plan), **options})
            if (plan.segmentation, plan.options.vad) != (
                self._plan.segmentation,
                self._plan.options.vad,
            ):
                raise OptionError(
                    "vad, vad_threshold, endpoint_s, min_speech_s: cannot be changed while the "
                    "stream is open"
                )
            self._plan = plan
            self._post_audio(partial(self._utterance.update, plan))

    def cancel(self) -> None:
        """Forget all that is not final, and close. Does nothing to a closed stream."""
        with self._lock:
            if self._state == "closed":
                return
            self._state = "closed"
            self._audio.clear()
        self._utterance.cancel()
        self._post(partial(self._close, "cancelled"))

    @property
    def snapshot(self) -> StreamSnapshot:
        """Where the stream stands. Takes no lock."""
        text, stable, unstable = self._shown
        return StreamSnapshot(
            state=self._state,
            received_s=self._received / SAMPLE_RATE,
            processed_s=self._processed / SAMPLE_RATE,
            text=text,
            stable_text=stable,
            unstable_text=unstable,
        )

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Event:
        if self._has_callback:
            raise OptionError("the events of this utterance go to its callback")
        if self._is_read_out:
            raise StopAsyncIteration
        event = await self._events.get()
        self._is_read_out = isinstance(event, Closed)
        return event

    _is_read_out = False

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc_value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if exc_type is not None:
            self.cancel()
            return
        try:
            future = self.finalize()
        except UtteranceClosed:
            return
        await asyncio.wrap_future(future)

    # What the engine calls.

    @property
    def is_stalled(self) -> bool:
        """Whether audio was taken, and nothing has been decoded for long."""
        return self._has_stalled

    def check(self, now: float, stalled_after_s: float) -> None:
        """Look after the stream, from one thread at a time.

        End it where nobody does, tell if nothing comes of it, and keep no memory that it does not
        need.
        """
        idle_s, timeout_s = now - self._last_push, self._options.idle_timeout_s
        if self._state == "open" and timeout_s is not None and idle_s > timeout_s:
            with self._push_lock:
                if now - self._last_push > timeout_s:
                    self._end_early(
                        "idle", f"no audio came for {timeout_s:.1f} s", self._reader.finish()
                    )
        if not self._is_compact and idle_s > _COMPACT_AFTER_S:
            self._is_compact = True
            self._post_audio(self._compact)  # after the audio
        waits = self._state != "closed" and (self._pending or self._received > self._processed)
        seen = (self._processed, self._transcript.n_finals) if waits else None
        if seen is None or seen != self._seen:
            self._seen, self._seen_at, self._has_stalled = seen, now, False
        elif now - self._seen_at > stalled_after_s and not self._has_stalled:
            self._has_stalled = True
            self._counters.add("stalled")
            message = f"audio waits, and nothing came of it for {now - self._seen_at:.1f} s"
            self._emit(Error, code="stalled", message=message, recoverable=True)

    def end(self) -> None:
        """Finalize it if nobody has."""
        try:
            self.finalize()
        except UtteranceClosed:
            logger.debug("utterance %r is ending already", self.utterance_id)

    # Threads that push.

    def _check_open(self) -> None:
        if self._state != "open":
            raise UtteranceClosed(
                f"utterance {self.utterance_id!r} is {self._state} and takes no more audio; "
                "start another one"
            )

    def _buffered_s(self) -> float:
        return max(self._received - self._processed, 0) / SAMPLE_RATE

    def _lag_s(self) -> float:
        start = self._cutter.segmenter.window_start
        if start is None:
            return self._buffered_s()
        return max(self._received - max(self._reflected, start), 0) / SAMPLE_RATE

    def _enqueue(self, samples: NDArray[np.float32]) -> None:
        """Queue samples; called with the lock for pushes."""
        now = time.monotonic()
        self._last_push = now
        if not len(samples):
            return
        room = round(self._options.max_duration_s * SAMPLE_RATE) - self._received
        with self._lock:
            self._received += min(len(samples), room)
            self._arrivals.add(self._received, now)
        self._counters.add_audio(taken=min(len(samples), room))
        self._is_compact = False
        self._post_audio(samples[:room])
        if len(samples) >= room:
            self._end_early(
                "too_long", f"{self._options.max_duration_s:.1f} s of audio came, the most allowed"
            )

    def _end_early(
        self,
        code: Literal["idle", "too_long"],
        message: str,
        rest: NDArray[np.float32] | None = None,
    ) -> None:
        """Finalize on behalf of the user; called with the lock for pushes."""
        with self._lock:
            if self._state != "open":
                return
            self._state = "finalizing"
            self._future = self._unclaimed = Future()
        self._counters.add(code)
        self._emit(Error, code=code, message=message, recoverable=False)
        self._post_end(rest)

    def _post_end(self, rest: NDArray[np.float32] | None) -> None:
        """Queue the last samples and the end; called with the lock for pushes."""
        if rest is not None and len(rest):
            with self._lock:
                self._received += len(rest)
            self._counters.add_audio(taken=len(rest))
            self._post_audio(rest)
        self._post_audio(partial(self._flush, is_end=True))

    def _note_cancelled(self, future: Future[Transcription]) -> None:
        if future.cancelled():
            self.cancel()

    # The strand.

    def _post(self, news: Callable[[], None]) -> None:
        with self._lock:
            self._news.append(news)
        self._wake()

    def _post_audio(self, item: NDArray[np.float32] | Callable[[], None]) -> None:
        with self._lock:
            last = self._audio[-1] if self._audio else None
            if (
                isinstance(item, np.ndarray)
                and isinstance(last, np.ndarray)
                and len(last) + len(item) <= _PIECE_SAMPLES
            ):
                self._audio[-1] = np.concatenate((last, item))
            else:
                self._audio.append(item)
        self._wake()

    def _wake(self) -> None:
        """See that what can be done is being done."""
        with self._lock:
            if self._is_working or not self._has_work():
                return
            self._is_working = True
        if not self._is_scheduled():
            self._work()

    def _is_scheduled(self) -> bool:
        """Have a task work things off; False if there can be none."""
        try:
            self._pipeline.executor.submit_nowait(self._work, priority=self._priority)
        except SpeechRNTError:  # the executor takes nothing at the moment, or any more
            return False
        return True

    def _has_work(self) -> bool:
        """Whether there is something to be done now; called with the lock."""
        if self._news:
            return True
        if not self._audio or not self._utterance.has_room:
            return False
        # Once no more audio can come, what there is comes to an end, whether the events are taken
        # or not.
        return self._state != "open" or not self._events.is_full

    def _work(self) -> None:
        """Work off what waits, for as long as others can bear."""
        while True:
            for _ in range(_STEPS_PER_TASK):
                with self._lock:
                    if not self._has_work():
                        self._is_working = False
                        return
                    item = self._news.popleft() if self._news else self._audio.popleft()
                try:
                    if callable(item):
                        item()
                    else:
                        self._take_samples(item)
                except Exception as error:
                    if not isinstance(error, SpeechRNTError):
                        logger.exception("utterance %r failed", self.utterance_id)
                    self._utterance.cancel()
                    self._fail(error)
            # An executor without threads would have it done in here, one call inside the other.
            if self._pipeline.scheduler is not None and self._is_scheduled():
                return

    def _take_samples(self, samples: NDArray[np.float32]) -> None:
        """Look at the next samples, at as many as one task should."""
        if self._state == "closed":
            return
        if len(samples) > _BLOCK_SAMPLES:
            with self._lock:
                self._audio.appendleft(samples[_BLOCK_SAMPLES:])
            samples = samples[:_BLOCK_SAMPLES]
        self._samples.append(samples)
        self._processed += len(samples)
        cutter = self._cutter
        whole = self._samples.end - cutter.position
        whole -= whole % FRAME_SAMPLES
        if whole:
            self._follow(cutter.push(self._samples.view(cutter.position, cutter.position + whole)))
            self._grow_mel()
            needed_from = cutter.segmenter.needed_from
            self._samples.discard(needed_from)
            with self._lock:
                self._arrivals.forget(needed_from)
            if cutter.segmenter.is_speech:
                self._utterance.forget_guess()
                self._preview()
        self._tell_of_room()

    def _grow_mel(self) -> None:
        """Compute what has become complete of the open window's features."""
        start, position = self._cutter.segmenter.window_start, self._cutter.position
        if start is None:
            self._mel.release()
            return
        if start != self._mel.start or self._mel.frames is None:
            self._mel.begin(start)
        self._mel.push(self._samples.view(self._mel.end, position))

    def _frames_from(self, start: int) -> NDArray[np.float32] | None:
        """Return the features that are known of a window that begins here."""
        return self._mel.frames if self._mel.start == start else None

    def _tell_of_room(self) -> None:
        with self._lock:
            waiters, self._room_waiters = self._room_waiters, []
        for loop, future in waiters:
            try:
                loop.call_soon_threadsafe(_resolve, future)
            except RuntimeError:
                logger.debug("there is room for a loop that was closed")

    def _compact(self) -> None:
        self._samples.compact()

    def _follow(self, cuts: list[Cut]) -> None:
        """Act on what the cutter found."""
        for cut in cuts:
            if isinstance(cut, SpeechStart):
                self._emit(SpeechStarted, start_s=cut.sample / SAMPLE_RATE)
            elif isinstance(cut, SpeechEnd):
                self._emit(SpeechEnded, end_s=cut.sample / SAMPLE_RATE)
            elif isinstance(cut, Pause):
                window = cut.cut
                samples = self._samples.view(window.start, window.end)
                self._utterance.speculate(window, samples, self._frames_from(window.start))
            else:
                self._add_window(cut)

    def _add_window(self, cut: WindowCut) -> None:
        if cut.end - cut.start < HOP_LENGTH:
            return  # less than a frame, of which `Utterance.add` makes nothing
        self._pending[cut.start] = _Pending(
            self._agreement, self._is_flushing, self._arrival_of(cut.speech_end)
        )
        self._agreement = LocalAgreement()
        self._partial_at = cut.end
        self._forget_partial()
        samples = self._samples.view(cut.start, cut.end)
        self._utterance.add(cut, samples, True, self._frames_from(cut.start))

    def _arrival_of(self, sample: int) -> float | None:
        with self._lock:
            return self._arrivals.of(sample)

    def _flush(self, is_end: bool) -> None:
        """Cut the open window here, and begin anew or end."""
        if self._state == "closed":
            return
        self._is_flushing = True
        n_pending = len(self._pending)
        position = self._cutter.position
        self._follow(self._cutter.flush(self._samples.view(position, self._samples.end)))
        self._is_flushing = False
        self._samples.discard(self._samples.end)
        self._mel.release()
        if is_end:
            self._utterance.finish()
        elif len(self._pending) > n_pending:
            pass  # the final of the window that was cut answers
        elif self._pending:
            list(self._pending.values())[-1].from_flush = True
        else:
            self._emit_final(None, "", False, True, None)

    # Partials.

    def _preview(self) -> None:
        """Have the open window transcribed, if it is time."""
        segmenter, position = self._cutter.segmenter, self._cutter.position
        start = segmenter.window_start
        # A window's partials come after the final of the one before, which they depend on.
        if (
            not self._options.partials
            or self._drop_partial is not None
            or self._pending
            or start is None
        ):
            return
        context = self._plan.context((position - start) // 160)
        expected_s = self._pipeline.dispatcher.expected_s(context)
        interval_s = max(self._partial_interval_s, expected_s / _PARTIAL_SHARE)
        if position - max(self._partial_at, start) < interval_s * SAMPLE_RATE:
            return
        self._partial_at = position
        try:
            self._drop_partial = self._utterance.preview(
                self._samples.view(start, position),
                segmenter.continues,
                done=lambda preview: self._post(
                    partial(self._take_preview, start, position, preview)
                ),
                failed=lambda error: self._post(partial(self._lose_preview, start, error)),
                priority=Priority(min(self._priority + 1, Priority.LOW)),
                deadline=time.monotonic() + _PARTIAL_DEADLINE_S,
                frames=self._frames_from(start),
            )
        except SpeechRNTError as error:
            logger.debug("no partial: %s", error)
            self._counters.add("expired_partials")

    def _forget_partial(self) -> None:
        drop, self._drop_partial = self._drop_partial, None
        if drop is not None:
            drop()

    def _take_preview(self, start: int, position: int, preview: Preview) -> None:
        if self._state == "closed" or self._cutter.segmenter.window_start != start:
            return  # its window is cut
        self._drop_partial = None
        self._adapt()
        self._counters.add("partials")
        self._language = preview.language
        is_first = not self._agreement.committed
        words = split_words(preview.text, preview.language)
        new = self._agreement.update(words, position / SAMPLE_RATE)
        self._reflected = position
        at = self._arrival_of(position)
        if at is not None:
            self._counters.partial_lag.add(max(time.monotonic() - at, 0.0))
        audio_s = position / SAMPLE_RATE
        if new:
            self._counters.add("committed_words", len(new))
            delta = join_words(new if is_first else ["", *new], preview.language)
            self._emit(Committed, audio_s, delta=delta)
        stable = join_words(self._agreement.committed, preview.language)
        unstable = join_words(self._agreement.unstable, preview.language)
        self._shown = self._shown[0], stable, unstable
        self._emit(Partial, audio_s, stable_text=stable, unstable_text=unstable)

    def _lose_preview(self, start: int, error: Exception) -> None:
        if self._is_over:
            return
        if self._cutter.segmenter.window_start == start:
            self._drop_partial = None
        logger.debug("no partial: %s", error)
        self._counters.add("expired_partials")
        self._adapt()

    def _adapt(self) -> None:
        """Have partials come as often as the model can bear."""
        backlog_s = self._pipeline.dispatcher.backlog_s
        interval_s = self._partial_interval_s
        if backlog_s > _BUSY_BACKLOG_S and interval_s < _LONGEST_PARTIAL_INTERVAL_S:
            self._partial_interval_s = min(2 * interval_s, _LONGEST_PARTIAL_INTERVAL_S)
            self._emit(Overload, partial_interval_s=self._partial_interval_s)
        elif backlog_s < _CALM_BACKLOG_S and interval_s > self._options.partial_interval_s:
            self._partial_interval_s = max(interval_s / 2, self._options.partial_interval_s)

    # Finals.

    def _take_final(self, final: WindowFinal) -> None:
        if self._state == "closed":
            return
        pending = self._pending.pop(final.cut.start)
        self._transcript.add(final)
        self._count_told(final.cut.end)
        self._shown = add_text(self._shown[0], final), "", ""
        self._language = final.language
        self._reflected = max(self._reflected, final.cut.end)
        text = "" if final.segment is None else final.segment.text.strip()
        words = split_words(text, final.language)
        contradicted = pending.agreement.contradicted_by(words)
        self._counters.add("committed_at_final_words", len(pending.agreement.committed))
        self._counters.add("contradicted_words", contradicted)
        self._counters.add("final_words", len(words))
        self._emit_final(final, text, contradicted > 0, pending.from_flush, pending.spoken_at)

    def _emit_final(
        self,
        final: WindowFinal | None,
        text: str,
        revised: bool,
        from_flush: bool,
        spoken_at: float | None,
    ) -> None:
        self._counters.add("finals")
        self._counters.add("revised_finals", revised)
        ttfs_s = None
        if spoken_at is not None:
            ttfs_s = max(time.monotonic() - spoken_at, 0.0)
            self._counters.ttfs.add(ttfs_s)
        self._emit(
            Final,
            None if final is None else final.cut.end / SAMPLE_RATE,
            text=text,
            segment=None if final is None else final.segment,
            language=self._language,
            revised=revised,
            from_flush=from_flush,
            ttfs_s=ttfs_s,
        )

    def _count_told(self, position: int) -> None:
        self._counters.add_audio(told=position - self._told)
        self._told = position

    def _settle(self) -> None:
        """Close after the last final."""
        self._count_told(self._received)
        transcription = self._transcript.finish(
            self._plan.language,
            self._received / SAMPLE_RATE,
            self._utterance.timings,
            (*self._plan.warnings, *self._reader.warnings),
        )
        self._close("finalized", lambda future: future.set_result(transcription))

    def _fail(self, error: Exception) -> None:
        if self._is_over:
            return
        self._counters.add_error(error)
        self._emit(Error, code="failed", message=str(error), recoverable=False)
        self._close("failed", lambda future: future.set_exception(error))

    _is_over = False

    def _close(
        self,
        reason: Literal["finalized", "cancelled", "failed"],
        resolve: Callable[[Future[Transcription]], None] | None = None,
    ) -> None:
        """Let go of everything, and tell so."""
        if self._is_over:
            return
        self._is_over = True
        self._counters.add(reason)
        with self._lock:
            self._state = "closed"
            self._audio.clear()
            future = self._future
        self._forget_partial()
        self._samples.release()
        self._mel.release()
        self._transcript.release()
        self._pending.clear()
        self._processed = self._received
        self._tell_of_room()
        self._on_over(self, partial(self._emit, Closed, reason=reason))
        if future is None:
            return
        if resolve is None:
            future.cancel()
        # Whoever waits for a cancelled future is told by this, too.
        if future.set_running_or_notify_cancel() and resolve is not None:
            resolve(future)

    def _emit(self, kind: type[Event], audio_s: float | None = None, **what: Any) -> None:
        if audio_s is None:
            audio_s = self._processed / SAMPLE_RATE
        self._events.put(kind(self.utterance_id, audio_s, **what))


def _resolve(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


def _changed(plan: Plan) -> dict[str, Any]:
    """Return the options of a plan by name."""
    return {each.name: getattr(plan.options, each.name) for each in fields(plan.options)}
