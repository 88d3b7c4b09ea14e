"""`WhisperModel`: faster-whisper's interface."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from numbers import Integral, Real
from os import PathLike
from typing import Any, BinaryIO, Literal

import ctranslate2
import numpy as np
import tokenizers
from numpy.typing import NDArray

from .audio import SAMPLE_RATE, Audio, AudioInput, float_blocks, load_audio, open_audio
from .audio_file import LENGTH_TOLERANCE_S, AudioReader
from .callers import Caller, CallerDispatcher
from .decoding import MAX_LENGTH
from .errors import OptionError
from .features import (
    FRAMES_PER_SECOND,
    HOP_LENGTH,
    WINDOW_FRAMES,
    WINDOW_SECONDS,
    FeatureExtractor,
    FullContextWindows,
    OwnMaximumWindows,
    ReducedContextWindows,
    Windows,
)
from .mel_frames import MelFrames
from .models import DEFAULT_MODEL, Model, load_model
from .results import Segment, TranscriptionInfo, TranscriptionOptions
from .segments import Progress, Segments
from .sequential import LanguageProbabilities, SequentialDecoder, most_likely_language
from .speech_timestamps import (
    SpeechTimestampsMap,
    VadOptions,
    collect_chunks,
    get_speech_timestamps,
    vad_options,
)
from .system import usable_cores
from .tokenizer import TIME_PRECISION

__all__ = ["WhisperModel"]

logger = logging.getLogger("speechrnt")

PREPEND_PUNCTUATIONS = "\"'“¿([{-"
APPEND_PUNCTUATIONS = "\"'.。,，!！?？:：”)]}、"

# A model that declares nothing about its context is given at least this much, and at least this
# much silence after the audio: below, stock Whisper weights miss the end of the text and loop.
_UNDECLARED_FLOOR_S = 10.0
_UNDECLARED_MARGIN_S = 2.0


class WhisperModel:
    """A Whisper model with faster-whisper's interface.

    Immutable after construction: any number of threads may transcribe with it, each with its own
    options. Up to `num_workers` calls of CTranslate2 run at the same time; windows that wait for
    them share calls where their options are the same.

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
    logger
        Where messages go.
    frames_per_second, tokens_per_second, time_precision, input_stride, num_samples_per_token, \
    max_length
        Constants of Whisper.
    """

    logger = logger
    frames_per_second = FRAMES_PER_SECOND
    tokens_per_second = round(1 / TIME_PRECISION)
    time_precision = TIME_PRECISION
    input_stride = FRAMES_PER_SECOND // tokens_per_second
    num_samples_per_token = HOP_LENGTH * input_stride
    max_length = MAX_LENGTH

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
        # One core has no time for features while it is computing the model itself.
        self._prefetches = usable_cores() > 1 or self.model.device != "cpu"
        self._dispatcher = CallerDispatcher(self._model)

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

    @property
    def feat_kwargs(self) -> dict[str, Any]:
        """What distinguishes the features of this model from those of others."""
        return {"feature_size": self._model.n_mels}

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
        vad_parameters: Mapping[str, Any] | VadOptions | None = None,
        max_new_tokens: int | None = None,
        chunk_length: int | None = None,
        clip_timestamps: str | Sequence[float] = "0",
        hallucination_silence_threshold: float | None = None,
        hotwords: str | None = None,
        language_detection_threshold: float | None = 0.5,
        language_detection_segments: int = 1,
        audio_context: Literal["full", "auto"] | float | None = None,
        normalization: Literal["recording", "window"] = "recording",
    ) -> tuple[Segments, TranscriptionInfo]:
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
        prefix
            What the transcript begins with, if it begins with the recording.
        suppress_blank
            Do not begin a transcript with a blank.
        suppress_tokens
            Ids not to use; -1 stands for annotations that are not speech. None or empty: all are
            allowed, special ones included.
        without_timestamps
            Decode text only: one segment per window.
        max_initial_timestamp
            Latest start of the first segment of a window, in seconds.
        word_timestamps
            Find out when each word was said.
        prepend_punctuations, append_punctuations
            Marks that belong to the word after them, and to the word before.
        multilingual
            Detect the language of each window anew.
        vad_filter
            Transcribe only what holds speech. Has no effect together with clips.
        vad_parameters
            What counts as speech: `VadOptions`, or some of them by name.
        max_new_tokens
            Most tokens of a window's transcript; CTranslate2 may stop earlier, after half of prompt
            and transcript together.
        chunk_length
            Most seconds of audio in one window, up to 30.
        clip_timestamps
            Starts and ends of what to transcribe, in seconds, in turns: as text, with commas, or
            numbers. Without the last end, up to the end of the recording.
        hallucination_silence_threshold
            With `word_timestamps`: where text looks made up, skip silences longer than this many
            seconds.
        hotwords
            Words to expect, put before the transcript so far in every window; void where there is a
            prefix.
        language_detection_threshold
            Probability from which the language of a window is that of the recording. None: the
            language of most windows is.
        language_detection_segments
            How many windows to detect the language from, at most.
        audio_context
            How much of the encoder's 30 s to use. ``"full"``: all of it, as faster-whisper does.
            ``"auto"``: the length of the audio and a margin, in windows and with prompts no longer
            than the model is good at. A number: the same, but at least so many seconds. None:
            ``"auto"`` for models that declare variable context, ``"full"`` for others. With a model
            that declares nothing, ``"auto"`` keeps a floor of 10 s and a margin of 2 s, decodes a
            window again in full context if its transcript looks wrong, and leaves recordings over
            30 s at full context.
        normalization
            What the loudness of full-context features is measured against. ``"recording"``: the
            loudest place of all, as faster-whisper does, which means to look at everything before
            the first window. ``"window"``: the loudest place of the same window, as Whisper was
            trained. A file is then decoded as the windows need it, one window ahead of the model,
            and neither its samples nor its features are ever in memory as a whole: keep a file
            object open until the last segment. That needs a header that states the length; other
            files, and all with `vad_filter`, are decoded first. Clips in falling order, and
            windows that the language is detected from, are kept for as long as they are needed.

        Returns
        -------
        segments
            Lazy, in order; not to be iterated by two threads at once.
        info
            Language, duration, options and warnings. Of a file that is decoded window by window,
            the duration is what the header states; after the last segment, if it was read to its
            end, duration and warnings are those of the decoded audio.

        Raises
        ------
        AudioError
            If the audio cannot be read or is not usable. Where it fails further on, the segments
            raise it.
        OptionError
            If an option is unknown or out of range.
        """
        check_flag("log_progress", log_progress)
        check_flag("vad_filter", vad_filter)
        check_flag("multilingual", multilingual)
        check_detection(language_detection_segments, language_detection_threshold)
        window_frames = checked_chunk_length(chunk_length) * FRAMES_PER_SECOND
        clips = _parsed_clips(clip_timestamps)
        vad = vad_options(vad_parameters)

        tokenizer = self._model.tokenizer
        warnings: list[str] = []
        if vad_filter and clips not in ([], [0.0]):
            warnings.append("vad_filter has no effect: clip_timestamps are given")
            vad_filter = False
        language, multilingual = check_language(self._model, language, task, multilingual, warnings)
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
            temperatures=[*temperature] if isinstance(temperature, Sequence) else [temperature],
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
        if normalization not in ("recording", "window"):
            raise OptionError(
                f"normalization: must be 'recording' or 'window', not {normalization!r}"
            )
        floor_s = self._context_floor(audio_context)
        with ExitStack() as held:
            # The voice activity detector goes through the whole recording before the first window.
            is_gradual = normalization == "window" and not vad_filter
            source = open_audio(audio) if is_gradual else load_audio(audio)
            del audio  # what was decoded here is freed as soon as it is not needed any more
            reader = source if isinstance(source, AudioReader) else None
            if reader is not None:
                held.callback(reader.close)
            duration = duration_after_vad = _seconds(source)
            warnings += source.warnings
            speech = None
            if isinstance(source, Audio) and vad_filter:
                spans = get_speech_timestamps(source.samples, vad)
                [samples], [_] = collect_chunks(source.samples, spans)
                source = Audio(samples)
                del samples
                speech = SpeechTimestampsMap(spans) if spans else None
                duration_after_vad = source.duration
            is_by_window = normalization == "window"
            windows: Windows | None = self._gradual_windows(
                source, floor_s, window_frames, is_by_window
            )
            if windows is None:
                assert isinstance(source, Audio)
                mel_power = self.feature_extractor.mel_power(source.samples)
                del source
                features = self.feature_extractor.log_mel(mel_power)
                windows = FullContextWindows(features, window_frames)
                del mel_power, features
            else:
                del source
            held.callback(windows.close)
            is_reduced = isinstance(windows, ReducedContextWindows)
            caller = Caller(self._dispatcher)
            transcription = SequentialDecoder(
                caller, windows, options, task, is_reduced, clips, speech
            )
            all_language_probs, language_probability = None, 1.0
            if language is None:
                detected = transcription.detect_language(
                    language_detection_segments, language_detection_threshold
                )
                language, language_probability = detected.code, detected.probability
                all_language_probs = detected.all_probabilities
                logger.debug("detected %r with probability %.2f", language, language_probability)
            info = TranscriptionInfo(
                language=language,
                language_probability=language_probability,
                duration=duration,
                duration_after_vad=duration_after_vad,
                all_language_probs=all_language_probs,
                transcription_options=options,
                vad_options=vad if vad_filter else None,
                warnings=tuple(warnings),
            )
            code = language

            def decode(progress: Progress) -> Iterator[Segment]:
                yield from transcription.segments(code, progress)
                if reader is not None:
                    _complete(info, reader, progress)

            release = held.pop_all().close
        duration = _in_hops(duration_after_vad)
        return Segments(decode, duration, log_progress, release, caller.cancel), info

    @property
    def model_is_loaded(self) -> bool:
        """Whether the weights are in memory."""
        return self._model.residency.is_loaded

    def load_model(self) -> None:
        """Bring the weights back after `unload_model`; using the model does it, too."""
        self._model.load()

    def unload_model(self, to_cpu: bool = False, timeout: float | None = None) -> None:
        """Free the weights when the calls into the model that are under way are over.

        Calls that are made meanwhile wait. Transcriptions that are being iterated go on: their next
        window loads the weights again.

        Parameters
        ----------
        to_cpu
            Keep them in the CPU's memory, from where they are back sooner.
        timeout
            Seconds to wait for the calls under way; None waits for as long as they take.

        Raises
        ------
        TimeoutError
            If there still were calls under way; nothing has changed then.
        ModelError
            If CTranslate2 keeps the weights all the same.
        OptionError
            If they are to be kept in the CPU's memory, and are used there.
        """
        self._model.unload(to_cpu, timeout)

    def unload_when_idle(self, seconds: float | None, to_cpu: bool = False) -> None:
        """Free the weights whenever the model was not used for so many seconds; None stops that."""
        self._model.unload_when_idle(seconds, to_cpu)

    def detect_language(
        self,
        audio: AudioInput | None = None,
        features: NDArray[np.float32] | None = None,
        vad_filter: bool = False,
        vad_parameters: Mapping[str, Any] | VadOptions | None = None,
        language_detection_segments: int = 1,
        language_detection_threshold: float | None = 0.5,
    ) -> tuple[str, float, LanguageProbabilities]:
        """Detect the language of a recording.

        Parameters
        ----------
        audio
            As for `transcribe`.
        features : (n_mels, n_frames) array of float32
            What `feature_extractor` made of it, in place of `audio`.
        vad_filter, vad_parameters, language_detection_segments, language_detection_threshold
            As for `transcribe`.

        Returns
        -------
        language
            Its code.
        probability
            How sure that is.
        all_probabilities
            Code and probability of every language in the last window looked at, best first.

        Raises
        ------
        AudioError
            If the audio cannot be read or is not usable.
        OptionError
            If an option is out of range, or neither audio nor features are given.
        """
        check_flag("vad_filter", vad_filter)
        check_detection(language_detection_segments, language_detection_threshold)
        vad = vad_options(vad_parameters)
        if not self._model.is_multilingual:
            return "en", 1.0, [("en", 1.0)]
        if audio is not None:
            samples = load_audio(audio).samples
            if vad_filter:
                [samples], [_] = collect_chunks(samples, get_speech_timestamps(samples, vad))
            samples = samples[: language_detection_segments * WINDOW_SECONDS * SAMPLE_RATE]
            features = self.feature_extractor(samples)
        elif features is None:
            raise OptionError("audio: give either audio or features")
        else:
            features = np.asarray(features, dtype=np.float32)
            n_mels = self._model.n_mels
            if features.ndim != 2 or len(features) != n_mels or not features.shape[1]:
                raise OptionError(
                    f"features: must be of shape ({n_mels}, n_frames), not {features.shape}"
                )
        caller = Caller(self._dispatcher)
        return detect_language(
            caller, features, language_detection_segments, language_detection_threshold
        )

    def _context_floor(self, audio_context: Literal["full", "auto"] | float | None) -> float | None:
        """Return the least context in seconds, None where it shall be full."""
        if audio_context is None:
            audio_context = "auto" if self._model.capabilities.variable_context else "full"
        return _context_floor(audio_context)

    def _gradual_windows(
        self,
        source: Audio | AudioReader,
        floor_s: float | None,
        window_frames: int,
        is_by_window: bool,
    ) -> OwnMaximumWindows | ReducedContextWindows | None:
        """Return windows that need no audio but their own; None for faster-whisper's."""
        if floor_s is None and not is_by_window:
            return None
        mel = MelFrames(
            float_blocks(source),
            self._model.n_mels,
            self._prefetches,
            source.close if isinstance(source, AudioReader) else None,
        )
        # What cannot be read at all is an error now.
        mel.content_up_to(1)
        capabilities = self._model.capabilities
        margin_s = capabilities.margin_s
        if floor_s is not None and not capabilities.variable_context:
            mel.content_up_to(WINDOW_FRAMES + 1)
            if mel.n_samples > WINDOW_SECONDS * SAMPLE_RATE:
                floor_s = None
            else:
                floor_s = floor_s or _UNDECLARED_FLOOR_S
                margin_s = _UNDECLARED_MARGIN_S
        if floor_s is not None:
            longest_s = min(capabilities.max_window_s, window_frames / FRAMES_PER_SECOND)
            return ReducedContextWindows(
                mel, longest_s=longest_s, margin_s=margin_s, floor_s=floor_s
            )
        return OwnMaximumWindows(mel, window_frames) if is_by_window else None


