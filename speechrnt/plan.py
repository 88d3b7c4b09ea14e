"""How an utterance is transcribed: what the user asks for, and what that means for a model."""

from __future__ import annotations

from dataclasses import dataclass, replace
from numbers import Integral, Real
from typing import Literal

from .batching import SearchOptions
from .decoding import DecodingResult
from .errors import OptionError
from .features import FRAMES_PER_SECOND, WINDOW_FRAMES, WINDOW_SECONDS
from .models import Model
from .segmentation import SegmentationOptions

__all__ = ["Plan", "UtteranceOptions", "make_plan"]

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
        if not isinstance(self.task, str):
            raise OptionError(f"task: must be text, not {self.task!r}")
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
            for token in self.suppress_tokens:
                if not isinstance(token, Integral):
                    raise OptionError(f"suppress_tokens: {token!r} is not a token id")
        context = self.audio_context
        if not (context is None or (isinstance(context, str) and context in ("full", "auto"))):
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
class Plan:
    """Options as they apply to the model at hand; see `make_plan`."""

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

    def is_repetitive(self, result: DecodingResult) -> bool:
        """Whether a transcript repeats itself."""
        threshold = self.options.compression_ratio_threshold
        return threshold is not None and result.compression_ratio > threshold

    def is_improbable(self, result: DecodingResult) -> bool:
        """Whether the model is not sure of a transcript."""
        threshold = self.options.log_prob_threshold
        return threshold is not None and result.avg_logprob < threshold

    def is_silent(self, result: DecodingResult) -> bool:
        """Whether nothing was said."""
        threshold = self.options.no_speech_threshold
        return (
            threshold is not None
            and result.no_speech_prob > threshold
            and self.is_improbable(result)
        )

    def looks_wrong(self, result: DecodingResult) -> bool:
        """Whether a transcript is worth a second attempt."""
        if self.is_silent(result):
            return False
        return result.is_cut_off or self.is_repetitive(result) or self.is_improbable(result)

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


def make_plan(model: Model, options: UtteranceOptions) -> Plan:
    """Check options against the model.

    Raises
    ------
    OptionError
        If the model does not know the language, the task or a token.
    """
    tokenizer = model.tokenizer
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
    if options.initial_prompt is not None and options.initial_prompt.strip():
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
