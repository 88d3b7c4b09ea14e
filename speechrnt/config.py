"""What the engine is configured with, and what suits a machine."""

from __future__ import annotations

from dataclasses import dataclass, fields
from numbers import Integral, Real

from . import mempool, system
from .errors import OptionError, SpeechRNTError

__all__ = ["HardwareProfile", "OptimizationConfig", "detect_hardware", "recommend"]

MIB = 1 << 20

# What an utterance holds while it is live: 30 s of audio and of features, and what it says.
_UTTERANCE_BYTES = 4 * MIB
# Share of the memory that utterances may hold; the rest is the model's and the program's.
_UTTERANCE_SHARE = 0.125
_UTTERANCES_PER_CORE = 16
_GPU_POOL_SHARE = 0.25
_LEAST_GPU_POOL_MIB = 2  # which GPUs map at once
_MOST_GPU_POOL_MIB = 1 << 20


@dataclass(frozen=True)
class OptimizationConfig:
    """Sizes and switches of a `PerformanceOptimizedSTT`.

    Attributes
    ----------
    audio_buffer_pool_size
        Buffers of audio and features that are kept at most, however high the demand was. More are
        made while they are needed, up to what the limits on requests and utterances allow.
    result_pool_size
        Records of what utterances have said that are kept at most, rounded up to chunks of 64 KiB,
        however many there were; None: twice as many. More are made while they are needed.
    enable_gpu_memory_pool
        Whether features reach a GPU through pooled memory there.
    gpu_memory_pool_size_mb
        MiB of that pool; None: a quarter of what is free on the GPU.
    retain_inference_memory
        Whether the memory that CTranslate2 uses for a call is kept for the next. On the CPU that
        concerns the whole process: see `speechrnt.inference_memory`.
    thread_pool_size
        Workers of the scheduler; None: the cores this process may use.
    enable_work_stealing
        Whether a worker without work takes what another one's task has spawned.
    enable_priority_scheduling
        Whether priorities count. Without it, all that comes is NORMAL.
    enable_async_processing
        Whether audio is read and results are made by the scheduler. Without it, the thread that
        calls and the threads of the model do it, and there is no scheduler.
    max_concurrent_utterances
        Streams that may be open at the same time.
    max_queued_requests
        One-shot requests that may wait or run at the same time.
    max_batch_size
        Windows that the model decodes at once, at most.
    model_workers
        Calls of the model at the same time. None: on the CPU, as many as there are cores for
        `cpu_threads` each; 1 on a GPU.
    cpu_threads
        Threads of each call on the CPU; None: 1 up to 4 cores, a quarter of the cores beyond.
    cleanup_interval_s
        Seconds between two rounds that free what is idle.
    stall_after_s
        Seconds after which a task that has not ended, or a stream of which nothing came, counts as
        stalled.

    Raises
    ------
    OptionError
        If a value is out of range.
    """

    audio_buffer_pool_size: int = 128
    result_pool_size: int | None = None
    enable_gpu_memory_pool: bool = True
    gpu_memory_pool_size_mb: int | None = None
    retain_inference_memory: bool = True
    thread_pool_size: int | None = None
    enable_work_stealing: bool = True
    enable_priority_scheduling: bool = True
    enable_async_processing: bool = True
    max_concurrent_utterances: int = 64
    max_queued_requests: int = 256
    max_batch_size: int = 8
    model_workers: int | None = None
    cpu_threads: int | None = None
    cleanup_interval_s: float = 2.0
    stall_after_s: float = 30.0

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name in _FLAGS:
                if not isinstance(value, bool):
                    raise OptionError(f"{field.name}: must be True or False, not {value!r}")
                continue
            kind, least, most, optional = _RANGES[field.name]
            if value is None and optional:
                continue
            # NaN compares false.
            good = isinstance(value, kind) and not isinstance(value, bool)
            if not good or not least <= value <= most:
                what = "a whole number" if kind is Integral else "a number"
                none = ", or None" if optional else ""
                raise OptionError(
                    f"{field.name}: must be {what} from {least} to {most}{none}, not {value!r}"
                )

    @property
    def result_records(self) -> int:
        """`result_pool_size`, or what stands for None."""
        return self.result_pool_size or 2 * self.audio_buffer_pool_size

    def gpu_pool_bytes(self, free_bytes: int | None) -> int | None:
        """Return the limit of the pool on a GPU with so much memory free; 0 for no pool.

        None if nothing is known.
        """
        if not self.enable_gpu_memory_pool:
            return 0
        if self.gpu_memory_pool_size_mb is not None:
            return self.gpu_memory_pool_size_mb * MIB
        return (
            None
            if free_bytes is None
            else max(int(free_bytes * _GPU_POOL_SHARE), _LEAST_GPU_POOL_MIB * MIB)
        )

    def model_threads(self, device: str, cores: int) -> tuple[int, int]:
        """Return how many calls run at the same time, and how many threads each of them has.

        Parameters
        ----------
        device
            ``"cpu"`` or ``"cuda"``.
        cores
            Cores to share.
        """
        threads = self.cpu_threads or max(1, cores // 4)
        if device == "cuda":
            return self.model_workers or 1, threads
        return self.model_workers or max(1, cores // threads), threads


_FLAGS = frozenset(field.name for field in fields(OptimizationConfig) if field.type == "bool")

# type, least, most, whether None will do
_RANGES: dict[str, tuple[type, float, float, bool]] = {
    "audio_buffer_pool_size": (Integral, 1, 65_536, False),
    "result_pool_size": (Integral, 1, 65_536, True),
    "gpu_memory_pool_size_mb": (Integral, _LEAST_GPU_POOL_MIB, _MOST_GPU_POOL_MIB, True),
    "thread_pool_size": (Integral, 1, 64, True),
    "max_concurrent_utterances": (Integral, 1, 65_536, False),
    "max_queued_requests": (Integral, 1, 65_536, False),
    "max_batch_size": (Integral, 1, 256, False),
    "model_workers": (Integral, 1, 64, True),
    "cpu_threads": (Integral, 1, 256, True),
    "cleanup_interval_s": (Real, 0.01, 3600, False),
    "stall_after_s": (Real, 0.01, 3600, False),
}


@dataclass(frozen=True)
class HardwareProfile:
    """What there is to use.

    Attributes
    ----------
    cores
        CPU cores that this process may keep busy, by its affinity and the quota of its container.
    memory_bytes
        Memory that it may use.
    gpu_bytes
        Free memory of the first GPU; None if there is no GPU, or it cannot be asked.
    """

    cores: int
    memory_bytes: int
    gpu_bytes: int | None = None


def detect_hardware() -> HardwareProfile:
    """Return what this process can use of the machine it runs on."""
    return HardwareProfile(system.usable_cores(), system.usable_memory(), free_gpu_bytes())


def free_gpu_bytes(device: int = 0) -> int | None:
    """Return the free memory of a GPU; None if there is no such GPU, or it cannot be asked."""
    try:
        free, _ = mempool.free_memory(device)
    except SpeechRNTError:
        return None
    return free


def recommend(hardware: HardwareProfile) -> OptimizationConfig:
    """Return the configuration for some hardware.

    Every value is within the ranges that are sensible anywhere: 20 to 100 utterances, as many as
    cores and memory allow; 50 to 200 audio buffers, two per utterance; clean-up every 2 to 5 s,
    sooner where memory is short.

    Raises
    ------
    OptionError
        If there is no core or no memory.
    """
    if hardware.cores < 1 or hardware.memory_bytes < 1:
        raise OptionError(f"there is no machine like this: {hardware}")
    by_memory = hardware.memory_bytes * _UTTERANCE_SHARE / _UTTERANCE_BYTES
    by_cores = hardware.cores * _UTTERANCES_PER_CORE
    if hardware.gpu_bytes is not None:
        by_cores = 100
    utterances = _clamp(min(by_memory, by_cores), 20, 100)
    buffers = _clamp(2 * utterances, 50, 200)
    gib = hardware.memory_bytes / (1 << 30)
    gpu_pool = None
    if hardware.gpu_bytes is not None:
        gpu_pool = _clamp(
            hardware.gpu_bytes * _GPU_POOL_SHARE / MIB, _LEAST_GPU_POOL_MIB, _MOST_GPU_POOL_MIB
        )
    return OptimizationConfig(
        audio_buffer_pool_size=buffers,
        result_pool_size=2 * buffers,
        enable_gpu_memory_pool=hardware.gpu_bytes is not None,
        gpu_memory_pool_size_mb=gpu_pool,
        thread_pool_size=_clamp(hardware.cores, 1, 64),
        max_concurrent_utterances=utterances,
        max_batch_size=8 if hardware.gpu_bytes is None else 16,
        cleanup_interval_s=float(min(max(gib / 4, 2.0), 5.0)),
    )


def _clamp(value: float, least: int, most: int) -> int:
    return int(min(max(value, least), most))
