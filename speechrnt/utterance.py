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
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from numbers import Integral, Real
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from . import _mel, _mel_task
from ._sched import Priority, Scheduler
from .audio import SAMPLE_RATE
from .batching import Dispatcher, Executor, Job, JobResult, SearchOptions
from .decoding import DecodingResult, length_limit, parse_result
from .errors import OptionError, SchedulerClosed, SpeechRNTError
from .features import FRAMES_PER_SECOND, HOP_LENGTH, WINDOW_FRAMES, WINDOW_SECONDS
from .latency import StageTimings
from .models import Model
from .pools import AudioBufferPool
from .results import Segment
from .segmentation import SegmentationOptions, WindowCut

__all__ = [
    "Final",
    "Utterance",
    "UtteranceOptions",
    "UtterancePipeline",
    "UtteranceStatistics",
]

logger = logging.getLogger("speechrnt")

# Contexts come in few lengths, so that windows of different lengths share batches; the steps keep
# the silence added below a third of the window.
_CONTEXT_BUCKETS = tuple(
    seconds * FRAMES_PER_SECOND for seconds in (1, 2, 3, 4, 5, 6, 8, 10, 12, 15, 20, 25, 30)
)

# Full contexts share batches only if their windows may have about as many tokens.
_FULL_CONTEXT_BUCKETS_S = (5, 10, 20, 30)

# Prompts, too, so that <|startoftranscript|> stands at few different places.
_PROMPT_LENGTHS = (0, 32, 64, 128, 223)

# Twice what the fastest speech in the densest script needs, and a loop ends soon.
_TOKENS_PER_S = 20
_LEAST_TOKENS = 32
_MOST_TOKENS = 224

# A language is settled by a window of this length in which it is this probable.
_LANGUAGE_SETTLES_S = 2.0
_LANGUAGE_SETTLES_AT = 0.5

# A window whose transcript looks wrong is searched again: wider, against repetition, not prompted.
_RETRY_BEAM_SIZE = 5
_RETRY_REPETITION_PENALTY = 1.15
_RETRY_NO_REPEAT_NGRAM_SIZE = 4

# What a model that declares nothing is given at least where the context is reduced; see
# `WhisperModel.transcribe`.
_UNDECLARED_FLOOR_FRAMES = 10 * FRAMES_PER_SECOND
_UNDECLARED_MARGIN_FRAMES = 2 * FRAMES_PER_SECOND

# The longest live window: one that fills the encoder's 30 s makes Whisper invent an end.
_LONGEST_WINDOW_S = 28.0

_LOG10_SILENCE = -10.0
_UNSPACED_LANGUAGES = frozenset({"zh", "ja", "yue", "th", "lo", "my", "km"})


