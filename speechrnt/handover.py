"""The way of log-mel features to the GPU, without what CTranslate2's own way costs.

Given an array of the host, CTranslate2 copies it on the host, and from there to the GPU out of
memory that can be paged, which the driver copies once more. Here, the features are written into
page-locked memory, in float16 if the model computes in it, copied from there to a block of a
`GpuMemoryPool` on that pool's stream, and handed over as they are. CTranslate2 then makes one copy
on the GPU, before the encoder begins: so the block is free again when the call returns.

With ``SPEECHRNT_GPU_POOL=off``, without the GPU modules, and for models on several GPUs, features
go CTranslate2's way; the text is the same. So they do when one of the pools is at its limit, which
is counted.
"""

from __future__ import annotations

import os
import threading
import weakref
from dataclasses import dataclass
from typing import Any

import ctranslate2
import numpy as np
from numpy.typing import NDArray

from . import _mel, gpu, mempool
from ._gpu_types import GpuMemoryHealth, GpuMemoryStatistics
from .errors import OptionError, PoolExhausted
from .pools import AudioBufferPool, PoolLimits, PoolStatistics

__all__ = ["FeatureHandover", "HandoverStatistics", "open_handover", "status", "why_off"]

_VARIABLE = "SPEECHRNT_GPU_POOL"
_CHUNK = 32 << 20
_LEAST_CHUNK = 2 << 20  # which GPUs map at once
_LIMIT = 256 << 20  # features of 170 windows of the largest models in float32
_DTYPES: dict[str, np.dtype[Any]] = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
}
_STAGING = {"float32": "float32", "float16": "int16"}  # by size, as buffers have no float16

_lock = threading.Lock()
_pools: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()


@dataclass(frozen=True)
class HandoverStatistics:
    """Counters of a `FeatureHandover`.

    Attributes
    ----------
    handed_over
        Batches that went through the pool.
    fallbacks
        Batches that went CTranslate2's way, as a pool was at its limit.
    copied_bytes
        What was copied to the GPU from page-locked memory.
    pool
        The memory on the GPU.
    staging
        The page-locked memory.
    """

    handed_over: int
    fallbacks: int
    copied_bytes: int
    pool: GpuMemoryStatistics
    staging: PoolStatistics


