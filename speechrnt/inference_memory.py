"""Where CTranslate2 keeps its tensors, on the CPU and on GPUs.

A Whisper encoder allocates the attention scores of a 30 s window anew in every layer, 54 MB for the
shape of tiny, and returns them. glibc gives blocks that large back to the system at once, which
makes the next layer fault in every page again: a quarter to a half of the encoder's time. So the
first model that is loaded on the CPU puts a pool under CTranslate2 that keeps this memory.

There is one pool for the whole process. It serves CTranslate2 and nothing else, and blocks of
512 KiB and more: temporaries, outputs that are still referenced, and weights.

On a GPU it is the driver that gives all memory back as soon as the GPU is idle. There, the first
model has the driver's own pool keep it, or gets a pool with a limit: see `speechrnt.mempool`.

Every function here may be called from any thread at any time, and takes the device: ``"cpu"``,
``"cuda"`` for the first GPU, or ``"cuda:1"`` and so on. The environment variable
``SPEECHRNT_INFERENCE_MEMORY`` chooses the mode of `configure` for programs that do not call it.
"""

from __future__ import annotations

import os
import re
import threading
from dataclasses import dataclass
from typing import Literal, overload

from . import _inference_memory, mempool
from .errors import GpuError, GpuUnavailable, OptionError
from .mempool import GpuInferenceMemory
from .system import usable_memory

__all__ = [
    "MODES",
    "InferenceMemory",
    "configure",
    "maintain",
    "prepare",
    "statistics",
    "status",
    "trim",
]

MODES = ("pool", "mallopt", "off")

_VARIABLE = "SPEECHRNT_INFERENCE_MEMORY"
_SMALLEST_LIMIT = 2 << 20
_KEEP_S = 10

_lock = threading.Lock()
_status: str | None = None  # None until a mode is in effect on the CPU
_gpus: dict[int, str] = {}  # those on which a mode is in effect, and what hindered it if anything


@dataclass(frozen=True)
class InferenceMemory:
    """Counters of the CPU's pool, read at one moment. Sizes are in bytes, counts since the start.

    Attributes
    ----------
    limit
        Bound on `reserved`; 0 while the pool is not used.
    in_use
        Size of the blocks that CTranslate2 holds.
    peak
        Largest `in_use` so far.
    reserved
        Memory that may be resident, in pages of 2 MiB: `in_use` and what is kept for later.
    blocks
        Number of blocks that CTranslate2 holds.
    hits
        Blocks that were resident already: no page faults.
    misses
        Blocks with pages that had to be faulted in.
    overflows
        Blocks that did not fit under the limit and were left to libc.
    trims
        Times that idle memory was given back to the system.
    """

    limit: int
    in_use: int
    peak: int
    reserved: int
    blocks: int
    hits: int
    misses: int
    overflows: int
    trims: int


def configure(mode: str = "pool", limit: int | None = None, device: str = "cpu") -> None:
    """Choose how CTranslate2's memory is kept, from now on, for the whole process.

    What was allocated before stays where it is.

    Parameters
    ----------
    mode
        ``"pool"``; ``"off"``, which leaves new blocks to libc or the driver; or ``"mallopt"``,
        which has glibc keep the memory of large blocks, for where the pool cannot be used. That
        concerns everything else in the process, too, has no limit, and cannot be undone.
    limit
        Bound of the pool's memory in bytes. On the CPU at least 2 MiB, by default half of the
        memory that this process may use; blocks beyond it are left to libc. On a GPU at least 32
        MiB, by default none: the device's own pool is used then. CTranslate2 raises beyond it.
    device
        ``"cpu"``, ``"cuda"`` or ``"cuda:<number>"``.

    Raises
    ------
    OptionError
        If the mode or the device is unknown, or the limit is too small.

    Notes
    -----
    A mode that cannot be had here is no error: everything works without it, and `status` tells why.
    The pool has to come before CTranslate2 loads its first model.
    """
    gpu = _gpu_number(device)
    if mode not in MODES:
        raise OptionError(f"inference memory: {mode!r} is unknown; use one of {', '.join(MODES)}")
    if gpu is not None:
        if mode == "mallopt":
            raise OptionError("inference memory: 'mallopt' is for the CPU; use 'pool' or 'off'")
        with _lock:
            _apply_to_gpu(gpu, mode, limit)
        return
    if limit is not None and not _is_int(limit, _SMALLEST_LIMIT, 2**63 - 1):
        raise OptionError(
            f"inference memory: the limit must be a number of bytes, at least 2 MiB, not {limit!r}"
        )
    with _lock:
        _apply(mode, limit)