@dataclass(frozen=True)
class UtteranceOptions:
    """How an utterance is to be transcribed.

    Attributes
    ----------
    language
        Code such as ``"en"``. None: detected in the first windows, until one of at least 2 s is
        sure.
    task
        ``"transcribe"``, or ``"translate"`` to English.
    initial_prompt
        Text before the first word, for spelling and style. The model's limit on prompts holds.
    beam_size, patience, length_penalty, repetition_penalty, no_repeat_ngram_size, \
    suppress_blank, suppress_tokens
        See `WhisperModel.transcribe`.
    compression_ratio_threshold, log_prob_threshold, no_speech_threshold
        A transcript that fails the first two is searched for once more, wider and against
        repetition; one that fails all three is silence. None: no check.
    condition_on_previous_text
        Prompt a window that was cut amid speech with the text before the cut.
    vad
        Decode speech only, and cut at pauses. Without it all audio is decoded, cut where windows
        would get too long.
    vad_threshold, endpoint_s, min_speech_s
        Probability from which 32 ms are speech; silence in seconds that ends a window; shorter
        speech than this is a noise.
    audio_context
        ``"full"``: the encoder always gets 30 s. ``"auto"``: the window, a margin, and what fills
        it up to one of few lengths. None: ``"auto"`` for models that declare variable context.

    Raises
    ------
    OptionError
        If a value is out of range.
    """

    language: str | None = None
    task: str = "transcribe"
    initial_prompt: str | None = None
    beam_size: int = 5
    patience: float = 1.0
    length_penalty: float = 1.0
    repetition_penalty: float = 1.0
    no_repeat_ngram_size: int = 0
    suppress_blank: bool = True
    suppress_tokens: tuple[int, ...] | None = (-1,)
    compression_ratio_threshold: float | None = 2.4
    log_prob_threshold: float | None = -1.0
    no_speech_threshold: float | None = 0.6
    condition_on_previous_text: bool = True
    vad: bool = True
    vad_threshold: float = 0.5
    endpoint_s: float = 0.5
    min_speech_s: float = 0.25
    audio_context: Literal["full", "auto"] | None = None

    def __post_init__(self) -> None:
        for name in ("language", "initial_prompt"):
            if not isinstance(getattr(self, name), (str, type(None))):
                raise OptionError(f"{name}: must be text or None, not {getattr(self, name)!r}")
        for name in ("suppress_blank", "condition_on_previous_text", "vad"):
            if not isinstance(getattr(self, name), bool):
                raise OptionError(f"{name}: must be True or False, not {getattr(self, name)!r}")
        for name, (kind, least, most) in _RANGES.items():
            value = getattr(self, name)
            if value is None and name.endswith("_threshold") and name != "vad_threshold":
                continue
            # NaN compares false.
            good = isinstance(value, kind) and not isinstance(value, bool)
            if not good or not least <= value <= most:
                what = "a whole number" if kind is Integral else "a number"
                raise OptionError(f"{name}: must be {what} from {least} to {most}, not {value!r}")
        if round(self.beam_size * self.patience) < 1:
            raise OptionError(f"patience: {self.patience!r} of the beam is less than one candidate")
        if self.suppress_tokens is not None:
            if isinstance(self.suppress_tokens, (str, bytes)):
                raise OptionError(f"suppress_tokens: must be ids, not {self.suppress_tokens!r}")
            try:
                object.__setattr__(self, "suppress_tokens", tuple(self.suppress_tokens))
            except TypeError as error:
                raise OptionError(
                    f"suppress_tokens: must be ids or None, not {self.suppress_tokens!r}"
                ) from error
        if self.audio_context not in (None, "full", "auto"):
            raise OptionError(
                f"audio_context: must be 'full', 'auto' or None, not {self.audio_context!r}"
            )


