"""The exceptions of speechrnt.

Everything the package raises about its input, its models or its state derives from
`SpeechRNTError`, and also from the built-in class a caller would expect, so that both
``except SpeechRNTError`` and ``except FileNotFoundError`` read naturally. Each message names
what was wrong and what would be right.
"""

__all__ = [
    "AudioError",
    "AudioFileError",
    "AudioNotFoundError",
    "DeadlineExceeded",
    "GpuError",
    "GpuOutOfMemory",
    "GpuUnavailable",
    "HandleError",
    "InvalidAudioError",
    "ModelError",
    "ModelLoadError",
    "ModelNotFoundError",
    "OptionError",
    "Overloaded",
    "PoolClosedError",
    "PoolExhausted",
    "SchedulerClosed",
    "SpeechRNTError",
    "UtteranceClosed",
    "UtteranceError",
]


class SpeechRNTError(Exception):
    """Base class of every exception that speechrnt raises on purpose."""


class AudioError(SpeechRNTError, ValueError):
    """Audio that cannot be used; the subclasses say where it came from."""


class AudioNotFoundError(AudioError, FileNotFoundError):
    """The audio file does not exist."""


class AudioFileError(AudioError):
    """The audio file exists but holds nothing that can be decoded."""


class InvalidAudioError(AudioError):
    """Samples in memory of the wrong type, shape, rate or value."""


class ModelError(SpeechRNTError):
    """A model that cannot be used."""


class ModelNotFoundError(ModelError, ValueError):
    """No model of that name or at that place, or no way to fetch it."""


class ModelLoadError(ModelError, RuntimeError):
    """The model directory exists but cannot be loaded."""


class OptionError(SpeechRNTError, ValueError):
    """An option whose value is unknown or out of range."""


class Overloaded(SpeechRNTError, RuntimeError):  # noqa: N818
    """A bounded queue is full; nothing was queued, and a later attempt may succeed.

    Attributes
    ----------
    retry_after_s : float or None
        Seconds after which there may be room again, from the speed measured so far; None where
        nothing is known.
    """

    def __init__(self, message: str, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class SchedulerClosed(SpeechRNTError, RuntimeError):  # noqa: N818
    """The scheduler accepts no tasks: it was shut down, or belongs to a parent process."""


class DeadlineExceeded(SpeechRNTError, TimeoutError):  # noqa: N818
    """A task had not started when its deadline passed, and will not."""


class UtteranceError(SpeechRNTError, ValueError):
    """No streaming utterance of this name, or already one."""


class UtteranceClosed(SpeechRNTError, RuntimeError):  # noqa: N818
    """A streaming utterance that takes no more audio: it was finalized or cancelled, or failed."""


class PoolExhausted(SpeechRNTError, MemoryError):  # noqa: N818 - a state more than a mistake
    """A pool has reached its limit, or the system has no more memory."""


class PoolClosedError(SpeechRNTError, RuntimeError):
    """An acquire from a pool that is closed."""


class HandleError(SpeechRNTError, ValueError):
    """A handle that was released already, or is not of this pool."""


class GpuUnavailable(SpeechRNTError, RuntimeError):  # noqa: N818
    """There is no GPU, or something that is needed to use it is not installed."""


class GpuError(SpeechRNTError, RuntimeError):
    """The NVIDIA driver refused a call, or failed for good."""


class GpuOutOfMemory(PoolExhausted):
    """A pool of GPU memory is at its limit, or the GPU has no more memory.

    Attributes
    ----------
    statistics : GpuMemoryStatistics or None
        Of the pool, when the request failed.
    """

    def __init__(self, message: str, statistics: object = None):
        super().__init__(message)
        self.statistics = statistics
