"""Low-latency speech-to-text: Whisper on CTranslate2 with a Cython core."""

from . import openmp as openmp  # before anything imports CTranslate2
from ._sched import Priority, Scheduler
from ._version import __version__
from .audio import Audio, decode_audio, load_audio
from .batched import BatchedInferencePipeline
from .config import HardwareProfile, OptimizationConfig
from .errors import (
    AudioError,
    AudioFileError,
    AudioNotFoundError,
    DeadlineExceeded,
    GpuError,
    GpuOutOfMemory,
    GpuUnavailable,
    HandleError,
    InvalidAudioError,
    ModelError,
    ModelLoadError,
    ModelNotFoundError,
    OptionError,
    Overloaded,
    PoolClosedError,
    PoolExhausted,
    SchedulerClosed,
    SpeechRNTError,
    UtteranceClosed,
    UtteranceError,
)
from .formats import format_timestamp
from .hub import available_models, download_model
from .latency import StageTimings
from .models import load_model
from .plan import UtteranceOptions
from .results import Segment, TranscriptionInfo, TranscriptionOptions, Word
from .speech_timestamps import VadOptions, get_speech_timestamps
from .stt import OptimizedSTTFactory, PerformanceOptimizedSTT
from .transcribe import WhisperModel
from .transcript import Transcription

__all__ = [
    "Audio",
    "AudioError",
    "AudioFileError",
    "AudioNotFoundError",
    "BatchedInferencePipeline",
    "DeadlineExceeded",
    "GpuError",
    "GpuOutOfMemory",
    "GpuUnavailable",
    "HandleError",
    "HardwareProfile",
    "InvalidAudioError",
    "ModelError",
    "ModelLoadError",
    "ModelNotFoundError",
    "OptimizationConfig",
    "OptimizedSTTFactory",
    "OptionError",
    "Overloaded",
    "PerformanceOptimizedSTT",
    "PoolClosedError",
    "PoolExhausted",
    "Priority",
    "Scheduler",
    "SchedulerClosed",
    "Segment",
    "SpeechRNTError",
    "StageTimings",
    "Transcription",
    "TranscriptionInfo",
    "TranscriptionOptions",
    "UtteranceClosed",
    "UtteranceError",
    "UtteranceOptions",
    "VadOptions",
    "WhisperModel",
    "Word",
    "__version__",
    "available_models",
    "decode_audio",
    "download_model",
    "format_timestamp",
    "get_speech_timestamps",
    "load_audio",
    "load_model",
]