_RANGES: dict[str, tuple[type, float, float]] = {
    "beam_size": (Integral, 1, 100),
    "patience": (Real, 0, 100),
    "length_penalty": (Real, -100, 100),
    "repetition_penalty": (Real, 0.01, 100),
    "no_repeat_ngram_size": (Integral, 0, 448),
    "compression_ratio_threshold": (Real, -1e9, 1e9),
    "log_prob_threshold": (Real, -1e9, 1e9),
    "no_speech_threshold": (Real, -1e9, 1e9),
    "vad_threshold": (Real, 0.2, 0.95),
    "endpoint_s": (Real, 0.1, 10),
    "min_speech_s": (Real, 0, 5),
}


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
class UtteranceStatistics:
    """What happened to the windows of all utterances so far.

    Attributes
    ----------
    windows, silent, retried, cut_off : int
        Windows decoded; in which there was nothing but silence; that were searched a second time;
        and whose text reached the most tokens allowed for its length even so.
    """

    windows: int
    silent: int
    retried: int
    cut_off: int


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
    windows_in_flight
        Windows of one utterance that may wait for the model.
    """

    def __init__(
        self,
        model: Model,
        dispatcher: Dispatcher,
        executor: Executor,
        scheduler: Scheduler | None,
        buffers: AudioBufferPool,
        windows_in_flight: int,
    ) -> None:
        self.model = model
        self.dispatcher = dispatcher
        self.executor = executor
        self.scheduler = scheduler
        self.buffers = buffers
        self.windows_in_flight = windows_in_flight
        self._lock = threading.Lock()
        self._windows = self._silent = self._retried = self._cut_off = 0

    def statistics(self) -> UtteranceStatistics:
        """Return what was counted so far."""
        with self._lock:
            return UtteranceStatistics(self._windows, self._silent, self._retried, self._cut_off)

    def count_window(self, silent: bool, retried: bool, cut_off: bool) -> None:
        """Count a window that is done."""
        with self._lock:
            self._windows += 1
            self._silent += silent
            self._retried += retried
            self._cut_off += cut_off

    def plan(self, options: UtteranceOptions) -> Plan:
        """Check options against the model.

        Raises
        ------
        OptionError
            If the model does not know the language, the task or a token.
        """
        model, tokenizer = self.model, self.model.tokenizer
        warnings = []
        language = options.language
        if not model.is_multilingual:
            if language not in (None, "en"):
                warnings.append(f"language {language!r} has no effect: the model is English-only")
            if options.task == "translate":
                warnings.append("task 'translate' has no effect: the model is English-only")
            language = "en"
        tokenizer.sot_sequence(language or tokenizer.languages[0], options.task)
        capabilities = model.capabilities
        most = capabilities.max_prompt_tokens if tokenizer.sot_prev is not None else 0
        prompt: list[int] = []
        if options.initial_prompt is not None:
            prompt = tokenizer.encode(" " + options.initial_prompt.strip())
            if len(prompt) > most:
                warnings.append(f"initial_prompt: only its last {most} tokens are used")
                prompt = prompt[len(prompt) - most :]
        context = options.audio_context
        if context is None:
            context = "auto" if capabilities.variable_context else "full"
        return Plan(
            options=options,
            language=language,
            search=SearchOptions(
                beam_size=int(options.beam_size),
                patience=float(options.patience),
                length_penalty=float(options.length_penalty),
                repetition_penalty=float(options.repetition_penalty),
                no_repeat_ngram_size=int(options.no_repeat_ngram_size),
                suppress_blank=options.suppress_blank,
                suppress_tokens=tokenizer.suppressed_tokens(options.suppress_tokens),
            ),
            initial_prompt=tuple(prompt),
            max_prompt_tokens=most,
            reduced_context=context == "auto",
            declared_context=capabilities.variable_context,
            margin_frames=round(capabilities.margin_s * FRAMES_PER_SECOND)
            if capabilities.variable_context
            else _UNDECLARED_MARGIN_FRAMES,
            segmentation=SegmentationOptions(
                threshold=float(options.vad_threshold),
                endpoint_s=float(options.endpoint_s) if options.vad else None,
                min_speech_s=float(options.min_speech_s) if options.vad else 0.0,
                max_window_s=min(capabilities.max_window_s, _LONGEST_WINDOW_S),
            ),
            warnings=tuple(warnings),
        )


@dataclass(frozen=True)
class Plan:
    """Options as they apply to the model at hand; see `UtterancePipeline.plan`."""

    options: UtteranceOptions
    language: str | None
    search: SearchOptions
    initial_prompt: tuple[int, ...]
    max_prompt_tokens: int
    reduced_context: bool
    declared_context: bool
    margin_frames: int
    segmentation: SegmentationOptions
    warnings: tuple[str, ...]

    @property
    def needs_language(self) -> bool:
        """Whether the language is to be detected."""
        return self.language is None

    @property
    def contexts(self) -> tuple[int, ...]:
        """All contexts that windows can have, in mel frames."""
        if not self.reduced_context:
            return (WINDOW_FRAMES,)
        longest = self.context(round(self.segmentation.max_window_s * FRAMES_PER_SECOND))
        return tuple(sorted({self.context(size) for size in range(1, longest)}))

    def context(self, frames: int) -> int:
        """Return the encoder's context, in mel frames, for a window of so many."""
        if not self.reduced_context:
            return WINDOW_FRAMES
        wanted = frames + self.margin_frames
        if not self.declared_context:
            wanted = max(wanted, _UNDECLARED_FLOOR_FRAMES)
        return next((size for size in _CONTEXT_BUCKETS if size >= wanted), WINDOW_FRAMES)

    def most_tokens(self, frames: int, context: int) -> int:
        """Return after how many tokens a transcript of such a window is stopped."""
        seconds = context / FRAMES_PER_SECOND
        if context == WINDOW_FRAMES:
            seconds = next(
                (s for s in _FULL_CONTEXT_BUCKETS_S if s * FRAMES_PER_SECOND >= frames),
                WINDOW_SECONDS,
            )
        return min(_MOST_TOKENS, _LEAST_TOKENS + round(_TOKENS_PER_S * seconds))

    def prompt(self, previous: list[int]) -> tuple[int, ...]:
        """Return the tokens to prompt with, given those of the text before."""
        room = self.max_prompt_tokens - len(self.initial_prompt)
        lengths = [n for n in (*_PROMPT_LENGTHS, room) if n <= min(len(previous), room)]
        length = max(lengths, default=0)
        return (*self.initial_prompt, *previous[len(previous) - length :])

    def retry(self) -> Plan:
        """Return how to search for a transcript the second time."""
        search = replace(
            self.search,
            beam_size=max(self.search.beam_size, _RETRY_BEAM_SIZE),
            repetition_penalty=max(self.search.repetition_penalty, _RETRY_REPETITION_PENALTY),
            no_repeat_ngram_size=self.search.no_repeat_ngram_size or _RETRY_NO_REPEAT_NGRAM_SIZE,
        )
        # Stock weights may fail because the context was short.
        reduced = self.reduced_context and self.declared_context
        return replace(self, search=search, reduced_context=reduced)


