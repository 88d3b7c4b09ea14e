"""`WhisperModel`: faster-whisper's interface."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from numbers import Real
from os import PathLike
from typing import Any, BinaryIO, Literal

import ctranslate2
import tokenizers

from .audio import Audio, AudioInput, load_audio
from .errors import OptionError
from .features import (
    WINDOW_SECONDS,
    FeatureExtractor,
    FullContextWindows,
    ReducedContextWindows,
)
from .models import DEFAULT_MODEL, load_model
from .results import Segment, TranscriptionInfo, TranscriptionOptions
from .sequential import SequentialDecoder

__all__ = ["WhisperModel"]

logger = logging.getLogger("speechrnt")

PREPEND_PUNCTUATIONS = "\"'“¿([{-"
APPEND_PUNCTUATIONS = "\"'.。,，!！?？:：”)]}、"

# Options of faster-whisper that this version lacks, with the value that means "not wanted".
_UNAVAILABLE_OPTIONS: Mapping[str, Any] = {
    "prefix": None,
    "word_timestamps": False,
    "prepend_punctuations": PREPEND_PUNCTUATIONS,
    "append_punctuations": APPEND_PUNCTUATIONS,
    "multilingual": False,
    "vad_filter": False,
    "vad_parameters": None,
    "max_new_tokens": None,
    "chunk_length": None,
    "clip_timestamps": "0",
    "hallucination_silence_threshold": None,
    "hotwords": None,
    "language_detection_segments": 1,
}

# A model that declares nothing about its context is given at least this much, and at least this
# much silence after the audio: below, stock Whisper weights miss the end of the text and loop.
_UNDECLARED_FLOOR_S = 10.0
_UNDECLARED_MARGIN_S = 2.0


class WhisperModel:
    """A Whisper model with faster-whisper's interface.

    Immutable after construction: any number of threads may transcribe with it, each with its own
    options; up to `num_workers` of them run at the same time.

    Parameters
    ----------
    model_size_or_path
        A name from `available_models`, a directory in CTranslate2's format, or a hub id; by default
        the embedded model.
    device, device_index, compute_type, cpu_threads, num_workers, download_root, \
    local_files_only, files, revision, use_auth_token, **model_kwargs
        See `load_model`.

    Attributes
    ----------
    model
        The CTranslate2 model.
    hf_tokenizer
        Its tokenizer.
    feature_extractor
        Its features.
    """

    def __init__(
        self,
        model_size_or_path: str | PathLike[str] = DEFAULT_MODEL,
        device: str = "auto",
        device_index: int | list[int] = 0,
        compute_type: str = "default",
        cpu_threads: int = 0,
        num_workers: int = 1,
        download_root: str | PathLike[str] | None = None,
        local_files_only: bool = False,
        files: Mapping[str, bytes | BinaryIO] | None = None,
        revision: str | None = None,
        use_auth_token: str | bool | None = None,
        **model_kwargs: Any,
    ) -> None:
        self._model = load_model(
            model_size_or_path,
            device,
            compute_type,
            device_index=device_index,
            cpu_threads=cpu_threads,
            num_workers=num_workers,
            download_root=download_root,
            local_files_only=local_files_only,
            files=files,
            revision=revision,
            use_auth_token=use_auth_token,
            **model_kwargs,
        )
        self.feature_extractor = FeatureExtractor(self._model.n_mels)

    @property
    def model(self) -> ctranslate2.models.Whisper:
        """The CTranslate2 model."""
        return self._model.whisper

    @property
    def hf_tokenizer(self) -> tokenizers.Tokenizer:
        """The model's tokenizer."""
        return self._model.tokenizer.hf_tokenizer

    @property
    def supported_languages(self) -> list[str]:
        """Codes of the languages the model knows."""
        return list(self._model.tokenizer.languages)

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
        initial_prompt: str | Iterable[int] | None = None,
        prefix: str | None = None,
        suppress_blank: bool = True,
        suppress_tokens: Sequence[int] | None = (-1,),
        without_timestamps: bool = False,
        max_initial_timestamp: float = 1.0,
        word_timestamps: bool = False,
        prepend_punctuations: str = PREPEND_PUNCTUATIONS,
        append_punctuations: str = APPEND_PUNCTUATIONS,
        multilingual: bool = False,
        vad_filter: bool = False,
        vad_parameters: Any = None,
        max_new_tokens: int | None = None,
        chunk_length: int | None = None,
        clip_timestamps: str | list[float] = "0",
        hallucination_silence_threshold: float | None = None,
        hotwords: str | None = None,
        language_detection_threshold: float | None = 0.5,
        language_detection_segments: int = 1,
        audio_context: Literal["full", "auto"] | float | None = None,
    ) -> tuple[Iterator[Segment], TranscriptionInfo]:
        """Transcribe a recording of any length.

        Reading the audio, computing its features and, where no language is given, detecting it
        happen in this call; each window is decoded when its first segment is asked for.

        Parameters
        ----------
        audio
            A file (path or open in binary mode), samples as a NumPy array (16 kHz mono), raw PCM
            bytes (16 bit little endian, 16 kHz mono), or an `Audio` for anything else.
        language
            Code such as ``"en"``; None detects it from the first window. faster-whisper detects it
            from one mel frame more than it decodes, which shows where there is little to recognise.
        task
            ``"transcribe"``, or ``"translate"`` to English.
        log_progress
            Show a progress bar.
        beam_size, patience
            Width of the beam search, and how many times that many finished candidates to wait for.
        best_of
            Candidates to draw when sampling.
        length_penalty, repetition_penalty, no_repeat_ngram_size
            See `ctranslate2.models.Whisper.generate`.
        temperature
            What to decode at; the later ones of a sequence are used where the transcript before
            misses `compression_ratio_threshold` or `log_prob_threshold`.
        compression_ratio_threshold
            A transcript that zlib compresses more than this repeats itself. None: no check.
        log_prob_threshold
            A transcript whose average log probability is below this is not trusted. None: no check.
        no_speech_threshold
            A window is silent if its probability of no speech is above this and its transcript
            misses `log_prob_threshold`. None: no check.
        condition_on_previous_text
            Prompt each window with the transcript so far.
        prompt_reset_on_temperature
            Forget the transcript so far after a window that needed a higher temperature.
        initial_prompt
            Text or token ids that stand before the transcript.
        suppress_blank
            Do not begin a transcript with a blank.
        suppress_tokens
            Ids not to use; -1 stands for annotations that are not speech. None or empty: all are
            allowed, special ones included.
        without_timestamps
            Decode text only: one segment per window.
        max_initial_timestamp
            Latest start of the first segment of a window, in seconds.
        language_detection_threshold
            Has no effect while the language is detected from one window, as in this version.
        audio_context
            How much of the encoder's 30 s to use. ``"full"``: all of it, as faster-whisper does.
            ``"auto"``: the length of the audio and a margin, in windows and with prompts no longer
            than the model is good at. A number: the same, but at least so many seconds. None:
            ``"auto"`` for models that declare variable context, ``"full"`` for others. With a model
            that declares nothing, ``"auto"`` keeps a floor of 10 s and a margin of 2 s, decodes a
            window again in full context if its transcript looks wrong, and leaves recordings over
            30 s at full context.
        prefix, word_timestamps, prepend_punctuations, append_punctuations, multilingual, \
        vad_filter, vad_parameters, max_new_tokens, chunk_length, clip_timestamps, \
        hallucination_silence_threshold, hotwords, language_detection_segments
            Not available in this version.

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
            If an option is unknown or out of range.
        NotImplementedError
            If one of the unavailable options is given.
        """
        given = locals()
        for name, default in _UNAVAILABLE_OPTIONS.items():
            value = given[name]
            if not isinstance(value, type(default)) or value != default:
                raise NotImplementedError(f"{name}: not available in this version of speechrnt")
        if not isinstance(log_progress, bool):
            raise OptionError(f"log_progress: must be True or False, not {log_progress!r}")
        if not isinstance(language_detection_threshold, (Real, type(None))):
            raise OptionError(
                "language_detection_threshold: must be a number or None, not "
                f"{language_detection_threshold!r}"
            )

        tokenizer = self._model.tokenizer
        warnings = []
        if not self._model.is_multilingual:
            if language not in (None, "en"):
                warnings.append(f"language {language!r} has no effect: the model is English-only")
            if task == "translate":
                warnings.append("task 'translate' has no effect: the model is English-only")
            language = "en"
        tokenizer.sot_sequence(tokenizer.languages[0] if language is None else language, task)
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
            condition_on_previous_text=condition_on_previous_text,
            prompt_reset_on_temperature=prompt_reset_on_temperature,
            temperatures=temperature if isinstance(temperature, Sequence) else [temperature],
            initial_prompt=initial_prompt,
            prefix=prefix,
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
            hallucination_silence_threshold=hallucination_silence_threshold,
            hotwords=hotwords,
        )
        source = load_audio(audio)
        reduced = self._reduced_windows(source, audio_context)
        transcription = SequentialDecoder(
            self._model,
            reduced or FullContextWindows(self.feature_extractor(source.samples)),
            options,
            task,
            reduced is not None,
        )
        if language is None:
            all_language_probs = transcription.detect_language()
            language, language_probability = all_language_probs[0]
            logger.debug("detected %r with probability %.2f", language, language_probability)
        else:
            all_language_probs, language_probability = None, 1.0
        info = TranscriptionInfo(
            language=language,
            language_probability=language_probability,
            duration=source.duration,
            duration_after_vad=source.duration,
            all_language_probs=all_language_probs,
            transcription_options=options,
            vad_options=None,
            warnings=(*warnings, *source.warnings),
        )
        return transcription.segments(language, log_progress), info

    def _reduced_windows(
        self, audio: Audio, audio_context: Literal["full", "auto"] | float | None
    ) -> ReducedContextWindows | None:
        """Return the windows to use with a reduced context, None where it shall be full."""
        capabilities = self._model.capabilities
        if audio_context is None:
            audio_context = "auto" if capabilities.variable_context else "full"
        floor_s = _context_floor(audio_context)
        if floor_s is None:
            return None
        margin_s = capabilities.margin_s
        if not capabilities.variable_context:
            if audio.duration > WINDOW_SECONDS:
                return None
            floor_s = floor_s or _UNDECLARED_FLOOR_S
            margin_s = _UNDECLARED_MARGIN_S
        return ReducedContextWindows(
            audio.samples,
            self._model.n_mels,
            longest_s=capabilities.max_window_s,
            margin_s=margin_s,
            floor_s=floor_s,
        )


def _context_floor(audio_context: object) -> float | None:
    """Return the least context in seconds that is asked for; None if it is the full one."""
    if isinstance(audio_context, str):
        if audio_context == "full":
            return None
        if audio_context == "auto":
            return 0.0
    elif (
        isinstance(audio_context, Real)
        and not isinstance(audio_context, bool)
        and 0 < audio_context <= WINDOW_SECONDS  # type: ignore[operator]
    ):
        return float(audio_context)
    raise OptionError(
        f"audio_context: must be 'full', 'auto' or seconds up to {WINDOW_SECONDS}, "
        f"not {audio_context!r}"
    )
