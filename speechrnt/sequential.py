"""The sequential algorithm for recordings of any length: seek, decode, fall back, slice.

OpenAI's algorithm (openai/whisper, transcribe.py) with the rules of faster-whisper 1.2.1.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import replace

import ctranslate2
from tqdm import tqdm

from .decoding import (
    MAX_LENGTH,
    MAX_PROMPT_TOKENS,
    DecodingResult,
    build_prompt,
    parse_result,
    search_arguments,
    split_by_timestamps,
)
from .features import FRAMES_PER_SECOND, Window, Windows
from .models import Model
from .results import Segment, TranscriptionOptions
from .tokenizer import TIME_PRECISION

__all__ = ["SequentialDecoder"]

logger = logging.getLogger("speechrnt")

# What a transcript must fulfil where a model that declares nothing was given a reduced context;
# otherwise the window is decoded again in full.
_REDUCED_MAX_COMPRESSION_RATIO = 2.4
_REDUCED_MIN_LOGPROB = -1.0


class SequentialDecoder:
    """One recording on its way through the model, window by window.

    Used by one thread, once: `detect_language` if need be, then `segments`.

    Parameters
    ----------
    model
        What decodes.
    windows
        The recording.
    options
        How to decode it.
    task
        ``"transcribe"`` or ``"translate"``.
    reduced_context
        Whether `windows` give the encoder less than its full context.
    """

    def __init__(
        self,
        model: Model,
        windows: Windows,
        options: TranscriptionOptions,
        task: str,
        reduced_context: bool,
    ) -> None:
        self._model = model
        self._windows = windows
        self._options = options
        self._task = task
        self._reduced_context = reduced_context
        capabilities = model.capabilities
        self._retry_in_full = reduced_context and not capabilities.variable_context
        self._max_prompt_tokens = (
            capabilities.max_prompt_tokens if reduced_context else MAX_PROMPT_TOKENS
        )
        self._first_encoding: ctranslate2.StorageView | None = None

    def detect_language(self) -> list[tuple[str, float]]:
        """Return code and probability of every language in the first window, best first."""
        # Kept for the decoding of the same window: the encoder is most of the work.
        self._first_encoding = self._model.encode(self._windows.at(0).features)
        return self._model.detect_language(self._first_encoding)

    def segments(self, language: str, log_progress: bool) -> Iterator[Segment]:
        """Decode window after window; each starts where the transcript of the last one ends."""
        options, windows, tokenizer = self._options, self._windows, self._model.tokenizer
        transcript = self._initial_prompt()
        prompt_start = 0
        segment_id = 0
        seek = 0
        content_s = windows.content_frames / FRAMES_PER_SECOND
        with tqdm(total=content_s, unit="s", disable=not log_progress) as progress:
            while seek < windows.content_frames:
                window = windows.at(seek)
                prompt = build_prompt(
                    tokenizer,
                    language,
                    self._task,
                    transcript[prompt_start:],
                    options.without_timestamps,
                    self._max_prompt_tokens,
                )
                result = self._decode(window, prompt)
                if _is_silent(result, options):
                    seek += window.frames
                else:
                    slices, advance = split_by_timestamps(
                        result.tokens, tokenizer.timestamp_begin, window.frames, window.duration
                    )
                    for piece in slices:
                        text = tokenizer.decode(piece.tokens)
                        start, end = window.start + piece.start, window.start + piece.end
                        if self._reduced_context:
                            # There, the model may well place a time in the margin.
                            start, end = min(start, content_s), min(end, content_s)
                        if start == end or not text.strip():
                            continue
                        transcript += piece.tokens
                        segment_id += 1
                        yield Segment(
                            id=segment_id,
                            seek=seek,
                            start=start,
                            end=end,
                            text=text,
                            tokens=piece.tokens,
                            avg_logprob=result.avg_logprob,
                            compression_ratio=result.compression_ratio,
                            no_speech_prob=result.no_speech_prob,
                            words=None,
                            temperature=result.temperature,
                        )
                    if (
                        not options.condition_on_previous_text
                        or result.temperature > options.prompt_reset_on_temperature
                    ):
                        prompt_start = len(transcript)
                    # A timestamp may lie in the padding, or at the very beginning.
                    seek += min(advance, window.frames) or window.frames
                progress.update(min(seek, windows.content_frames) / FRAMES_PER_SECOND - progress.n)

    def _initial_prompt(self) -> list[int]:
        prompt = self._options.initial_prompt
        if prompt is None:
            return []
        if isinstance(prompt, str):
            return self._model.tokenizer.encode(" " + prompt.strip())
        return list(prompt)

    def _decode(self, window: Window, prompt: list[int]) -> DecodingResult:
        """Return the transcript of a window."""
        if window.seek == 0 and self._first_encoding is not None:
            encoding, self._first_encoding = self._first_encoding, None
        else:
            encoding = self._model.encode(window.features)
        temperatures = self._options.temperatures
        if not self._retry_in_full:
            return self._decode_with_fallback(encoding, prompt, temperatures)
        result = self._decode_with_fallback(encoding, prompt, temperatures[:1])
        if (
            result.is_cut_off
            or result.compression_ratio > _REDUCED_MAX_COMPRESSION_RATIO
            or result.avg_logprob < _REDUCED_MIN_LOGPROB
        ):
            logger.debug("transcript of reduced context rejected at %.2f s", window.start)
            encoding = self._model.encode(self._windows.full_context(window).features)
            result = self._decode_with_fallback(encoding, prompt, temperatures)
        return result

    def _decode_with_fallback(
        self, encoding: ctranslate2.StorageView, prompt: list[int], temperatures: Sequence[float]
    ) -> DecodingResult:
        """Return the first transcript that meets the thresholds, or else the most probable one."""
        results = []
        for temperature in temperatures:
            result = self._decode_once(encoding, prompt, temperature)
            if not _needs_fallback(result, self._options):
                return result
            logger.debug(
                "transcript at temperature %.1f rejected: compression ratio %.2f, "
                "average log probability %.2f",
                temperature,
                result.compression_ratio,
                result.avg_logprob,
            )
            results.append(result)
        acceptable = [result for result in results if not _is_repetitive(result, self._options)]
        best = max(acceptable or results, key=lambda result: result.avg_logprob)
        # The last temperature decides whether the transcript so far is forgotten.
        return replace(best, temperature=temperatures[-1])

    def _decode_once(
        self, encoding: ctranslate2.StorageView, prompt: list[int], temperature: float
    ) -> DecodingResult:
        options = self._options
        [result] = self._model.generate(
            encoding,
            [prompt],
            length_penalty=options.length_penalty,
            repetition_penalty=options.repetition_penalty,
            no_repeat_ngram_size=options.no_repeat_ngram_size,
            max_length=MAX_LENGTH,
            return_scores=True,
            return_no_speech_prob=True,
            suppress_blank=options.suppress_blank,
            suppress_tokens=options.suppress_tokens,
            max_initial_timestamp_index=round(options.max_initial_timestamp / TIME_PRECISION),
            **search_arguments(temperature, options.beam_size, options.patience, options.best_of),
        )
        return parse_result(
            result, self._model.tokenizer, len(prompt), temperature, options.length_penalty
        )


def _is_repetitive(result: DecodingResult, options: TranscriptionOptions) -> bool:
    threshold = options.compression_ratio_threshold
    return threshold is not None and result.compression_ratio > threshold


def _is_improbable(result: DecodingResult, options: TranscriptionOptions) -> bool:
    threshold = options.log_prob_threshold
    return threshold is not None and result.avg_logprob < threshold


def _may_be_silent(result: DecodingResult, options: TranscriptionOptions) -> bool:
    threshold = options.no_speech_threshold
    return threshold is not None and result.no_speech_prob > threshold


def _needs_fallback(result: DecodingResult, options: TranscriptionOptions) -> bool:
    if _is_improbable(result, options):
        # Improbable because nobody speaks: another temperature would not help.
        return not _may_be_silent(result, options)
    return _is_repetitive(result, options)


def _is_silent(result: DecodingResult, options: TranscriptionOptions) -> bool:
    probable = (
        options.log_prob_threshold is not None and result.avg_logprob > options.log_prob_threshold
    )
    return _may_be_silent(result, options) and not probable
