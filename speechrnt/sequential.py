"""The sequential algorithm for recordings of any length: seek, decode, fall back, slice.

OpenAI's algorithm (openai/whisper, transcribe.py) with the rules of faster-whisper 1.2.1.
"""

from __future__ import annotations

import logging
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import ctranslate2

from .decoding import (
    MAX_LENGTH,
    MAX_PROMPT_TOKENS,
    DecodingResult,
    build_prompt,
    ends_in_one_timestamp,
    parse_result,
    search_arguments,
    split_by_timestamps,
)
from .errors import OptionError
from .features import FRAMES_PER_SECOND, FeatureExtractor, Window, Windows
from .models import Model
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

__all__ = ["DetectedLanguage", "Hints", "SequentialDecoder", "most_likely_language"]

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
        if self.max_length(shortest) > MAX_LENGTH:
            raise OptionError(
                f"max_new_tokens: at most {MAX_LENGTH - len(shortest)}, as the decoder has "
                f"{MAX_LENGTH} positions and the prompt takes {len(shortest)} of them, "
                f"not {self.max_new_tokens}"
            )

    @property
    def new_tokens(self) -> int:
        """Positions to keep free behind the prompt."""
        return self.max_new_tokens or _LEAST_NEW_TOKENS

    def max_length(self, prompt: Sequence[int]) -> int:
        """Return CTranslate2's limit for what is decoded from a prompt."""
        return len(prompt) + self.max_new_tokens if self.max_new_tokens else MAX_LENGTH


def _hint_tokens(tokenizer: Tokenizer, text: str | None) -> list[int]:
    return tokenizer.encode(" " + text.strip())[:MAX_PROMPT_TOKENS] if text else []


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
    clips
        Starts and ends of what to transcribe, in seconds, in turns; without the last end, up to the
        end of the recording. Empty: everything.
    speech
        Where the recording is from another one with only its speech kept, the way back.
    """

    def __init__(
        self,
        model: Model,
        windows: Windows,
        options: TranscriptionOptions,
        task: str,
        reduced_context: bool,
        clips: Sequence[float] = (),
        speech: SpeechTimestampsMap | None = None,
    ) -> None:
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
            encoding = self._model.encode(window.features)
            if not number:
                # Kept for the decoding of the same window: the encoder is most of the work.
                self._first_encoding = (window.seek, window.frames), encoding
            yield self._model.detect_language(encoding)
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
                windows.prefetch(min(clip_end, seek + window.frames))
                encoding = self._encode(window)
                if options.multilingual:
                    language = self._model.detect_language(encoding)[0][0]
                prompt = self._prompt(language, transcript[prompt_start:], is_first=not seek)
                result, encoding = self._decode(window, encoding, prompt)
                found = self._read(window, encoding, result, language, speech_end)
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

    def _encode(self, window: Window) -> ctranslate2.StorageView:
        first, self._first_encoding = self._first_encoding, None
        if first is not None and first[0] == (window.seek, window.frames):
            return first[1]
        return self._model.encode(window.features)

    def _decode(
        self, window: Window, encoding: ctranslate2.StorageView, prompt: list[int]
    ) -> tuple[DecodingResult, ctranslate2.StorageView]:
        """Return the transcript of a window, and the encoder's output that it was made from."""
        temperatures = self._options.temperatures
        if not self._retry_in_full:
            return self._decode_with_fallback(encoding, prompt, temperatures), encoding
        result = self._decode_with_fallback(encoding, prompt, temperatures[:1])
        if (
            result.is_cut_off
            or result.compression_ratio > _REDUCED_MAX_COMPRESSION_RATIO
            or result.avg_logprob < _REDUCED_MIN_LOGPROB
        ):
            logger.debug("transcript of reduced context rejected at %.2f s", window.start)
            encoding = self._model.encode(self._windows.full_context(window).features)
            result = self._decode_with_fallback(encoding, prompt, temperatures)
        return result, encoding

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
        max_length = self._hints.max_length(prompt)
        [result] = self._model.generate(
            encoding,
            [prompt],
            length_penalty=options.length_penalty,
            repetition_penalty=options.repetition_penalty,
            no_repeat_ngram_size=options.no_repeat_ngram_size,
            max_length=max_length,
            return_scores=True,
            return_no_speech_prob=True,
            suppress_blank=options.suppress_blank,
            suppress_tokens=options.suppress_tokens,
            max_initial_timestamp_index=round(options.max_initial_timestamp / TIME_PRECISION),
            **search_arguments(temperature, options.beam_size, options.patience, options.best_of),
        )
        return parse_result(
            result,
            self._model.tokenizer,
            len(prompt),
            temperature,
            options.length_penalty,
            max_length,
        )

    def _read(
        self,
        window: Window,
        encoding: ctranslate2.StorageView,
        result: DecodingResult,
        language: str,
        speech_end: float,
    ) -> _Found:
        """Return what a window's transcript says, and where to go on."""
        options = self._options
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
            window_end = window.seek + self._windows.window_frames
            content_s = self._windows.content_up_to(window_end) / FRAMES_PER_SECOND
            for passage in passages:
                passage.start = min(passage.start, content_s)
                passage.end = min(passage.end, content_s)
        if not options.word_timestamps:
            return _Found(passages, seek, speech_end)

        self._align(window, encoding, passages, language, speech_end)
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
                content_frames = self._windows.content_up_to(int(min(reach, sys.maxsize)))
                content_s = content_frames * FeatureExtractor.time_per_frame
                if content_s - made_up.end < threshold:
                    seek = content_frames
                del passages[first:]
        last = last_end(passages)
        return _Found(passages, seek, speech_end if last is None else last)

    def _align(
        self,
        window: Window,
        encoding: ctranslate2.StorageView,
        passages: list[Passage],
        language: str,
        speech_end: float,
    ) -> None:
        """Give the passages of a window their words."""
        tokenizer = self._model.tokenizer
        text = [token for each in passages for token in text_tokens(tokenizer, each.tokens)]
        alignment = None
        if text:
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