def _seconds(source: Audio | AudioReader) -> float:
    """Return how long a recording is, by its header where it is not decoded yet."""
    return source.expected_s if isinstance(source, AudioReader) else source.duration


def _in_hops(seconds: float) -> float:
    """Return the part of a recording that is a whole number of mel frames."""
    return round(seconds * SAMPLE_RATE) // HOP_LENGTH / FRAMES_PER_SECOND


def _complete(info: TranscriptionInfo, reader: AudioReader, progress: Progress) -> None:
    """Say of a recording what only its end tells, if it was read up to there."""
    if reader.duration is None:
        return
    warnings = reader.warnings
    if reader.duration > reader.expected_s + LENGTH_TOLERANCE_S:
        warnings += (
            f"{reader.name!r}: {reader.duration:.2f} s of audio were decoded, where the header "
            f"states {reader.expected_s:.2f} s",
        )
    for warning in warnings:
        logger.warning(warning)
    info.warnings += warnings
    info.duration = info.duration_after_vad = reader.duration
    progress.duration = _in_hops(reader.duration)


def detect_language(
    caller: Caller, features: NDArray[np.float32], max_windows: int, threshold: float | None
) -> tuple[str, float, LanguageProbabilities]:
    """Detect the language of features, as faster-whisper does: with their last frame."""

    def languages() -> Iterator[LanguageProbabilities]:
        n_frames = min(features.shape[1], max_windows * WINDOW_FRAMES)
        for start in range(0, n_frames, WINDOW_FRAMES):
            piece = features[:, start : start + WINDOW_FRAMES]
            window = np.zeros((1, len(features), WINDOW_FRAMES), dtype=np.float32)
            window[0, :, : piece.shape[1]] = piece
            yield caller.encode(window).languages or []

    detected = most_likely_language(languages(), threshold)
    return detected.code, detected.probability, detected.all_probabilities


