"""Which parts of a recording hold speech, and what that does to the times of its transcript.

The interface and the rules are those of faster-whisper 1.2.1, which has them from Silero's
reference implementation (https://github.com/snakers4/silero-vad, MIT): the same probabilities give
the same speech. The probabilities themselves come from `vad`, whose network is newer.
"""

from __future__ import annotations

import math
from bisect import bisect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import pairwise
from numbers import Real
from typing import Any, TypedDict

import numpy as np
from numpy.typing import NDArray

from .audio import SAMPLE_RATE
from .errors import OptionError
from .results import Word
from .vad import FRAME_SAMPLES, VoiceActivityDetector

__all__ = [
    "SpeechTimestampsMap",
    "TimeSpan",
    "VadOptions",
    "collect_chunks",
    "get_speech_timestamps",
    "speech_spans",
    "vad_options",
]

# A silence this long is a place to cut speech that gets too long.
_CUT_SILENCE_MS = 98

# How far below the threshold for speech that for silence is, if not told.
_HYSTERESIS = 0.15
_LEAST_NEG_THRESHOLD = 0.01

# Frames that the network is given at once.
_BLOCK_FRAMES = 256


class TimeSpan(TypedDict):
    """A stretch of a recording: its first sample, and the one after its last."""

    start: int
    end: int


@dataclass
class VadOptions:
    """What counts as speech.

    Attributes
    ----------
    threshold
        Probability from which a frame of 32 ms is speech.
    neg_threshold
        Probability below which a frame of speech is silence again. None: 0.15 below `threshold`,
        but at least 0.01.
    min_speech_duration_ms
        Speech that is not longer is dropped.
    max_speech_duration_s
        Speech that is longer is cut: at its last silence of 98 ms, or else where it is.
    min_silence_duration_ms
        How long the silence is that ends speech.
    speech_pad_ms
        How much of the silence before and after belongs to the speech.
    """

    threshold: float = 0.5
    neg_threshold: float | None = None
    min_speech_duration_ms: int = 0
    max_speech_duration_s: float = float("inf")
    min_silence_duration_ms: int = 2000
    speech_pad_ms: int = 400

    def check(self) -> None:
        """Raise `OptionError` if a value is out of range."""
        for option in fields(self):
            value = getattr(self, option.name)
            most = 1 if option.name.endswith("threshold") else math.inf
            if value is None and option.name == "neg_threshold":
                continue
            if (
                not isinstance(value, Real)
                or isinstance(value, bool)
                or not 0 <= float(value) <= most
            ):
                raise OptionError(
                    f"vad_parameters: {option.name} must be a number from 0"
                    f"{' to 1' if most == 1 else ''}, not {value!r}"
                )


def vad_options(parameters: Mapping[str, Any] | VadOptions | None, **defaults: Any) -> VadOptions:
    """Return checked options; `parameters` are not changed.

    Parameters
    ----------
    parameters
        The options, or some of them by name.
    defaults
        Those not given by name.

    Raises
    ------
    OptionError
        If one of them is unknown or out of range.
    """
    if isinstance(parameters, VadOptions):
        options = parameters
    elif parameters is None or isinstance(parameters, Mapping):
        try:
            options = VadOptions(**{**defaults, **(parameters or {})})
        except TypeError as error:
            known = ", ".join(option.name for option in fields(VadOptions))
            raise OptionError(f"vad_parameters: {error}; the options are {known}") from error
    else:
        # faster_whisper.vad.VadOptions, in a program that has not changed all of its imports.
        try:
            options = VadOptions(*(getattr(parameters, each.name) for each in fields(VadOptions)))
        except AttributeError as error:
            raise OptionError(
                f"vad_parameters: must be VadOptions or a dict, not {parameters!r}"
            ) from error
    options.check()
    return options


