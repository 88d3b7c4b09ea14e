"""`BatchedInferencePipeline`: the parts of one recording that hold speech, decoded side by side.

The interface and the rules are those of faster-whisper 1.2.1: chunks of up to 30 s, all with the
same prompt, one attempt each. Nothing about a call is stored on the pipeline.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from numbers import Integral, Real
from typing import Any

import ctranslate2
import numpy as np
from numpy.typing import NDArray

from .audio import SAMPLE_RATE, AudioInput, load_audio
from .batching import JobResult
from .callers import Caller
from .decoding import (
    DecodingResult,
    build_prompt,
    compression_ratio,
    parse_result,
    split_by_timestamps,
)
from .errors import OptionError
from .features import FRAMES_PER_SECOND, WINDOW_FRAMES, WINDOW_SECONDS, FeatureExtractor
from .models import Model
from .results import Segment, TranscriptionInfo, TranscriptionOptions
from .segments import Segments
from .sequential import Hints, at_temperature, search_options
from .speech_timestamps import (
    SpeechTimestampsMap,
    TimeSpan,
    VadOptions,
    collect_chunks,
    get_speech_timestamps,
    vad_options,
)
from .transcribe import (
    APPEND_PUNCTUATIONS,
    PREPEND_PUNCTUATIONS,
    WhisperModel,
    check_detection,
    check_flag,
    check_language,
    checked_chunk_length,
    detect_language,
)
from .words import MEDIAN_FILTER_WIDTH, Passage, add_words, finished, text_tokens

__all__ = ["BatchedInferencePipeline"]

# Options that the sequential algorithm has and this one does not, with their defaults.
_WITHOUT_EFFECT: Mapping[str, Any] = {
    "compression_ratio_threshold": 2.4,
    "log_prob_threshold": -1.0,
    "no_speech_threshold": 0.6,
    "condition_on_previous_text": True,
    "prompt_reset_on_temperature": 0.5,
    "prefix": None,
    "hallucination_silence_threshold": None,
}

# Speech ends at shorter pauses than in sequential transcription, so that there are many chunks.
_MIN_SILENCE_MS = 160

# A column of features to detect a language from where there is nothing else.
_SILENT_FRAME = -1.5


@dataclass(frozen=True)
class _Chunk:
    """A part of the recording: its samples, its start in what is transcribed, its length in s."""

    samples: NDArray[np.float32]
    offset: float
    duration: float


class BatchedInferencePipeline:
    """Transcribes one recording in batches of chunks, which makes better use of the hardware.

    Any number of threads may use one pipeline.

    Parameters
    ----------
    model
        The model to use.
    """

    def __init__(self, model: WhisperModel) -> None:
        if not isinstance(model, WhisperModel):
            raise OptionError(f"model: must be a speechrnt.WhisperModel, not {model!r}")
        self.model = model

    def transcribe(
        self,
        audio: AudioInput,
        language: str | None = None,
        task: str = "transcribe",
        log_progress: bool = False,
        beam_size: int = 5,
        best_of: int = 5,
        patience: float = 1,
        length_penalty: float = 1,
        repetition_penalty: float = 1,
        no_repeat_ngram_size: int = 0,
        temperature: float | Sequence[float] = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0),
        compression_ratio_threshold: float | None = 2.4,
        log_prob_threshold: float | None = -1.0,
        no_speech_threshold: float | None = 0.6,
        condition_on_previous_text: bool = True,
        prompt_reset_on_temperature: float = 0.5,
        initial_prompt: str | Sequence[int] | None = None,
        prefix: str | None = None,
        suppress_blank: bool = True,
        suppress_tokens: Sequence[int] | None = (-1,),
        without_timestamps: bool = True,
        max_initial_timestamp: float = 1.0,
        word_timestamps: bool = False,
        prepend_punctuations: str = PREPEND_PUNCTUATIONS,
        append_punctuations: str = APPEND_PUNCTUATIONS,
        multilingual: bool = False,
        vad_filter: bool = True,
        vad_parameters: Mapping[str, Any] | VadOptions | None = None,
        max_new_tokens: int | None = None,
        chunk_length: int | None = None,
        clip_timestamps: Sequence[Mapping[str, float]] | None = None,
        hallucination_silence_threshold: float | None = None,
        batch_size: int = 8,
        hotwords: str | None = None,
        language_detection_threshold: float | None = 0.5,
        language_detection_segments: int = 1,
    ) -> tuple[Segments, TranscriptionInfo]:
        """Transcribe a recording of any length.

        Reading the audio, finding speech in it and, where no language is given, detecting it happen
        in this call; a batch is decoded when its first segment is asked for.

        Parameters
        ----------
        temperature
            The first one is used.
        initial_prompt, hotwords
            Stand before each chunk.
        vad_filter
            Find the chunks by voice activity detection; needed for 30 s and more without clips.
        vad_parameters
            What counts as speech. By name, ``max_speech_duration_s`` is always `chunk_length`; None
            is the same with ``min_silence_duration_ms=160``.
        chunk_length
            Most seconds of a chunk, up to 30.
        clip_timestamps
            The chunks: dicts with ``start`` and ``end`` in seconds. Of more than 30 s, the first 30
            are transcribed.
        batch_size
            Chunks to decode at once, at most.
        audio, language, task, log_progress, beam_size, best_of, patience, length_penalty, \
        repetition_penalty, no_repeat_ngram_size, suppress_blank, suppress_tokens, \
        without_timestamps, max_initial_timestamp, word_timestamps, prepend_punctuations, \
        append_punctuations, multilingual, max_new_tokens, language_detection_threshold, \
        language_detection_segments
            See `WhisperModel.transcribe`.
        compression_ratio_threshold, log_prob_threshold, no_speech_threshold, \
        condition_on_previous_text, prompt_reset_on_temperature, prefix, \
        hallucination_silence_threshold
            Have no effect: there is one attempt, and no text before. ``info.warnings`` says so.

        Returns
        -------
        segments
            Lazy, in order; not to be iterated by two threads at once.
        info
            Language, duration, options and warnings.

        Raises
        ------
        AudioError
            If the audio cannot be read or is not usable.
        OptionError
            If an option is unknown or out of range, or the chunks are not known.
        """
        given = locals()
        warnings = [
            f"{name} has no effect in batches"
            for name, default in _WITHOUT_EFFECT.items()
            if given[name] != default
        ]
        model = self.model._model
        tokenizer = model.tokenizer
        check_flag("log_progress", log_progress)
        check_flag("vad_filter", vad_filter)
        check_flag("multilingual", multilingual)
        check_detection(language_detection_segments, language_detection_threshold)
        _check_batch_size(batch_size)
        chunk_s = checked_chunk_length(chunk_length)
        clips = None if not clip_timestamps else _parsed_clips(clip_timestamps, warnings)
        vad = _vad_options(vad_parameters, chunk_s)
        language, multilingual = check_language(model, language, task, multilingual, warnings)
        if initial_prompt is not None and not isinstance(initial_prompt, str):
            initial_prompt = tokenizer.checked_ids("initial_prompt", initial_prompt)
        options = TranscriptionOptions(
            beam_size=beam_size,
            best_of=best_of,
            patience=patience,
            length_penalty=length_penalty,
            repetition_penalty=repetition_penalty,
            no_repeat_ngram_size=no_repeat_ngram_size,
            log_prob_threshold=log_prob_threshold,
            no_speech_threshold=no_speech_threshold,
            compression_ratio_threshold=compression_ratio_threshold,
            condition_on_previous_text=False,
            prompt_reset_on_temperature=prompt_reset_on_temperature,
            temperatures=temperature[:1] if isinstance(temperature, Sequence) else [temperature],
            initial_prompt=initial_prompt,
            prefix=None,
            suppress_blank=suppress_blank,
            suppress_tokens=tokenizer.suppressed_tokens(suppress_tokens),
            without_timestamps=without_timestamps,
            max_initial_timestamp=max_initial_timestamp,
            word_timestamps=word_timestamps,
            prepend_punctuations=prepend_punctuations,
            append_punctuations=append_punctuations,
            multilingual=multilingual,
            max_new_tokens=max_new_tokens,
            clip_timestamps=clip_timestamps,
            hallucination_silence_threshold=None,
            hotwords=hotwords,
        )

        source = load_audio(audio)
        warnings += source.warnings
        spans: list[TimeSpan]
        speech = None
        if clips is not None:
            spans = clips
            chunks = [
                _Chunk(
                    source.samples[span["start"] : span["end"]],
                    span["start"] / SAMPLE_RATE,
                    (span["end"] - span["start"]) / SAMPLE_RATE,
                )
                for span in spans
            ]
        else:
            if vad_filter:
                spans = get_speech_timestamps(source.samples, vad)
            elif source.duration < chunk_s:
                spans = [{"start": 0, "end": len(source.samples)}]
            else:
                raise OptionError(
                    f"vad_filter: {source.duration:.1f} s of audio need voice activity detection "
                    f"or clip_timestamps to be cut into chunks of {chunk_s} s"
                )
            chunks = [
                _Chunk(samples, metadata["offset"], metadata["duration"])
                for samples, metadata in zip(
                    *collect_chunks(source.samples, spans, max_duration=chunk_s), strict=True
                )
            ]
            speech = SpeechTimestampsMap(spans)
        duration_after_vad = sum(span["end"] - span["start"] for span in spans) / SAMPLE_RATE
        if not duration_after_vad:
            chunks = []
        caller = Caller(self.model._dispatcher)
        batches = _Batches(self.model, caller, chunks, options, task, int(batch_size), speech)
        all_language_probs, language_probability = None, 1.0
        if language is None:
            language, language_probability, all_language_probs = batches.detect_language(
                language_detection_segments, language_detection_threshold
            )
        code = language
        info = TranscriptionInfo(
            language=language,
            language_probability=language_probability,
            duration=source.duration,
            duration_after_vad=duration_after_vad,
            all_language_probs=all_language_probs,
            transcription_options=options,
            vad_options=vad if clips is None and vad_filter else None,
            warnings=tuple(warnings),
        )
        segments = Segments(
            lambda progress: batches.segments(code, progress),
            duration_after_vad,
            log_progress,
            on_cancel=caller.cancel,
        )
        return segments, info


class _Batches:
    """The chunks of one recording on their way through the model; used by one thread, once."""

    def __init__(
        self,
        model: WhisperModel,
        caller: Caller,
        chunks: Sequence[_Chunk],
        options: TranscriptionOptions,
        task: str,
        batch_size: int,
        speech: SpeechTimestampsMap | None,
    ) -> None:
        self._model: Model = model._model
        self._caller = caller
        self._extractor: FeatureExtractor = model.feature_extractor
        self._chunks = chunks
        self._options = options
        self._task = task
        self._batch_size = batch_size
        self._speech = speech
        tokenizer = self._model.tokenizer
        self._hints = Hints(tokenizer, options)
        self._search = search_options(options)
        prompt = options.initial_prompt
        self._previous = tokenizer.encode(prompt) if isinstance(prompt, str) else prompt or ()

    def detect_language(
        self, max_windows: int, threshold: float | None
    ) -> tuple[str, float, list[tuple[str, float]]]:
        """Return the language of the first windows' worth of all chunks joined."""
        pieces, n_frames = [], 0
        for chunk in self._chunks:
            if n_frames >= max_windows * WINDOW_FRAMES:
                break
            pieces.append(self._features(chunk))
            n_frames += pieces[-1].shape[1]
        pieces.append(np.full((self._model.n_mels, 1), _SILENT_FRAME, dtype=np.float32))
        joined = np.concatenate(pieces, axis=1)
        return detect_language(self._caller, joined, max_windows, threshold)

    def segments(self, language: str, progress: Callable[[float], None]) -> Iterator[Segment]:
        """Decode batch after batch; the features of the next one are computed meanwhile."""
        chunks = self._chunks
        groups = [
            chunks[start : start + self._batch_size]
            for start in range(0, len(chunks), self._batch_size)
        ]
        number, done_s, speech_end = 0, 0.0, 0.0
        with ThreadPoolExecutor(1, "speechrnt-features") as executor:
            features = executor.submit(self._windows, groups[0]) if groups else None
            for index, group in enumerate(groups):
                assert features is not None
                windows = features.result()
                if index + 1 < len(groups):
                    features = executor.submit(self._windows, groups[index + 1])
                answer = self._ask(windows, None if self._options.multilingual else language)
                languages = [language] * len(group)
                if answer.rankings is not None:
                    languages = [ranking[0][0] for ranking in answer.rankings]
                results = self._results(answer)
                passages = [
                    self._passages(chunk, result)
                    for chunk, result in zip(group, results, strict=True)
                ]
                if self._options.word_timestamps:
                    encoding = answer.encoding
                    if encoding is None:
                        encoding = self._model.encode(windows)
                    speech_end = self._align(encoding, group, passages, languages, speech_end)
                for chunk, result, of_chunk in zip(group, results, passages, strict=True):
                    for passage in of_chunk:
                        number += 1
                        yield self._segment(number, chunk, passage, result)
                    done_s += chunk.duration
                    progress(done_s)

    def _features(self, chunk: _Chunk) -> NDArray[np.float32]:
        return self._extractor(chunk.samples)[:, :-1]

    def _windows(self, chunks: Sequence[_Chunk]) -> NDArray[np.float32]:
        shape = (len(chunks), self._model.n_mels, WINDOW_FRAMES)
        windows = np.zeros(shape, dtype=np.float32)
        for window, chunk in zip(windows, chunks, strict=True):
            features = self._features(chunk)[:, :WINDOW_FRAMES]
            window[:, : features.shape[1]] = features
        return windows

    def _prompt(self, language: str) -> list[int]:
        return build_prompt(
            self._model.tokenizer,
            language,
            self._task,
            self._previous,
            self._options.without_timestamps,
            hotwords=self._hints.hotwords,
            new_tokens=self._hints.new_tokens,
        )

    def _ask(self, windows: NDArray[np.float32], language: str | None) -> JobResult:
        """Have the model decode windows; without a language, it is detected for each."""
        options = self._options
        length = len(self._prompt(language or self._model.tokenizer.languages[0]))
        [temperature] = options.temperatures
        return self._caller.decode(
            windows,
            language,
            self._prompt,
            (length, 0, options.without_timestamps),
            self._hints.max_length(length),
            at_temperature(self._search, temperature, options),
        )

    def _results(self, answer: JobResult) -> list[DecodingResult]:
        options, length = self._options, answer.prompt_length
        [temperature] = options.temperatures
        return [
            parse_result(
                output,
                self._model.tokenizer,
                length,
                temperature,
                options.length_penalty,
                self._hints.max_length(length),
            )
            for output in answer.outputs
        ]

    def _passages(self, chunk: _Chunk, result: DecodingResult) -> list[Passage]:
        slices, _ = split_by_timestamps(
            result.tokens, self._model.tokenizer.timestamp_begin, WINDOW_FRAMES, chunk.duration
        )
        return [
            Passage(chunk.offset + piece.start, chunk.offset + piece.end, piece.tokens)
            for piece in slices
        ]

    def _align(
        self,
        encoding: ctranslate2.StorageView,
        chunks: Sequence[_Chunk],
        passages: Sequence[list[Passage]],
        languages: Sequence[str],
        speech_end: float,
    ) -> float:
        """Give the passages of a batch their words; return when the last one ends."""
        tokenizer, options = self._model.tokenizer, self._options
        texts = [
            [token for passage in of_chunk for token in text_tokens(tokenizer, passage.tokens)]
            for of_chunk in passages
        ]
        frames = [
            min(math.ceil(chunk.duration) * FRAMES_PER_SECOND, WINDOW_FRAMES) for chunk in chunks
        ]
        alignments: dict[int, Any] = {}
        # CTranslate2 aligns a whole batch in one language.
        for language in dict.fromkeys(languages):
            aligned = self._model.align(
                encoding,
                tokenizer.sot_sequence(language, self._task),
                texts,
                frames,
                MEDIAN_FILTER_WIDTH,
            )
            alignments.update(
                (i, aligned[i]) for i, spoken in enumerate(languages) if spoken == language
            )
        for i, (chunk, of_chunk) in enumerate(zip(chunks, passages, strict=True)):
            speech_end = add_words(
                tokenizer,
                of_chunk,
                languages[i],
                alignments[i],
                (options.prepend_punctuations, options.append_punctuations),
                _seek(chunk) / FRAMES_PER_SECOND,
                speech_end,
            )
        return speech_end

    def _segment(
        self, number: int, chunk: _Chunk, passage: Passage, result: DecodingResult
    ) -> Segment:
        start, end, words = round(passage.start, 3), round(passage.end, 3), passage.words
        if self._speech is not None:
            start, end = self._speech.restore(start, end, words)
        text = self._model.tokenizer.decode(passage.tokens)
        return Segment(
            id=number,
            seek=_seek(chunk),
            start=float(start),
            end=float(end),
            text=text,
            tokens=passage.tokens,
            avg_logprob=result.avg_logprob,
            compression_ratio=compression_ratio(text),
            no_speech_prob=result.no_speech_prob,
            words=finished(words),
            temperature=result.temperature,
        )