def check_flag(name: str, value: object) -> None:
    """Raise `OptionError` if an option is not True or False."""
    if not isinstance(value, (bool, np.bool_)):
        raise OptionError(f"{name}: must be True or False, not {value!r}")


def check_detection(segments: object, threshold: object) -> None:
    """Raise `OptionError` if the options for detecting the language are not usable."""
    if not isinstance(segments, Integral) or isinstance(segments, bool) or segments < 1:
        raise OptionError(
            f"language_detection_segments: must be a whole number from 1, not {segments!r}"
        )
    if not isinstance(threshold, (Real, type(None))):
        raise OptionError(
            f"language_detection_threshold: must be a number or None, not {threshold!r}"
        )


def checked_chunk_length(chunk_length: int | None) -> int:
    """Return how many seconds a window may hold."""
    if chunk_length is None:
        return WINDOW_SECONDS
    is_whole = isinstance(chunk_length, Integral) and not isinstance(chunk_length, bool)
    if not is_whole or not 1 <= chunk_length <= WINDOW_SECONDS:
        raise OptionError(
            f"chunk_length: must be a whole number of seconds from 1 to {WINDOW_SECONDS}, the "
            f"encoder's window, not {chunk_length!r}"
        )
    return int(chunk_length)


def check_language(
    model: Model, language: str | None, task: str, multilingual: bool, warnings: list[str]
) -> tuple[str | None, bool]:
    """Return the language, and whether to detect it for each window, as far as the model can.

    What it cannot is added to `warnings`.
    """
    if not model.is_multilingual:
        if language not in (None, "en"):
            warnings.append(f"language {language!r} has no effect: the model is English-only")
        if task == "translate":
            warnings.append("task 'translate' has no effect: the model is English-only")
        if multilingual:
            warnings.append("multilingual has no effect: the model is English-only")
        language, multilingual = "en", False
    tokenizer = model.tokenizer
    tokenizer.sot_sequence(tokenizer.languages[0] if language is None else language, task)
    return language, multilingual


def _parsed_clips(clips: object) -> list[float]:
    """Return the starts and ends of clips, in seconds."""
    message = (
        "clip_timestamps: must be seconds, start and end in turns and each end not before its "
        f"start, as a list or as text like '0,5,10', not {clips!r}"
    )
    if isinstance(clips, str):
        clips = clips.split(",") if clips.strip() else []
    elif not isinstance(clips, Iterable) or isinstance(clips, (bytes, Mapping)):
        raise OptionError(message)
    try:
        seconds = [float(clip) for clip in clips]
    except (TypeError, ValueError, OverflowError) as error:
        raise OptionError(message) from error
    in_order = all(s <= e for s, e in zip(seconds[::2], seconds[1::2], strict=False))
    if not in_order or not all(0 <= second < math.inf for second in seconds):
        raise OptionError(message)
    return seconds


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