class FeatureHandover:
    """Hands features to models on one GPU. Any number of threads may use it at once.

    Parameters
    ----------
    device
        Number of the GPU.
    dtype
        ``"float16"`` for models that compute in it, else ``"float32"``.
    pool
        A `speechrnt.gpu.GpuMemoryPool` of that device; by default one that all share, of 256 MiB at
        most.

    Raises
    ------
    OptionError
        If the type is another one, or the pool is of another device.
    GpuUnavailable
        If GPU memory cannot be used here.
    GpuError
        If the driver refused.
    """

    def __init__(self, device: int = 0, dtype: str = "float32", pool: Any = None) -> None:
        if dtype not in _DTYPES:
            raise OptionError(f"dtype: must be one of {', '.join(_DTYPES)}, not {dtype!r}")
        self.device = device
        self.dtype = dtype
        self.pool = _shared_pool(device) if pool is None else pool
        if self.pool.device != device:
            raise OptionError(f"pool: is of GPU {self.pool.device}, not {device}")
        self._staging = AudioBufferPool(
            PoolLimits(max_bytes=_LIMIT, soft_bytes=_LIMIT // 4), memory=gpu.pinned_memory(device)
        )
        self._counting = threading.Lock()
        self._counters = [0, 0, 0]

    def encode(
        self, whisper: ctranslate2.models.Whisper, features: NDArray[np.float32]
    ) -> ctranslate2.StorageView:
        """Run the encoder of a model on this GPU.

        Parameters
        ----------
        whisper
            The model.
        features : (batch, n_mels, frames) ndarray of float32
            C-contiguous.

        Returns
        -------
        (batch, (frames + 1) // 2, d_model) StorageView
            On the GPU.

        Raises
        ------
        GpuError
            If the driver refused.
        """
        if not features.size or features.ndim != 3:
            return whisper.encode(_storage_view(features))  # which says what is wrong
        try:
            block = self._copy(features)
        except PoolExhausted:
            self._count(1, 0)
            return whisper.encode(_storage_view(features))
        self._count(0, features.size * _DTYPES[self.dtype].itemsize)
        with block, mempool.current_device(self.device):
            # CTranslate2 takes it for memory of the device whose context is current.
            return whisper.encode(_storage_view(block))

    def _copy(self, features: NDArray[np.float32]) -> Any:
        """Return a block of GPU memory with the features in it."""
        rows = (-1, features.shape[-1])
        with self._staging.acquire(features.size, _STAGING[self.dtype]) as buffer:
            staged: NDArray[Any] = buffer.array.view(_DTYPES[self.dtype]).reshape(rows)
            _mel.cast(features.reshape(rows), staged)
            block = self.pool.allocate(features.shape, self.dtype)
            # On the pool's stream; CTranslate2's do not wait for it, so it is done on return.
            block.copy_from(staged)
        return block

    def _count(self, which: int, size: int) -> None:
        with self._counting:
            self._counters[which] += 1
            self._counters[2] += size

    def maintain(self) -> None:
        """Give back what recent demand does not explain, for `speechrnt.pools.maintain_on`."""
        self._staging.maintain()
        self.pool.maintain()

    def statistics(self) -> HandoverStatistics:
        """Read the counters."""
        with self._counting:
            handed_over, fallbacks, copied_bytes = self._counters
        return HandoverStatistics(
            handed_over=handed_over,
            fallbacks=fallbacks,
            copied_bytes=copied_bytes,
            pool=self.pool.statistics(),
            staging=self._staging.statistics(),
        )

    def health(self) -> GpuMemoryHealth:
        """Judge the memory on the GPU."""
        health: GpuMemoryHealth = self.pool.health()
        return health

    @property
    def staging_use(self) -> float:
        """Page-locked memory in use, as a share of its limit."""
        return self._staging.health().utilisation


def open_handover(
    device: int, compute_type: str, pool_bytes: int | None = None
) -> FeatureHandover | None:
    """Return what hands features to a model on one GPU; None if they go CTranslate2's way.

    Parameters
    ----------
    device
        Number of the GPU.
    compute_type
        What the model computes in, as `ctranslate2.models.Whisper.compute_type` tells.
    pool_bytes
        Limit of a pool for this model alone, at least what the GPU maps at once (2 MiB); 0 for
        CTranslate2's way. None: the pool that all share.

    Raises
    ------
    OptionError
        If the environment names an unknown mode, or the limit is too small.
    GpuError
        If the driver refused.
    """
    if why_off() is not None or pool_bytes == 0:
        return None
    is_half = compute_type in ("float16", "int8_float16")
    pool = None
    if pool_bytes is not None:
        # A pool is of whole chunks.
        chunk = min(_CHUNK, max(pool_bytes // _LEAST_CHUNK, 1) * _LEAST_CHUNK)
        pool = gpu.GpuMemoryPool(device, limit=pool_bytes, chunk=chunk)
    return FeatureHandover(device, "float16" if is_half else "float32", pool)


def why_off() -> str | None:
    """Return in one sentence why features go CTranslate2's way; None if they do not.

    Raises
    ------
    OptionError
        If the environment names an unknown mode.
    """
    mode = os.environ.get(_VARIABLE, "on")
    if mode not in ("on", "off"):
        raise OptionError(f"{_VARIABLE}={mode!r} is unknown; use on or off")
    return f"{_VARIABLE} is off" if mode == "off" else gpu.why_unavailable()


def status() -> str:
    """Tell in one line which way features go to a GPU, and why if it is CTranslate2's.

    Raises
    ------
    OptionError
        If the environment names an unknown mode.
    """
    reason = why_off()
    if reason is None:
        return "from page-locked memory, through a pool"
    return f"CTranslate2's way: {reason}"


def _shared_pool(device: int) -> Any:
    with _lock:
        pool = _pools.get(device)
        if pool is None:
            pool = _pools[device] = gpu.GpuMemoryPool(device, limit=_LIMIT)
        return pool


def _storage_view(array: Any) -> ctranslate2.StorageView:
    return ctranslate2.StorageView.from_array(array)