def _seek(chunk: _Chunk) -> int:
    return int(chunk.offset * FRAMES_PER_SECOND)


def _check_batch_size(batch_size: object) -> None:
    if not isinstance(batch_size, Integral) or isinstance(batch_size, bool) or batch_size < 1:
        raise OptionError(f"batch_size: must be a whole number from 1, not {batch_size!r}")


def _vad_options(parameters: Mapping[str, Any] | VadOptions | None, chunk_s: int) -> VadOptions:
    options = vad_options(parameters)
    if parameters is None:
        options = replace(options, min_silence_duration_ms=_MIN_SILENCE_MS)
    if parameters is None or isinstance(parameters, Mapping):
        options = replace(options, max_speech_duration_s=chunk_s)
    return options


def _parsed_clips(clips: object, warnings: list[str]) -> list[TimeSpan]:
    """Return clips in samples."""
    message = (
        "clip_timestamps: must be a list of dicts with 'start' and 'end' in seconds, the end not "
        f"before the start, not {clips!r}"
    )
    if not isinstance(clips, Sequence) or isinstance(clips, str):
        raise OptionError(message)
    spans: list[TimeSpan] = []
    for number, clip in enumerate(clips):
        if not isinstance(clip, Mapping) or {*clip} != {"start", "end"}:
            raise OptionError(message)
        start, end = clip["start"], clip["end"]
        if not all(isinstance(t, Real) for t in (start, end)) or not 0 <= start <= end < math.inf:
            raise OptionError(message)
        spans.append({"start": int(start * SAMPLE_RATE), "end": int(end * SAMPLE_RATE)})
        if end - start > WINDOW_SECONDS:
            warnings.append(
                f"clip {number} is longer than {WINDOW_SECONDS} seconds: only the first "
                f"{WINDOW_SECONDS} are transcribed"
            )
    return spans
