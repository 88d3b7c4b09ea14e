"""From the windows of one utterance to its text: prompts, language, retries, order.

The text is a function of the samples, the places where they were flushed, and the options. Nothing
here depends on time or on what else the model does: retries search harder instead of sampling, and
prompts and languages come from the utterance's own earlier windows, in order.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
from numpy.typing import NDArray

from . import _mel, _mel_task
from ._sched import Priority, Scheduler
from .audio import SAMPLE_RATE
from .batching import Dispatcher, Executor, Job, JobResult
from .decoding import DecodingResult, build_prompt, length_limit, parse_result
from .errors import SchedulerClosed, SpeechRNTError
from .features import HOP_LENGTH
from .growing_mel import complete
from .languages import UNSPACED
from .latency import Histogram, HistogramSnapshot, StageTimings
from .models import Model
from .plan import Plan
from .pools import AudioBufferPool, TranscriptionResultPool
from .results import Segment
from .segmentation import WindowCut
from .tokenizer import Tokenizer

__all__ = [
    "Final",
    "Preview",
    "Utterance",
    "UtterancePipeline",
    "UtteranceStatistics",
]

logger = logging.getLogger("speechrnt")

# A language is settled by a window of this length in which it is this probable.
_LANGUAGE_SETTLES_S = 2.0
_LANGUAGE_SETTLES_AT = 0.5

_LOG10_SILENCE = -10.0


@dataclass(frozen=True)
class Final:
    """What a window says, for good.

    Attributes
    ----------
    segment
        Text, ids and scores; ``None`` if there is nothing but silence.
    language, language_probability
        The language it was decoded in; the probability is 1 where nothing was detected.
    cut
        Where the window lies.
    """

    segment: Segment | None
    language: str
    language_probability: float
    cut: WindowCut


@dataclass(frozen=True)
class Preview:
    """What the beginning of a window says, and in which language."""

    text: str
    language: str


@dataclass(frozen=True)
class UtteranceStatistics:
    """What happened to the windows of all utterances so far.

    Attributes
    ----------
    windows, silent, retried, cut_off : int
        Windows decoded; in which there was nothing but silence; that were searched a second time;
        and whose text reached the most tokens allowed for its length even so.
    stages : Mapping of str to HistogramSnapshot
        ``"mel"``, ``"queue"``, ``"encode"`` and ``"decode"`` of single windows, of requests and
        streams alike, second attempts counted on their own; see `StageTimings`.
    """

    windows: int
    silent: int
    retried: int
    cut_off: int
    stages: Mapping[str, HistogramSnapshot]


class UtterancePipeline:
    """What all utterances of a model share. Thread-safe.

    Parameters
    ----------
    model, dispatcher, executor
        The model, its dispatcher, and what runs the Python work around it.
    scheduler
        What computes features; None: whoever adds a window.
    buffers
        For features.
    results
        For what utterances say.
    windows_in_flight
        Windows of one utterance that the model is given at the same time.
    """

    def __init__(
        self,
        model: Model,
        dispatcher: Dispatcher,
        executor: Executor,
        scheduler: Scheduler | None,
        buffers: AudioBufferPool,
        results: TranscriptionResultPool,
        windows_in_flight: int,
    ) -> None:
        self.model = model
        self.dispatcher = dispatcher
        self.executor = executor
        self.scheduler = scheduler
        self.buffers = buffers
        self.results = results
        self.windows_in_flight = windows_in_flight
        self._lock = threading.Lock()
        self._windows = self._silent = self._retried = self._cut_off = 0
        self.stages = {stage: Histogram() for stage in ("mel", "queue", "encode", "decode")}

    def statistics(self) -> UtteranceStatistics:
        """Return what was counted so far."""
        stages = {stage: histogram.snapshot() for stage, histogram in self.stages.items()}
        with self._lock:
            return UtteranceStatistics(
                self._windows, self._silent, self._retried, self._cut_off, stages
            )

    def count_window(self, silent: bool, retried: bool, cut_off: bool) -> None:
        """Count a window that is done."""
        with self._lock:
            self._windows += 1
            self._silent += silent
            self._retried += retried
            self._cut_off += cut_off


class WindowFeatures:
    """The log-mel of a window, in a pooled buffer until `release`."""

    def __init__(self, n_samples: int, n_mels: int, pool: AudioBufferPool) -> None:
        # Without the last frame, which stands for less than a hop of audio.
        self.frames = n_samples // HOP_LENGTH
        self.maximum: float | None = None
        """The largest value; None as long as they are not computed."""
        self._buffer = pool.acquire(n_mels * self.frames)
        self.log10_mel = self._buffer.array.reshape(n_mels, self.frames)

    def write(self, out: NDArray[np.float32]) -> None:
        """Write them to (n_mels, context), normalised by their maximum and padded with silence."""
        assert self.maximum is not None
        _mel.normalize(self.log10_mel, out=out[:, : self.frames], maximum=self.maximum)
        out[:, self.frames :] = (max(_LOG10_SILENCE, self.maximum - 8) + 4) / 4

    def release(self) -> None:
        """Give the buffer back."""
        del self.log10_mel
        self._buffer.release()


@dataclass(eq=False)
class _Language:
    """What consecutive windows are decoded in; None until it is settled."""

    code: str | None


@dataclass(eq=False)
class _Window:
    """A window between its cut and its final."""

    cut: WindowCut
    plan: Plan
    language: _Language
    features: WindowFeatures | None
    early: JobResult | None = None  # of a window that is not sure to be one
    job: Job | None = None
    results: list[DecodingResult] | None = None
    final: Final | None = None

    def release(self) -> None:
        features, self.features = self.features, None
        if features is not None:
            features.release()


class Utterance:
    """The windows of one utterance, on their way through the model.

    `add` them in order, then `finish`. The callbacks come one at a time, in order, from whichever
    thread made the change; none begins after `cancel` has returned. `on_final` comes for each
    window; `on_progress` when one is done, which may have made room; `on_settled` when all windows
    of a finished utterance are done; `on_failed` instead if one failed, and nothing after it.

    Thread-safe; but windows come from one thread at a time.
    """

    def __init__(
        self,
        pipeline: UtterancePipeline,
        plan: Plan,
        *,
        on_final: Callable[[Final], None],
        on_settled: Callable[[], None],
        on_failed: Callable[[Exception], None],
        on_progress: Callable[[], None] = lambda: None,
        priority: Priority = Priority.NORMAL,
        deadline: float | None = None,
        client: Hashable | None = None,
    ) -> None:
        self._pipeline = pipeline
        self._plan = plan
        self._on_final = on_final
        self._on_settled = on_settled
        self._on_failed = on_failed
        self._on_progress = on_progress
        self._priority = priority
        self._deadline = deadline
        self._client = client
        self._lock = threading.Lock()
        # Guarded by it, all below.
        self._events: deque[Callable[[], None]] = deque()
        self._is_telling = False
        self._windows: deque[_Window] = deque()  # not final, oldest first
        self._guess: _Window | None = None
        self._is_finished = False
        self._is_over = False  # settled, failed or cancelled
        self._language = _Language(plan.language)
        self._previous_tokens: list[int] = []
        self._n_segments = 0
        self._seconds = dict.fromkeys(("mel", "queue", "encode", "decode", "text"), 0.0)
        self.text_at = 0.0
        """When the last text was known, on the clock of `time.perf_counter`."""

    @property
    def in_flight(self) -> int:
        """Windows that are not final."""
        with self._lock:
            return len(self._windows)

    @property
    def has_room(self) -> bool:
        """Whether another window may be added now."""
        return self.in_flight < self._pipeline.windows_in_flight

    @property
    def timings(self) -> StageTimings:
        """What is known of the stages so far."""
        with self._lock:
            return StageTimings(**self._seconds)

    @property
    def language(self) -> str | None:
        """The language, once it is settled."""
        with self._lock:
            return self._language.code

    def update(self, plan: Plan) -> None:
        """Transcribe the windows that are added from now on differently."""
        with self._lock:
            if plan.language != self._plan.language:
                self._language = _Language(plan.language)
            self._plan = plan

    def add(
        self,
        cut: WindowCut,
        samples: NDArray[np.float32],
        in_place: bool = False,
        frames: NDArray[np.float32] | None = None,
    ) -> None:
        """Take the next window.

        Its samples must not change until it is final; if `in_place`, they may do so at once.
        `frames` are those that are known of it or of more: see `growing_mel.complete`.
        """
        if len(samples) < HOP_LENGTH:
            return  # less than a frame
        if self._adopt(cut):
            return
        pipeline = self._pipeline
        with self._lock:
            if self._is_over:
                return
            features = WindowFeatures(len(samples), pipeline.model.n_mels, pipeline.buffers)
            window = _Window(cut, self._plan, self._language, features)
            self._windows.append(window)
            out = features.log10_mel  # which stays valid though the window be cancelled
        if pipeline.scheduler is not None and not in_place:
            done = partial(self._take_features, window)
            try:
                _mel_task.spawn(pipeline.scheduler, self._priority, samples, out, done)
                return
            except SpeechRNTError as error:  # it takes nothing at the moment, or any more
                logger.debug("features are computed here: %s", error)
        started = time.perf_counter()
        maximum = complete(samples, frames, out)
        self._take_features(window, maximum, time.perf_counter() - started)

    def speculate(
        self,
        cut: WindowCut,
        samples: NDArray[np.float32],
        frames: NDArray[np.float32] | None = None,
    ) -> None:
        """Decode what will be the next window if nothing more is said.

        If `add` brings the same cut, the work is done already; whatever else comes, it is dropped.
        """
        with self._lock:
            self._drop_guess()
            # Where the prompt or the language is not known yet, the guess would be a poor one.
            if self._is_over or len(samples) < HOP_LENGTH or self._windows:
                return
            pipeline = self._pipeline
            features = WindowFeatures(len(samples), pipeline.model.n_mels, pipeline.buffers)
            window = self._guess = _Window(cut, self._plan, self._language, features)
            out = features.log10_mel
        started = time.perf_counter()
        maximum = complete(samples, frames, out)
        with self._lock:
            if self._guess is not window:
                return
            features.maximum = maximum
            self._count("mel", time.perf_counter() - started)
            try:
                self._start(window, window.plan)
            except SpeechRNTError as error:
                logger.debug("no guess: %s", error)
                self._drop_guess()

    def forget_guess(self) -> None:
        """Drop the guess, as speech goes on."""
        with self._lock:
            self._drop_guess()

    def preview(
        self,
        samples: NDArray[np.float32],
        continues: bool,
        done: Callable[[Preview], None],
        failed: Callable[[Exception], None],
        priority: Priority,
        deadline: float,
        frames: NDArray[np.float32] | None = None,
    ) -> Callable[[], None] | None:
        """Decode the beginning of a window that is not cut yet, once, beside all else.

        Parameters
        ----------
        samples
            The window so far; free again after the call.
        continues
            See `WindowCut`.
        done, failed
            One of them is called by the executor.
        priority, deadline
            See `Job`.
        frames
            See `add`.

        Returns
        -------
        callable or None
            Takes it back, as far as the model has not begun; None if there is less than a frame.

        Raises
        ------
        SpeechRNTError
            If the dispatcher does not take it.
        """
        if len(samples) < HOP_LENGTH:
            return None
        pipeline = self._pipeline
        features = WindowFeatures(len(samples), pipeline.model.n_mels, pipeline.buffers)
        try:
            features.maximum = complete(samples, frames, features.log10_mel)
            with self._lock:
                plan, language = self._plan, self._language.code
                previous = plan.initial_prompt
                if continues and plan.options.condition_on_previous_text and not self._windows:
                    previous = plan.prompt(self._previous_tokens)

            def take(result: JobResult) -> None:
                features.release()
                parsed = self._parse(job, result)
                spoken = language or result.languages[0][0] if result.languages else language
                # The audio may end within a character of several tokens.
                text = "" if plan.is_silent(parsed) else parsed.text.rstrip("\ufffd")
                done(Preview(text, spoken or ""))

            def give_up(error: Exception) -> None:
                features.release()
                failed(error)

            job = self._make_job(plan, features, language, previous, take, give_up)
            job.priority = priority
            job.deadline = deadline
            pipeline.dispatcher.submit(job)
        except BaseException:
            features.release()
            raise

        def drop() -> None:
            if pipeline.dispatcher.cancel(job):
                features.release()

        return drop

    def _adopt(self, cut: WindowCut) -> bool:
        """Make the guess a window, if it is this one."""
        with self._lock:
            window = self._guess
            if window is None or self._is_over:
                return False
            if (window.cut.start, window.cut.end) != (cut.start, cut.end) or (
                window.plan is not self._plan
            ):
                self._drop_guess()
                return False
            self._guess = None
            window.cut = cut
            self._windows.append(window)
            early, window.early = window.early, None
        if early is not None:
            self._done(window, early)
        return True

    def _drop_guess(self) -> None:
        """Forget the guess; called with the lock."""
        window, self._guess = self._guess, None
        if window is not None and (
            window.job is None
            or window.early is not None
            or self._pipeline.dispatcher.cancel(window.job)
        ):
            window.release()

    def _take_features(self, window: _Window, maximum: float | None, seconds: float) -> None:
        """Note that the features of a window are there."""
        if maximum is None:
            self._fail(window, SchedulerClosed("the scheduler was shut down"))
            return
        with self._lock:
            if not self._is_over:
                assert window.features is not None
                window.features.maximum = maximum
                self._count("mel", seconds)
                self._submit()
        self._tell()

    def finish(self) -> None:
        """Add no more."""
        with self._lock:
            self._is_finished = True
            self._drop_guess()
            self._settle()
        self._tell()

    def cancel(self) -> None:
        """Forget all that is not final."""
        with self._lock:
            self._is_over = True
            self._events.clear()
            self._drop_windows()

    def _tell(self) -> None:
        """Make the callbacks that are due, unless another thread is at it."""
        while True:
            with self._lock:
                if self._is_telling or not self._events:
                    return
                self._is_telling = True
                event = self._events.popleft()
            try:
                event()
            except Exception:
                logger.exception("a callback of an utterance failed")
            with self._lock:
                self._is_telling = False

    def _drop_windows(self) -> None:
        self._drop_guess()
        for window in self._windows:
            # A worker may be about to read the features of a job that cannot be taken back; its
            # result comes to `_done` or `_fail`, which release them.
            if window.job is None or self._pipeline.dispatcher.cancel(window.job):
                window.release()
        self._windows.clear()

    def _submit(self) -> None:
        """Hand over the windows whose prompts are known; called with the lock."""
        for position, window in enumerate(self._windows):
            if position >= self._pipeline.windows_in_flight:
                break
            if window.job is not None or window.results:
                continue
            assert window.features is not None
            if window.features.maximum is None:
                continue
            is_first = position == 0
            if window.language.code is None and not is_first:
                break
            if self._depends_on_last(window) and not is_first:
                break
            try:
                self._start(window, window.plan)
            except SpeechRNTError as error:
                window.job = None
                self._fail_all(error)
                return

    def _depends_on_last(self, window: _Window) -> bool:
        return (
            window.cut.continues
            and window.plan.options.condition_on_previous_text
            and window.plan.max_prompt_tokens > len(window.plan.initial_prompt)
        )

    def _start(self, window: _Window, plan: Plan) -> None:
        """Give a window to the model."""
        assert window.features is not None
        is_retry = window.results is not None
        previous: tuple[int, ...] = plan.initial_prompt
        if is_retry:
            previous = ()
        elif self._depends_on_last(window):
            previous = plan.prompt(self._previous_tokens)
        language = window.language.code
        if is_retry and language is None:
            assert window.final is not None
            language = window.final.language
        job = self._make_job(
            plan,
            window.features,
            language,
            previous,
            lambda result: self._done(window, result),
            lambda error: self._fail(window, error),
            lane=int(is_retry),
        )
        last = window.job
        if is_retry and last is not None and last.frames == job.frames:
            job.encoding = last.encoding
        self._pipeline.dispatcher.submit(job)
        window.job = job

    def _make_job(
        self,
        plan: Plan,
        features: WindowFeatures,
        language: str | None,
        previous: tuple[int, ...],
        done: Callable[[JobResult], None],
        failed: Callable[[Exception], None],
        lane: int = 0,
    ) -> Job:
        frames = features.frames
        context = plan.context(frames)
        tokenizer = self._pipeline.model.tokenizer
        some_language = language or tokenizer.languages[0]
        # The tokens of the prompt: text before and its mark, task, no timestamps.
        prompt_length = len(previous) + bool(previous) + 1
        prompt_length += len(tokenizer.sot_sequence(some_language, plan.options.task))
        return Job(
            frames=context,
            features=features.write,
            language=language,
            prompt=partial(_prompt, tokenizer, plan.options.task, previous),
            prompt_shape=len(previous),
            max_length=length_limit(plan.most_tokens(frames, context), prompt_length),
            search=plan.search,
            done=done,
            failed=failed,
            priority=self._priority,
            deadline=self._deadline,
            client=self._client,
            lane=lane,
        )

    def _parse(self, job: Job, result: JobResult) -> DecodingResult:
        assert job.search is not None
        return parse_result(
            result.output,
            self._pipeline.model.tokenizer,
            result.prompt_length,
            0.0,
            job.search.length_penalty,
            job.max_length,
        )

    def _done(self, window: _Window, result: JobResult) -> None:
        """Take what the model says of a window."""
        try:
            self._take_result(window, result)
        except Exception as error:
            logger.exception("a result could not be used")
            self._fail(window, error)

    def _take_result(self, window: _Window, result: JobResult) -> None:
        started = time.perf_counter()
        assert window.job is not None
        job = window.job
        parsed = self._parse(job, result)
        with self._lock:
            if self._is_over:
                window.release()
                return
            if window not in self._windows:  # it is a guess, or was one
                if window is self._guess:
                    window.early = result
                else:
                    window.release()
                return
            self._count("queue", result.queue_s)
            self._count("encode", result.encode_s)
            self._count("decode", result.decode_s)
            if result.languages is None:
                language, probability = str(job.language), 1.0
                if window.final is not None:  # of the attempt before
                    language, probability = window.final.language, window.final.language_probability
            else:
                language, probability = result.languages[0]
            is_first = window.results is None
            window.results = [*(window.results or ()), parsed]
            window.final = Final(None, language, probability, window.cut)
            if is_first and window.plan.looks_wrong(parsed):
                job.encoding = result.encoding
                try:
                    self._start(window, window.plan.retry())
                    return
                except SpeechRNTError as error:
                    logger.debug("no second attempt: %s", error)
            self._make_final(window)
            self._seconds["text"] += time.perf_counter() - started
            self.text_at = time.perf_counter()
            self._deliver()
        self._tell()

    def _count(self, stage: str, seconds: float) -> None:
        """Count the time of a window; called with the lock."""
        self._seconds[stage] += seconds
        self._pipeline.stages[stage].add(seconds)

    def _make_final(self, window: _Window) -> None:
        """Choose a window's transcript; called with the lock."""
        assert window.results is not None
        assert window.final is not None
        window.release()
        window.job = None
        best = max(
            window.results,
            key=lambda r: (not window.plan.is_repetitive(r), not r.is_cut_off, r.avg_logprob),
        )
        silent = not best.text or window.plan.is_silent(best)
        self._pipeline.count_window(silent, len(window.results) > 1, best.is_cut_off)
        if not silent:
            cut = window.cut
            segment = Segment(
                id=0,
                seek=cut.start // HOP_LENGTH,
                start=cut.speech_start / SAMPLE_RATE,
                end=cut.speech_end / SAMPLE_RATE,
                text=self._pipeline.model.tokenizer.decode(best.tokens),
                tokens=best.tokens,
                avg_logprob=best.avg_logprob,
                compression_ratio=best.compression_ratio,
                no_speech_prob=best.no_speech_prob,
                words=None,
                temperature=0.0,
            )
            window.final = replace(window.final, segment=segment)

    def _deliver(self) -> None:
        """Tell of the finals whose turn has come, and go on; called with the lock."""
        while self._windows and self._windows[0].job is None and self._windows[0].results:
            window = self._windows.popleft()
            final = window.final
            assert final is not None
            if final.segment is None:
                self._previous_tokens = []
            else:
                self._n_segments += 1
                final.segment.id = self._n_segments
                self._previous_tokens = final.segment.tokens
            if (
                window.language.code is None
                and final.cut.end - final.cut.start >= _LANGUAGE_SETTLES_S * SAMPLE_RATE
                and final.language_probability >= _LANGUAGE_SETTLES_AT
            ):
                window.language.code = final.language
            self._events.append(partial(self._on_final, final))
        self._submit()
        if not self._is_over:
            self._events.append(self._on_progress)
        self._settle()

    def _settle(self) -> None:
        if self._is_finished and not self._windows and not self._is_over:
            self._is_over = True
            self._events.append(self._on_settled)

    def _fail(self, window: _Window, error: Exception) -> None:
        """Take an error for an answer, or what was found before it."""
        with self._lock:
            if window is self._guess:
                self._guess = None
            if self._is_over or window not in self._windows:
                window.release()
                return
            window.job = None
            if window.results:
                logger.debug("no second attempt: %s", error)
                self._make_final(window)
                self._deliver()
            else:
                self._fail_all(error)
        self._tell()

    def _fail_all(self, error: Exception) -> None:
        """Give up; called with the lock."""
        self._is_over = True
        self._drop_windows()
        self._events.append(partial(self._on_failed, error))


def _prompt(tokenizer: Tokenizer, task: str, previous: tuple[int, ...], language: str) -> list[int]:
    return build_prompt(tokenizer, language, task, previous, True, max(len(previous), 1))


def add_text(text: str, final: Final) -> str:
    """Return a text and that of the next window: with one space between, where one goes."""
    if final.segment is None:
        return text
    return text + spaced(final.segment.text, final.language, not text)


def spaced(text: str, language: str, is_first: bool) -> str:
    """Return a window's text with a space before it, where one goes, as what comes next."""
    text = text.strip()
    return " " + text if text and not is_first and language not in UNSPACED else text
