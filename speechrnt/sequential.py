"""The sequential algorithm for recordings of any length: seek, decode, fall back, slice.

OpenAI's algorithm (openai/whisper, transcribe.py) with the rules of faster-whisper 1.2.1.
"""

from __future__ import annotations

import logging
import math
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import ctranslate2
import numpy as np
from numpy.typing import NDArray

from .batching import SearchOptions
from .callers import Caller
from .decoding import (
    MAX_LENGTH,
    MAX_PROMPT_TOKENS,
    DecodingResult,
    build_prompt,
    ends_in_one_timestamp,
    parse_result,
    split_by_timestamps,
)
from .errors import OptionError
from .features import FRAMES_PER_SECOND, FeatureExtractor, Window, Windows
from .results import Segment, TranscriptionOptions
from .speech_timestamps import SpeechTimestampsMap
from .tokenizer import TIME_PRECISION, Tokenizer
from .words import (
    MEDIAN_FILTER_WIDTH,
    Passage,
    add_words,
    finished,
    hallucination,
    last_end,
    leading_silence,
    text_tokens,
)

__all__ = [
    "DetectedLanguage",
    "Hints",
    "SequentialDecoder",
    "at_temperature",
    "most_likely_language",
    "search_options",
]

logger = logging.getLogger("speechrnt")

# What a transcript must fulfil where a model that declares nothing was given a reduced context;
# otherwise the window is decoded again in full.
_REDUCED_MAX_COMPRESSION_RATIO = 2.4
_REDUCED_MIN_LOGPROB = -1.0

# However long the prompt: room for what is said in 30 s, at the least.
_LEAST_NEW_TOKENS = 128

LanguageProbabilities = list[tuple[str, float]]


@dataclass(frozen=True)
class DetectedLanguage:
    """Code and probability of a language, and those of all languages in the last window seen."""

    code: str
    probability: float
    all_probabilities: LanguageProbabilities


def most_likely_language(
    windows: Iterator[LanguageProbabilities], threshold: float | None
) -> DetectedLanguage:
    """Return the language of the first window that is sure of it, or else of most windows.

    Parameters
    ----------
    windows
        Code and probability of every language, best first, for one window after the other. At
        least one; those after a sure one are not asked for.
    threshold
        Probability above which a window is sure. None: none is.
    """
    seen: list[tuple[str, float]] = []
    probabilities: LanguageProbabilities = []
    for probabilities in windows:
        code, probability = probabilities[0]
        if threshold is not None and probability > threshold:
            return DetectedLanguage(code, probability, probabilities)
        seen.append((code, probability))
    [(code, _)] = Counter(code for code, _ in seen).most_common(1)
    return DetectedLanguage(code, max(p for c, p in seen if c == code), probabilities)


class Hints:
    """The tokens of hotwords and prefix, and how many new ones may follow the prompt.

    Raises
    ------
    OptionError
        If they leave no room for a transcript.
    """

    def __init__(self, tokenizer: Tokenizer, options: TranscriptionOptions) -> None:
        self.hotwords = _hint_tokens(tokenizer, options.hotwords)
        self.prefix = _hint_tokens(tokenizer, options.prefix)
        limit = options.max_new_tokens
        self.max_new_tokens = None if limit is None else int(limit)
        shortest = build_prompt(
            tokenizer,
            tokenizer.languages[0],
            "transcribe",
            (),
            options.without_timestamps,
            hotwords=self.hotwords,
            prefix=self.prefix,
        )
        if self.max_length(len(shortest)) > MAX_LENGTH:
            raise OptionError(
                f"max_new_tokens: at most {MAX_LENGTH - len(shortest)}, as the decoder has "
                f"{MAX_LENGTH} positions and the prompt takes {len(shortest)} of them, "
                f"not {self.max_new_tokens}"
            )

    @property
    def new_tokens(self) -> int:
        """Positions to keep free behind the prompt."""
        return self.max_new_tokens or _LEAST_NEW_TOKENS

    def max_length(self, prompt_length: int) -> int:
        """Return CTranslate2's limit for what is decoded from a prompt of so many tokens."""
        return prompt_length + self.max_new_tokens if self.max_new_tokens else MAX_LENGTH


def search_options(options: TranscriptionOptions) -> SearchOptions:
    """Return how to search at temperature 0."""
    return SearchOptions(
        beam_size=options.beam_size,
        patience=options.patience,
        length_penalty=options.length_penalty,
        repetition_penalty=options.repetition_penalty,
        no_repeat_ngram_size=options.no_repeat_ngram_size,
        suppress_blank=options.suppress_blank,
        suppress_tokens=tuple(options.suppress_tokens),
        max_initial_timestamp_index=round(options.max_initial_timestamp / TIME_PRECISION),
    )