class _Features:
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
class _Window:
    """A window between its cut and its final."""

    cut: WindowCut
    features: _Features | None
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
        self._retry_plan = plan.retry()
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
        self._is_finished = False
        self._is_over = False  # settled, failed or cancelled
        self._language = plan.language
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

    def add(self, cut: WindowCut, samples: NDArray[np.float32]) -> None:
        """Take the next window. Its samples must not change until it is final."""
        if len(samples) < HOP_LENGTH:
            return  # less than a frame
        pipeline = self._pipeline
        features = _Features(len(samples), pipeline.model.n_mels, pipeline.buffers)
        window = _Window(cut, features)
        with self._lock:
            if self._is_over:
                window.release()
                return
            self._windows.append(window)
            out = features.log10_mel  # which stays valid though the window be cancelled
        if pipeline.scheduler is not None:
            done = partial(self._take_features, window)
            try:
                _mel_task.spawn(pipeline.scheduler, self._priority, samples, out, done)
                return
            except SpeechRNTError as error:  # it takes nothing at the moment, or any more
                logger.debug("features are computed here: %s", error)
        started = time.perf_counter()
        maximum = _mel_task.compute(samples, out)
        self._take_features(window, maximum, time.perf_counter() - started)

    def _take_features(self, window: _Window, maximum: float | None, seconds: float) -> None:
        """Note that the features of a window are there."""
        if maximum is None:
            self._fail(window, SchedulerClosed("the scheduler was shut down"))
            return
        with self._lock:
            if not self._is_over:
                assert window.features is not None
                window.features.maximum = maximum
                self._seconds["mel"] += seconds
                self._submit()
        self._tell()

    def finish(self) -> None:
        """Add no more."""
        with self._lock:
            self._is_finished = True
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
        for window in self._windows:
            # A worker may be about to read the features of a job that cannot be taken back; its
            # result comes to `_done` or `_fail`, which release them.
            if window.job is None or self._pipeline.dispatcher.cancel(window.job):
                window.release()
        self._windows.clear()

    def _submit(self) -> None:
        """Hand over the windows whose prompts are known; called with the lock."""
        for position, window in enumerate(self._windows):
            if window.job is not None:
                continue
            assert window.features is not None
            if window.features.maximum is None:
                continue
            is_first = position == 0
            if self._language is None and not is_first:
                break
            if self._depends_on_last(window) and not is_first:
                break
            try:
                self._start(window, self._plan)
            except SpeechRNTError as error:
                window.job = None
                self._fail_all(error)
                return

    def _depends_on_last(self, window: _Window) -> bool:
        return (
            window.cut.continues
            and self._plan.options.condition_on_previous_text
            and self._plan.max_prompt_tokens > len(self._plan.initial_prompt)
        )

    def _start(self, window: _Window, plan: Plan) -> None:
        """Give a window to the model."""
        assert window.features is not None
        is_retry = window.results is not None
        frames = window.features.frames
        context = plan.context(frames)
        previous: tuple[int, ...] = self._plan.initial_prompt
        if is_retry:
            previous = ()
        elif self._depends_on_last(window):
            previous = plan.prompt(self._previous_tokens)
        tokenizer = self._pipeline.model.tokenizer
        language = self._language
        last = window.job
        if is_retry and language is None:
            assert window.final is not None
            language = window.final.language
        some_language = language or tokenizer.languages[0]
        # The tokens of the prompt: text before and its mark, task, no timestamps.
        prompt_length = len(previous) + bool(previous) + 1
        prompt_length += len(tokenizer.sot_sequence(some_language, plan.options.task))
        job = Job(
            frames=context,
            write_features=window.features.write,
            language=language,
            task=plan.options.task,
            previous_tokens=previous,
            max_length=length_limit(plan.most_tokens(frames, context), prompt_length),
            search=plan.search,
            done=lambda result: self._done(window, result),
            failed=lambda error: self._fail(window, error),
            priority=self._priority,
            deadline=self._deadline,
            client=self._client,
            lane=int(is_retry),
        )
        if is_retry and last is not None and last.frames == context:
            job.encoding = last.encoding
        self._pipeline.dispatcher.submit(job)
        window.job = job

    def _done(self, window: _Window, result: JobResult) -> None:
        """Take what the model says of a window."""
        started = time.perf_counter()
        assert window.job is not None
        job = window.job
        parsed = parse_result(
            result.output,
            self._pipeline.model.tokenizer,
            result.prompt_length,
            0.0,
            job.search.length_penalty,
            job.max_length,
        )
        with self._lock:
            if self._is_over:
                window.release()
                return
            self._seconds["queue"] += result.queue_s
            self._seconds["encode"] += result.encode_s
            self._seconds["decode"] += result.decode_s
            if result.languages is None:
                language, probability = str(job.language), 1.0
                if window.final is not None:  # of the attempt before
                    language, probability = window.final.language, window.final.language_probability
            else:
                language, probability = result.languages[0]
            is_first = window.results is None
            window.results = [*(window.results or ()), parsed]
            window.final = Final(None, language, probability, window.cut)
            if is_first and self._looks_wrong(parsed):
                job.encoding = result.encoding
                try:
                    self._start(window, self._retry_plan)
                    return
                except SpeechRNTError as error:
                    logger.debug("no second attempt: %s", error)
            self._make_final(window)
            self._seconds["text"] += time.perf_counter() - started
            self.text_at = time.perf_counter()
            self._deliver()
        self._tell()

    def _make_final(self, window: _Window) -> None:
        """Choose a window's transcript; called with the lock."""
        assert window.results is not None
        assert window.final is not None
        window.release()
        window.job = None
        best = max(
            window.results,
            key=lambda r: (not self._is_repetitive(r), not r.is_cut_off, r.avg_logprob),
        )
        silent = not best.text or self._is_silent(best)
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
                self._language is None
                and final.cut.end - final.cut.start >= _LANGUAGE_SETTLES_S * SAMPLE_RATE
                and final.language_probability >= _LANGUAGE_SETTLES_AT
            ):
                self._language = final.language
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
            if self._is_over:
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

    def _is_repetitive(self, result: DecodingResult) -> bool:
        threshold = self._plan.options.compression_ratio_threshold
        return threshold is not None and result.compression_ratio > threshold

    def _is_improbable(self, result: DecodingResult) -> bool:
        threshold = self._plan.options.log_prob_threshold
        return threshold is not None and result.avg_logprob < threshold

    def _is_silent(self, result: DecodingResult) -> bool:
        threshold = self._plan.options.no_speech_threshold
        return (
            threshold is not None
            and result.no_speech_prob > threshold
            and self._is_improbable(result)
        )

    def _looks_wrong(self, result: DecodingResult) -> bool:
        if self._is_silent(result):
            return False
        return result.is_cut_off or self._is_repetitive(result) or self._is_improbable(result)


def join_texts(finals: Iterator[Any] | list[Final]) -> str:
    """Return the text of consecutive windows: the pieces with one space between, where one goes."""
    text = ""
    for final in finals:
        if final.segment is None:
            continue
        piece = final.segment.text.strip()
        if text and piece and final.language not in _UNSPACED_LANGUAGES:
            text += " "
        text += piece
    return text