def get_speech_timestamps(
    audio: NDArray[np.float32],
    vad_options: VadOptions | None = None,
    sampling_rate: int = SAMPLE_RATE,
    **kwargs: Any,
) -> list[TimeSpan]:
    """Find the speech in a recording.

    Parameters
    ----------
    audio : (n,) ndarray of float32
        16 kHz mono.
    vad_options
        What counts as speech; without them, those in `kwargs` by name.
    sampling_rate
        16000.

    Returns
    -------
    list of dict
        ``start`` and ``end`` of each stretch of speech, in samples.

    Raises
    ------
    OptionError
        If an option is unknown or out of range, or the rate is another one.
    """
    if sampling_rate != SAMPLE_RATE:
        raise OptionError(f"sampling_rate: must be {SAMPLE_RATE}, not {sampling_rate!r}")
    options = _checked_options(vad_options, kwargs)
    return speech_spans(_probabilities(audio), len(audio), options)


def _checked_options(options: VadOptions | None, named: Mapping[str, Any]) -> VadOptions:
    return vad_options(named if options is None else options)


def _probabilities(samples: NDArray[np.float32]) -> Iterator[float]:
    """Yield the probability of speech in each frame; the last one is filled up, or all silence."""
    detector = VoiceActivityDetector()
    block = _BLOCK_FRAMES * FRAME_SAMPLES
    whole = len(samples) // FRAME_SAMPLES * FRAME_SAMPLES
    for start in range(0, whole, block):
        yield from detector.probabilities(samples[start : min(start + block, whole)])
    last = np.zeros(FRAME_SAMPLES, dtype=np.float32)
    last[: len(samples) - whole] = samples[whole:]
    yield from detector.probabilities(last)


def speech_spans(
    probabilities: Iterable[float], n_samples: int, options: VadOptions
) -> list[TimeSpan]:
    """Return the stretches of speech that the probabilities of a recording's frames mean.

    Parameters
    ----------
    probabilities
        Of each frame of `vad.FRAME_SAMPLES` samples.
    n_samples
        Length of the recording.
    options
        What counts as speech.
    """
    pad = SAMPLE_RATE * options.speech_pad_ms / 1000
    least_speech = SAMPLE_RATE * options.min_speech_duration_ms / 1000
    most_speech = SAMPLE_RATE * options.max_speech_duration_s - FRAME_SAMPLES - 2 * pad
    least_silence = SAMPLE_RATE * options.min_silence_duration_ms / 1000
    cut_silence = SAMPLE_RATE * _CUT_SILENCE_MS / 1000
    # Compared in single precision, in which the probabilities come.
    speech_from = float(np.float32(options.threshold))
    if options.neg_threshold is None:
        below = max(options.threshold - _HYSTERESIS, _LEAST_NEG_THRESHOLD)
    else:
        below = options.neg_threshold
    silence_below = float(np.float32(below))

    spans: list[TimeSpan] = []
    start: int | None = None
    silence_start = 0
    # Where the last silence began that was long enough to cut at, and where speech went on.
    cut_end = cut_start = 0
    for index, probability in enumerate(probabilities):
        position = FRAME_SAMPLES * index
        is_speech = probability >= speech_from
        if is_speech and silence_start:
            silence_start = 0
            if cut_start < cut_end:
                cut_start = position
        if start is None:
            if is_speech:
                start = position
            continue
        if position - start > most_speech:
            spans.append({"start": start, "end": cut_end or position})
            start = cut_start if cut_end and cut_start >= cut_end else None
            cut_end = cut_start = silence_start = 0
            if start is None:
                continue
        if probability < silence_below:
            silence_start = silence_start or position
            if position - silence_start > cut_silence:
                cut_end = silence_start
            if position - silence_start >= least_silence:
                if silence_start - start > least_speech:
                    spans.append({"start": start, "end": silence_start})
                start = None
                cut_end = cut_start = silence_start = 0
    if start is not None and n_samples - start > least_speech:
        spans.append({"start": start, "end": n_samples})
    _pad(spans, pad, n_samples)
    return spans