def _is_int(value: object, least: int, most: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


def prepare(device: str = "cpu") -> None:
    """Put the mode of the environment into effect, unless one is; before a model is loaded.

    ``mallopt`` is for the CPU: with it, GPUs get the pool.

    Raises
    ------
    OptionError
        If the environment names an unknown mode, or the device is unknown.
    """
    gpu = _gpu_number(device)
    with _lock:
        if gpu is not None:
            if gpu not in _gpus:
                _apply_to_gpu(gpu, "off" if _default_mode() == "off" else "pool", None)
        elif _status is None:
            _apply(_default_mode(), None)


def _gpu_number(device: str) -> int | None:
    """Return which GPU it is; None for the CPU."""
    if device == "cpu":
        return None
    match = re.fullmatch(r"cuda(?::(\d{1,4}))?", device) if isinstance(device, str) else None
    if match is None:
        raise OptionError(f"device: {device!r} is unknown; use 'cpu', 'cuda' or 'cuda:<number>'")
    return int(match[1] or 0)


def _default_mode() -> str:
    mode = os.environ.get(_VARIABLE, "pool")
    if mode not in MODES:
        raise OptionError(f"{_VARIABLE}={mode!r} is unknown; use one of {', '.join(MODES)}")
    return mode


def _apply(mode: str, limit: int | None) -> None:
    global _status
    if mode == "pool":
        limit = usable_memory() // 2 if limit is None else limit
        obstacle = _inference_memory.install(limit)
        _status = _describe_pool(obstacle) + ("" if obstacle else f", up to {limit >> 20} MiB")
        return
    _inference_memory.set_limit(0)
    if mode == "off":
        _status = "off, as configured"
    elif _inference_memory.tune_malloc():
        _status = "kept by glibc (mallopt)"
    else:
        _status = "off: mallopt needs glibc"


def _apply_to_gpu(gpu: int, mode: str, limit: int | None) -> None:
    obstacle = ""
    try:
        if mode == "off":
            mempool.restore_inference_memory(gpu)
        elif limit is None:
            if mempool.inference_memory(gpu).owner == "speechrnt":
                mempool.restore_inference_memory(gpu)  # there was a limit before
            mempool.retain_inference_memory(gpu)
        else:
            mempool.cap_inference_memory(limit, gpu)
    except (GpuUnavailable, GpuError) as error:
        obstacle = f"off: {error}"
    _gpus[gpu] = obstacle


def _describe_pool(obstacle: str | None) -> str:
    return f"off: CTranslate2's library: {obstacle}" if obstacle else "pool"


@overload
def statistics(device: Literal["cpu"] = "cpu") -> InferenceMemory: ...
@overload
def statistics(device: str) -> InferenceMemory | GpuInferenceMemory: ...
def statistics(device: str = "cpu") -> InferenceMemory | GpuInferenceMemory:
    """Read how much memory CTranslate2 holds on a device, and how much is kept for it.

    `limit`, `in_use`, `peak` and `reserved` are there for all devices; what else there is depends
    on the pool.

    Raises
    ------
    OptionError
        If the device is unknown.
    GpuUnavailable
        If there is no such GPU, or nothing can be said of its memory.
    GpuError
        If the driver refused.
    """
    gpu = _gpu_number(device)
    if gpu is not None:
        return mempool.inference_memory(gpu)
    return InferenceMemory(**_inference_memory.counters())


def status(device: str = "cpu") -> str:
    """Tell in one line how CTranslate2's memory is kept, and why not by the pool if it is not.

    Before a mode is in effect, that is what can be foreseen.

    Raises
    ------
    OptionError
        If the environment names an unknown mode, or the device is unknown.
    """
    gpu = _gpu_number(device)
    if gpu is not None:
        return _gpu_status(gpu)
    if _status is not None:
        return _status
    mode = _default_mode()
    return _describe_pool(_inference_memory.why_not()) if mode == "pool" else mode


def _gpu_status(gpu: int) -> str:
    if gpu in _gpus:
        return _gpus[gpu] or mempool.inference_memory_status(gpu)
    if _default_mode() == "off":
        return "off"
    obstacle = mempool.why_not_steerable(gpu)
    return "pool" if obstacle is None else f"off: {obstacle}"


def trim(idle_s: int = 0, device: str = "cpu") -> int:
    """Give idle memory back to the system, or to the GPU.

    While models are used on the CPU, what was idle for ten seconds is given back anyway. When
    nothing uses them any more, nothing runs that could do it, unless `maintain` does: call this
    then, or after unloading a model. On a GPU, nothing is given back without it, and it waits until
    the GPU is idle.

    Parameters
    ----------
    idle_s
        Keep what was used in the last so many seconds; on the CPU only.
    device
        ``"cpu"``, ``"cuda"`` or ``"cuda:<number>"``.

    Returns
    -------
    int
        Bytes given back.

    Raises
    ------
    OptionError
        If the device is unknown, `idle_s` is not a whole number of seconds, 0 or more, or it is
        given for a GPU.
    GpuUnavailable
        If there is no such GPU, or its memory cannot be steered.
    GpuError
        If the driver refused.
    """
    gpu = _gpu_number(device)
    if not _is_int(idle_s, 0, 2**31 - 1):
        raise OptionError(f"inference memory: idle_s must be whole seconds, not {idle_s!r}")
    if gpu is None:
        return _inference_memory.trim(idle_s)
    if idle_s:
        raise OptionError("idle_s: a GPU's memory pool does not know when memory was used; use 0")
    return mempool.trim_inference_memory(device=gpu)


def maintain() -> None:
    """Give back what has been idle for ten seconds, for `speechrnt.pools.maintain_on`."""
    trim(_KEEP_S)
