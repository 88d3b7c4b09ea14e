"""What a transcription is asked for and what comes out of it, as faster-whisper names it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from numbers import Integral, Real
from typing import Any
from warnings import warn

import numpy as np

from .errors import OptionError

__all__ = ["Segment", "TranscriptionInfo", "TranscriptionOptions", "Word"]


@dataclass
class Word:
    """A word and when it was said, in seconds."""

    start: float
    end: float
    word: str
    probability: float

    def _asdict(self) -> dict[str, Any]:
        return _deprecated_asdict(self)


@dataclass
class Segment:
    """A stretch of transcript.

    Attributes
    ----------
    id
        Number of the segment, from 1.
    seek
        Start of the window it was decoded in, in mel frames (100 per second).
    start, end
        Seconds from the start of the audio.
    text
        The text, with its leading space.
    tokens
        The ids, with timestamps.
    avg_logprob, compression_ratio, no_speech_prob, temperature
        Of the window; see `DecodingResult`.
    words
        The words and their times; None where they were not asked for.
    """

    id: int
    seek: int
    start: float
    end: float
    text: str
    tokens: list[int]
    avg_logprob: float
    compression_ratio: float
    no_speech_prob: float
    words: list[Word] | None
    temperature: float | None

    def _asdict(self) -> dict[str, Any]:
        return _deprecated_asdict(self)


def _deprecated_asdict(result: Segment | Word) -> dict[str, Any]:
    """Return the fields by name, with faster-whisper's warning."""
    name = type(result).__name__
    warn(
        f"{name}._asdict() is deprecated, use dataclasses.asdict instead",
        DeprecationWarning,
        stacklevel=3,
    )
    return asdict(result)


@dataclass(frozen=True)
class TranscriptionOptions:
    """The options a transcription runs with; see `WhisperModel.transcribe`.

    Raises
    ------
    OptionError
        If a value is out of range.
    """

    beam_size: int
    best_of: int
    patience: float
    length_penalty: float
    repetition_penalty: float
    no_repeat_ngram_size: int
    log_prob_threshold: float | None
    no_speech_threshold: float | None
    compression_ratio_threshold: float | None
    condition_on_previous_text: bool
    prompt_reset_on_temperature: float
    temperatures: Sequence[float]
    initial_prompt: str | Sequence[int] | None
    prefix: str | None
    suppress_blank: bool
    suppress_tokens: Sequence[int]
    without_timestamps: bool
    max_initial_timestamp: float
    word_timestamps: bool
    prepend_punctuations: str
    append_punctuations: str
    multilingual: bool
    max_new_tokens: int | None
    clip_timestamps: str | Sequence[Any] | None
    hallucination_silence_threshold: float | None
    hotwords: str | None

    def __post_init__(self) -> None:
        for name in _FLAGS:
            value = getattr(self, name)
            if not isinstance(value, (bool, np.bool_)):
                raise OptionError(f"{name}: must be True or False, not {value!r}")
        for name, (kind, least, most) in _NUMBERS.items():
            _check_number(name, getattr(self, name), kind, least, most)
        for name in _TEXTS:
            value = getattr(self, name)
            if not isinstance(value, str) and (value is not None or name in _PUNCTUATION):
                raise OptionError(f"{name}: must be text, not {value!r}")
        if self.max_new_tokens is not None:
            _check_number("max_new_tokens", self.max_new_tokens, Integral, 1, 448)
        for name in _THRESHOLDS:
            if getattr(self, name) is not None:
                _check_number(name, getattr(self, name), Real, -math.inf, math.inf)
        if round(self.beam_size * self.patience) < 1:
            raise OptionError(f"patience: {self.patience!r} of the beam is less than one candidate")
        if not self.temperatures:
            raise OptionError("temperature: give at least one")
        for temperature in self.temperatures:
            _check_number("temperature", temperature, Real, 0, 100)
            if 0 < temperature < _LEAST_TEMPERATURE:
                raise OptionError(
                    f"temperature: must be 0 or at least {_LEAST_TEMPERATURE}, not {temperature!r}"
                )


_FLAGS = (
    "condition_on_previous_text",
    "suppress_blank",
    "without_timestamps",
    "word_timestamps",
    "multilingual",
)

_PUNCTUATION = ("prepend_punctuations", "append_punctuations")
_TEXTS = ("prefix", "hotwords", *_PUNCTUATION)

# The upper bounds are far beyond what makes sense, and keep CTranslate2's arithmetic in range.
_NUMBERS = {
    "beam_size": (Integral, 1, 1000),
    "best_of": (Integral, 1, 1000),
    "no_repeat_ngram_size": (Integral, 0, 448),
    "patience": (Real, 0, 100),
    "length_penalty": (Real, -100, 100),
    "repetition_penalty": (Real, 0.01, 100),
    "max_initial_timestamp": (Real, 0, 30),
    "prompt_reset_on_temperature": (Real, -math.inf, math.inf),
}

_THRESHOLDS = (
    "log_prob_threshold",
    "no_speech_threshold",
    "compression_ratio_threshold",
    "hallucination_silence_threshold",
)

# Below, the scaled scores overflow.
_LEAST_TEMPERATURE = 0.001


def _check_number(name: str, value: object, kind: type, least: float, most: float) -> None:
    # NaN compares false.
    if not isinstance(value, kind) or isinstance(value, bool) or not least <= value <= most:  # type: ignore[operator]
        what = "an integer" if kind is Integral else "a number"
        bounds = "" if math.isinf(most) else f" from {least} to {most}"
        raise OptionError(f"{name}: must be {what}{bounds}, not {value!r}")


@dataclass
class TranscriptionInfo:
    """What is known about a transcription before its first segment.

    Attributes
    ----------
    language, language_probability
        The language given (probability 1) or detected.
    duration, duration_after_vad
        Seconds of audio, before and after voice activity detection. Of a file that is decoded
        window by window, what its header states, until it has been read to the end.
    all_language_probs
        Code and probability of every language, best first; None if nothing was detected.
    transcription_options
        The options in effect.
    vad_options
        The `VadOptions` in effect; None without voice activity detection.
    warnings
        What was wrong with the input without making it unusable: a truncated file, an option that
        the model has no use for. A file that is decoded window by window may show more at its end.
    """

    language: str
    language_probability: float
    duration: float
    duration_after_vad: float
    all_language_probs: list[tuple[str, float]] | None
    transcription_options: TranscriptionOptions
    vad_options: Any
    warnings: tuple[str, ...] = ()