def at_temperature(
    search: SearchOptions, temperature: float, options: TranscriptionOptions
) -> SearchOptions:
    """Return how to search at any temperature."""
    if temperature == 0:
        return search
    return replace(search, temperature=temperature, best_of=options.best_of)


def _hint_tokens(tokenizer: Tokenizer, text: str | None) -> list[int]:
    return tokenizer.encode(" " + text.strip())[:MAX_PROMPT_TOKENS] if text else []


class SequentialDecoder:
    """One recording on its way through the model, window by window.

    Used by one thread, once: `detect_language` if need be, then `segments`.

    Parameters
    ----------
    caller
        The way to the model.
    windows
        The recording.
    options
        How to decode it.
    task
        ``"transcribe"`` or ``"translate"``.
    reduced_context
        Whether `windows` give the encoder less than its full context.
    clips
        Starts and ends of what to transcribe, in seconds, in turns; without the last end, up to the
        end of the recording. Empty: everything.
    speech
        Where the recording is from another one with only its speech kept, the way back.
    """

    def __init__(
        self,
        caller: Caller,
        windows: Windows,
        options: TranscriptionOptions,
        task: str,
        reduced_context: bool,
        clips: Sequence[float] = (),
        speech: SpeechTimestampsMap | None = None,
    ) -> None:
        model = caller.model
        self._caller = caller
        self._model = model
        self._windows = windows
        self._options = options
        self._task = task
        self._reduced_context = reduced_context
        self._clips = clips
        self._speech = speech
        capabilities = model.capabilities
        self._retry_in_full = reduced_context and not capabilities.variable_context
        self._max_prompt_tokens = (
            capabilities.max_prompt_tokens if reduced_context else MAX_PROMPT_TOKENS
        )
        self._hints = Hints(model.tokenizer, options)
        self._search = search_options(options)
        self._first_encoding: tuple[tuple[int, int], ctranslate2.StorageView] | None = None

    def detect_language(self, max_windows: int, threshold: float | None) -> DetectedLanguage:
        """Return the language of the first windows; see `most_likely_language`."""
        return most_likely_language(self._window_languages(max_windows), threshold)

    def _window_languages(self, max_windows: int) -> Iterator[LanguageProbabilities]:
        windows = self._windows
        seek = int(self._clips[0] * FRAMES_PER_SECOND) if self._clips else 0
        if windows.content_up_to(seek + 1) <= seek:
            seek = 0
        for number in range(max_windows):
            window = windows.at(seek)
            result = self._caller.encode(window.features)
            if not number and result.encoding is not None:
                # Kept for the decoding of the same window: the encoder is most of the work.
                self._first_encoding = (window.seek, window.frames), result.encoding
            yield result.languages or []
            seek += window.frames
            if windows.content_up_to(seek + 1) <= seek:
                return

    def segments(self, language: str, progress: Callable[[float], None]) -> Iterator[Segment]:
        """Decode window after window; each starts where the transcript of the last one ends.

        Parameters
        ----------
        language
            Its code; with `multilingual`, it is detected for each window.
        progress
            Is told, after each window, up to what time the recording is transcribed.
        """
        options, windows, tokenizer = self._options, self._windows, self._model.tokenizer
        transcript = self._initial_prompt()
        prompt_start = 0
        segment_id = 0
        speech_end = 0.0
        clips = self._clips_in_frames()
        for number, (clip_start, clip_end) in enumerate(clips):
            seek = clip_start
            # Clips may be given in any order.
            next_start = min((start for start, _ in clips[number + 1 :]), default=sys.maxsize)
            while seek < windows.content_up_to(min(clip_end, seek + 1)):
                windows.forget(min(seek, next_start))
                window = windows.at(seek, clip_end)
                # The next one starts where this one ends, or before. One frame more tells whether
                # it is the last.
                latest = seek + window.frames + windows.window_frames + 1
                windows.prefetch(min(clip_end, latest))
                prompt = partial(
                    self._prompt, previous=transcript[prompt_start:], is_first=not seek
                )
                heard = self._decode(window, None if options.multilingual else language, prompt)
                result, language = heard.result, heard.language
                found = self._read(window, heard, speech_end)
                for passage in found.passages:
                    text = tokenizer.decode(passage.tokens)
                    if passage.start == passage.end or not text.strip():
                        continue
                    transcript += passage.tokens
                    segment_id += 1
                    yield self._segment(segment_id, window, passage, text, result)
                speech_end = found.speech_end
                if found.is_heard and (
                    not options.condition_on_previous_text
                    or result.temperature > options.prompt_reset_on_temperature
                ):
                    prompt_start = len(transcript)
                # Times may lie at the very beginning: the window is done with then.
                seek = found.seek if found.seek > seek else seek + window.frames
                progress(windows.content_up_to(seek) / FRAMES_PER_SECOND)

    def _clips_in_frames(self) -> list[tuple[int, int]]:
        ends = [round(seconds * FRAMES_PER_SECOND) for seconds in self._clips] or [0]
        return list(zip(ends[::2], [*ends[1::2], sys.maxsize], strict=False))

    def _initial_prompt(self) -> list[int]:
        prompt = self._options.initial_prompt
        if prompt is None:
            return []
        if isinstance(prompt, str):
            return self._model.tokenizer.encode(" " + prompt.strip())
        return list(prompt)

    def _prompt(self, language: str, previous: list[int], is_first: bool) -> list[int]:
        hints = self._hints
        # A prefix makes the hotwords void, but only where it stands: at the very beginning.
        prefix = hints.prefix if is_first else []
        hotwords = hints.hotwords[: self._max_prompt_tokens]
        n_previous = self._max_prompt_tokens
        if self._reduced_context:
            n_previous -= len(hotwords)
        return build_prompt(
            self._model.tokenizer,
            language,
            self._task,
            previous,
            self._options.without_timestamps,
            n_previous,
            hotwords=hotwords,
            prefix=prefix,
            new_tokens=hints.new_tokens,
        )

    def _decode(
        self, window: Window, language: str | None, prompt: Callable[[str], list[int]]
    ) -> _Heard:
        """Return the transcript of a window; without a language, it is detected."""
        first, self._first_encoding = self._first_encoding, None
        encoding = None
        if first is not None and first[0] == (window.seek, window.frames):
            encoding = first[1]
        features = window.features
        temperatures = self._options.temperatures
        if not self._retry_in_full:
            return self._decode_with_fallback(features, encoding, language, prompt, temperatures)
        heard = self._decode_with_fallback(features, encoding, language, prompt, temperatures[:1])
        result = heard.result
        if (
            result.is_cut_off
            or result.compression_ratio > _REDUCED_MAX_COMPRESSION_RATIO
            or result.avg_logprob < _REDUCED_MIN_LOGPROB
        ):
            logger.debug("transcript of reduced context rejected at %.2f s", window.start)
            features = self._windows.full_context(window).features
            return self._decode_with_fallback(features, None, heard.language, prompt, temperatures)
        return heard

    def _decode_with_fallback(
        self,
        features: NDArray[np.float32],
        encoding: ctranslate2.StorageView | None,
        language: str | None,
        prompt: Callable[[str], list[int]],
        temperatures: Sequence[float],
    ) -> _Heard:
        """Return the first transcript that meets the thresholds, or else the most probable one."""
        results = []
        for temperature in temperatures:
            heard = self._decode_once(features, encoding, language, prompt, temperature)
            result, language, encoding = heard.result, heard.language, heard.encoding
            if not _needs_fallback(result, self._options):
                return heard
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
        return replace(heard, result=replace(best, temperature=temperatures[-1]))

    def _decode_once(
        self,
        features: NDArray[np.float32],
        encoding: ctranslate2.StorageView | None,
        language: str | None,
        prompt: Callable[[str], list[int]],
        temperature: float,
    ) -> _Heard:
        options, tokenizer = self._options, self._model.tokenizer
        length = len(prompt(language or tokenizer.languages[0]))
        max_length = self._hints.max_length(length)
        answer = self._caller.decode(
            features,
            language,
            prompt,
            (length, len(self._hints.prefix), options.without_timestamps),
            max_length,
            at_temperature(self._search, temperature, options),
            encoding,
        )
        result = parse_result(
            answer.output, tokenizer, length, temperature, options.length_penalty, max_length
        )
        spoken = answer.languages[0][0] if answer.languages else str(language)
        return _Heard(result, spoken, features, answer.encoding)

    def _read(
        self,
        window: Window,
        heard: _Heard,
        speech_end: float,
    ) -> _Found:
        """Return what a window's transcript says, and where to go on."""
        options, result = self._options, heard.result
        timestamp_begin = self._model.tokenizer.timestamp_begin
        if _is_silent(result, options):
            return _Found([], window.seek + window.frames, speech_end, is_heard=False)
        slices, advance = split_by_timestamps(
            result.tokens, timestamp_begin, window.frames, window.duration
        )
        passages = [
            Passage(window.start + piece.start, window.start + piece.end, piece.tokens)
            for piece in slices
        ]
        # A timestamp may lie in the padding.
        seek = window.seek + min(advance, window.frames)
        if self._reduced_context:
            # There, the model may well place a time in the margin.
            for passage in passages:
                latest = math.ceil(max(passage.start, passage.end) * FRAMES_PER_SECOND) + 1
                content_s = self._windows.content_up_to(latest) / FRAMES_PER_SECOND
                passage.start = min(passage.start, content_s)
                passage.end = min(passage.end, content_s)
        if not options.word_timestamps:
            return _Found(passages, seek, speech_end)

        self._align(window, heard, passages, speech_end)
        last = last_end(passages)
        is_done = ends_in_one_timestamp(result.tokens, timestamp_begin)
        if not is_done and last is not None and last > window.start:
            seek = round(last * FRAMES_PER_SECOND)
        threshold = options.hallucination_silence_threshold
        if threshold is not None:
            gap = leading_silence(passages, window.start, threshold)
            if gap is not None:
                seek = window.seek + round(gap * FRAMES_PER_SECOND)
                return _Found([], seek, speech_end, is_heard=False)
            first = hallucination(
                passages,
                threshold,
                window.start,
                window.duration,
                (window.seek + self._windows.window_frames) * FeatureExtractor.time_per_frame,
                speech_end,
            )
            if first is not None:
                made_up = passages[first]
                seek = round(max(window.start + 1, made_up.start) * FRAMES_PER_SECOND)
                # Whether there is more than the threshold behind it: no more is looked at.
                reach = (made_up.end + threshold) * FRAMES_PER_SECOND + 2
                content_frames = self._windows.content_up_to(int(min(max(reach, 0), sys.maxsize)))
                content_s = content_frames * FeatureExtractor.time_per_frame
                if content_s - made_up.end < threshold:
                    seek = content_frames
                del passages[first:]
        last = last_end(passages)
        return _Found(passages, seek, speech_end if last is None else last)

    def _align(
        self,
        window: Window,
        heard: _Heard,
        passages: list[Passage],
        speech_end: float,
    ) -> None:
        """Give the passages of a window their words."""
        tokenizer, language, encoding = self._model.tokenizer, heard.language, heard.encoding
        text = [token for each in passages for token in text_tokens(tokenizer, each.tokens)]
        alignment = None
        if text:
            if encoding is None:
                encoding = self._model.encode(heard.features)
            [alignment] = self._model.align(
                encoding,
                tokenizer.sot_sequence(language, self._task),
                [text],
                [window.frames],
                MEDIAN_FILTER_WIDTH,
            )
        options = self._options
        add_words(
            tokenizer,
            passages,
            language,
            alignment,
            (options.prepend_punctuations, options.append_punctuations),
            # Not `window.start`, which may differ in the last bit.
            window.seek / FRAMES_PER_SECOND,
            speech_end,
        )

    def _segment(
        self, number: int, window: Window, passage: Passage, text: str, result: DecodingResult
    ) -> Segment:
        start, end, words = passage.start, passage.end, passage.words
        if self._speech is not None:
            start, end = self._speech.restore(start, end, words)
        return Segment(
            id=number,
            seek=window.seek,
            start=float(start),
            end=float(end),
            text=text,
            tokens=passage.tokens,
            avg_logprob=result.avg_logprob,
            compression_ratio=result.compression_ratio,
            no_speech_prob=result.no_speech_prob,
            words=finished(words),
            temperature=result.temperature,
        )


@dataclass(frozen=True)
class _Heard:
    """A window's transcript, its language, and what it was made from.

    Attributes
    ----------
    encoding
        The encoder's output of `features`, if it could be kept.
    """

    result: DecodingResult
    language: str
    features: NDArray[np.float32]
    encoding: ctranslate2.StorageView | None


@dataclass(frozen=True)
class _Found:
    """What a window's transcript says.

    Attributes
    ----------
    passages
        What becomes segments.
    seek
        Where to go on, in mel frames of the recording.
    speech_end
        Where the last word so far ends, in seconds.
    is_heard
        False if the transcript was dropped: then it does not make the earlier text forgotten.
    """

    passages: list[Passage]
    seek: int
    speech_end: float
    is_heard: bool = True


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