def _pad(spans: list[TimeSpan], pad: float, n_samples: int) -> None:
    """Extend the spans into the silence around them; a short silence is shared by halves."""
    if not spans:
        return
    spans[0]["start"] = int(max(0, spans[0]["start"] - pad))
    for span, following in pairwise(spans):
        silence = following["start"] - span["end"]
        if silence < 2 * pad:
            span["end"] += silence // 2
            following["start"] = max(0, following["start"] - silence // 2)
        else:
            span["end"] = int(min(n_samples, span["end"] + pad))
            following["start"] = int(max(0, following["start"] - pad))
    spans[-1]["end"] = int(min(n_samples, spans[-1]["end"] + pad))


def collect_chunks(
    audio: NDArray[np.float32],
    chunks: Sequence[TimeSpan],
    sampling_rate: int = SAMPLE_RATE,
    max_duration: float = float("inf"),
) -> tuple[list[NDArray[np.float32]], list[dict[str, Any]]]:
    """Join stretches of speech to chunks of up to `max_duration` seconds.

    Returns
    -------
    chunks : list of (n,) ndarray of float32
        One that is empty, if there is no speech.
    metadata : list of dict
        ``offset`` in the joined speech and ``duration``, in seconds, and the ``segments`` (the
        stretches, as dicts) of each chunk.
    """
    if not chunks:
        empty = np.array([], dtype=np.float32)
        return [empty], [{"offset": 0, "duration": 0, "segments": []}]
    groups: list[list[TimeSpan]] = [[]]
    length = 0
    for chunk in chunks:
        n_samples = chunk["end"] - chunk["start"]
        if length + n_samples > max_duration * sampling_rate:
            groups.append([])
            length = 0
        groups[-1].append(chunk)
        length += n_samples
    joined, metadata = [], []
    offset = 0
    for group in groups:
        pieces = [audio[chunk["start"] : chunk["end"]] for chunk in group]
        length = sum(chunk["end"] - chunk["start"] for chunk in group)
        joined.append(np.concatenate(pieces) if pieces else np.array([], dtype=np.float32))
        metadata.append(
            {
                "offset": offset / sampling_rate,
                "duration": length / sampling_rate,
                "segments": group,
            }
        )
        offset += length
    return joined, metadata


class SpeechTimestampsMap:
    """Times in a recording, from times in what is left of it when only the speech is kept.

    Parameters
    ----------
    chunks
        The stretches of speech, in samples.
    sampling_rate
        Samples per second.
    time_precision
        Decimals to round to.
    """

    def __init__(
        self,
        chunks: Sequence[TimeSpan],
        sampling_rate: int = SAMPLE_RATE,
        time_precision: int = 2,
    ) -> None:
        self.sampling_rate = sampling_rate
        self.time_precision = time_precision
        self.chunk_end_sample: list[int] = []
        self.total_silence_before: list[float] = []
        previous_end = silent = 0
        for chunk in chunks:
            silent += chunk["start"] - previous_end
            previous_end = chunk["end"]
            self.chunk_end_sample.append(chunk["end"] - silent)
            self.total_silence_before.append(silent / sampling_rate)

    def get_original_time(
        self, time: float, chunk_index: int | None = None, is_end: bool = False
    ) -> float:
        """Return a time in the recording, in seconds.

        Parameters
        ----------
        time
            Seconds from the start of the kept speech.
        chunk_index
            The stretch of speech that it belongs to, if known.
        is_end
            Whether something ends there: then it belongs to the stretch that ends there, too.
        """
        if chunk_index is None:
            chunk_index = self.get_chunk_index(time, is_end)
        return round(self.total_silence_before[chunk_index] + time, self.time_precision)

    def get_chunk_index(self, time: float, is_end: bool = False) -> int:
        """Return which stretch of speech a time in the kept speech belongs to."""
        sample = int(time * self.sampling_rate)
        if is_end and sample in self.chunk_end_sample:
            return self.chunk_end_sample.index(sample)
        return min(bisect(self.chunk_end_sample, sample), len(self.chunk_end_sample) - 1)

    def restore(
        self, start: float, end: float, words: Sequence[Word] | None
    ) -> tuple[float, float]:
        """Return a segment's times in the recording; those of its words are changed in place."""
        if not words:
            return self.get_original_time(start), self.get_original_time(end, is_end=True)
        for word in words:
            # Both ends of a word belong to one stretch of speech.
            index = self.get_chunk_index((word.start + word.end) / 2)
            word.start = self.get_original_time(word.start, index)
            word.end = self.get_original_time(word.end, index)
        return words[0].start, words[-1].end
