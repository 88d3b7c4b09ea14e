"""Where CTranslate2 keeps its tensors on a GPU: the driver's memory pool, steered.

CTranslate2 takes all its GPU memory, weights included, from the current memory pool of the device
(``cudaMallocAsync``), and synchronises its stream whenever a worker has nothing more to do. With
the driver's default release threshold of 0, each such moment gives everything that is not in use
back to the system, and the next request has to map it again. So the first model that is loaded on a
GPU has its pool keep the memory (`retain_inference_memory`); before that, a pool of our own with a
limit can be put in its place (`cap_inference_memory`).

The pool belongs to the device and the process: PyTorch and others may use it too. Where one of them
has installed a pool or set a threshold, it is left as it is. What a pool holds and does not use is
invisible to other processes, and to ``cudaMalloc``, until `trim_inference_memory`.

Every function may be called from any thread at any time. Devices are numbered as CUDA does.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from .errors import GpuError, GpuUnavailable, OptionError
from .system import why_no_cuda

__all__ = [
    "GpuInferenceMemory",
    "cap_inference_memory",
    "current_device",
    "free_memory",
    "inference_memory",
    "inference_memory_status",
    "restore_inference_memory",
    "retain_inference_memory",
    "trim_inference_memory",
    "why_not_steerable",
]

_ALLOCATOR_VARIABLE = "CT2_CUDA_ALLOCATOR"
_STREAM_ORDERED = "cuda_malloc_async"  # CTranslate2's default where all devices have memory pools
_EVERYTHING = 2**64 - 1
_SMALLEST_LIMIT = 32 << 20
_BEYOND = 64 << 20  # more than a driver may round a limit up by


@dataclass(frozen=True)
class GpuInferenceMemory:
    """What the current memory pool of a GPU holds, in bytes.

    The first four mean what they mean for `speechrnt.inference_memory.InferenceMemory` on the CPU.

    Attributes
    ----------
    limit
        Bound on `reserved`; 0 if there is none but that of the GPU.
    in_use
        What CTranslate2, and whoever else takes memory from this pool, holds: weights, and what
        running calls need.
    peak
        Largest `in_use` so far.
    reserved
        Memory taken from the GPU: `in_use` and what is kept for later.
    peak_reserved
        Largest `reserved` so far.
    threshold
        What may stay reserved when a stream is synchronised; 0 means that nothing is kept.
    owner
        Whose pool it is: ``"device"`` for the one that each device has, ``"speechrnt"`` for that of
        `cap_inference_memory`, ``"other"`` for one that someone else has installed.
    """

    limit: int
    in_use: int
    peak: int
    reserved: int
    peak_reserved: int
    threshold: int
    owner: str


@dataclass
class _Steered:
    """What was done to a device, and is to be undone."""

    context: Any  # retained as long as this exists
    threshold: int | None = None  # that the device's own pool had; None if it was not changed
    pool: Any = None  # ours
    limit: int = 0


_lock = threading.RLock()
_steered: dict[int, _Steered] = {}


def _forget_in_child() -> None:
    """After a fork there is nothing to undo: the child cannot use the parent's CUDA."""
    global _lock
    _lock = threading.RLock()
    _steered.clear()


os.register_at_fork(after_in_child=_forget_in_child)


def retain_inference_memory(device: int = 0, threshold: int | None = None) -> bool:
    """Have the GPU's memory pool keep what CTranslate2 gives back, for its next call.

    Parameters
    ----------
    device
        Number of the GPU.
    threshold
        How many bytes may stay reserved when nothing is running, at least 1; all by default. Where
        other programs share the GPU, what a typical batch needs is a good choice.

    Returns
    -------
    bool
        Whether it is kept. False if someone else has installed a pool for this device: nothing is
        changed then. A threshold that someone else has set is not changed either.

    Raises
    ------
    GpuUnavailable
        If there is no such GPU, or CTranslate2 does not take its memory from a pool of the driver;
        the message is that of `why_not_steerable`.
    OptionError
        If the threshold is not a positive number of bytes.
    GpuError
        If the driver refused.
    """
    _check_bytes("threshold", threshold, 1)
    with _lock:
        driver = _steerable(device)
        current = _call(driver.cuDeviceGetMemPool, device)
        state = _steered.get(device)
        if state is not None and state.pool is not None and _same(current, state.pool):
            return True
        default = _call(driver.cuDeviceGetDefaultMemPool, device)
        if not _same(current, default):
            return False
        found = _get(driver, default, "RELEASE_THRESHOLD")
        is_ours = state is not None and state.threshold is not None
        if found and not is_ours:
            return True
        if state is None:
            state = _begin(driver, device)
        try:
            _set_threshold(driver, default, _EVERYTHING if threshold is None else threshold)
            if state.threshold is None:
                state.threshold = found
        finally:
            _end_if_untouched(driver, device)
        return True


def cap_inference_memory(limit: int, device: int = 0) -> None:
    """Give CTranslate2 a memory pool of its own on a GPU, with a limit; it keeps all up to there.

    It serves what is allocated from now on, so it should be called before a model is loaded.
    Called again, it replaces the limit for new memory.

    Parameters
    ----------
    limit
        Most memory in bytes that the pool takes, at least 32 MiB. CTranslate2 does not try again
        when it is reached: the call that needed more raises. `speechrnt.sizing.fit` tells what is
        needed.
    device
        Number of the GPU.

    Raises
    ------
    GpuUnavailable
        As for `retain_inference_memory`, and if this driver's pools cannot be limited.
    OptionError
        If the limit is too small or not a number of bytes.
    GpuError
        If someone else has installed a pool for this device, or the driver refused. Nothing has
        changed then.
    """
    _check_bytes("limit", limit, _SMALLEST_LIMIT)
    with _lock:
        driver = _steerable(device)
        current = _call(driver.cuDeviceGetMemPool, device)
        default = _call(driver.cuDeviceGetDefaultMemPool, device)
        state = _steered.get(device)
        ours = None if state is None else state.pool
        if not _same(current, default) and not (ours is not None and _same(current, ours)):
            raise GpuError(
                f"CUDA device {device}: another library has installed a memory pool, which is left "
                "as it is; set the limit there, or before that library is used"
            )
        if state is None:
            state = _begin(driver, device)
        try:
            pool = _create_pool(driver, device, limit, state.context)
            try:
                _call(driver.cuDeviceSetMemPool, device, pool)
            except GpuError:
                _call(driver.cuMemPoolDestroy, pool)
                raise
            state.pool, state.limit = pool, limit
        finally:
            _end_if_untouched(driver, device)
        _restore_threshold(driver, device, state)
        if ours is not None:
            # It lives on until what was allocated from it is given back.
            _call(driver.cuMemPoolDestroy, ours)


def restore_inference_memory(device: int = 0) -> None:
    """Undo what was done to a GPU's memory pool here; nothing where nothing was.

    What is allocated stays, and goes back to where it came from. Memory that was kept is given back
    when a stream is next synchronised.

    Raises
    ------
    GpuError
        If the driver refused.
    """
    with _lock:
        state = _steered.get(device)
        if state is None:
            return
        driver = _driver()
        if state.pool is not None:
            # If it is the current one, the device's own takes its place.
            _call(driver.cuMemPoolDestroy, state.pool)
            state.pool, state.limit = None, 0
        _restore_threshold(driver, device, state)
        _end_if_untouched(driver, device)


def inference_memory(device: int = 0) -> GpuInferenceMemory:
    """Read what the current memory pool of a GPU holds.

    Raises
    ------
    GpuUnavailable
        If there is no such GPU, or CTranslate2 does not take its memory from a pool of the driver.
    GpuError
        If the driver refused.
    """
    with _lock:
        driver = _steerable(device)
        current = _call(driver.cuDeviceGetMemPool, device)
        state = _steered.get(device)
        limit, owner = 0, "other"
        if state is not None and state.pool is not None and _same(current, state.pool):
            limit, owner = state.limit, "speechrnt"
        elif _same(current, _call(driver.cuDeviceGetDefaultMemPool, device)):
            owner = "device"
        return GpuInferenceMemory(
            limit=limit,
            in_use=_get(driver, current, "USED_MEM_CURRENT"),
            peak=_get(driver, current, "USED_MEM_HIGH"),
            reserved=_get(driver, current, "RESERVED_MEM_CURRENT"),
            peak_reserved=_get(driver, current, "RESERVED_MEM_HIGH"),
            threshold=_get(driver, current, "RELEASE_THRESHOLD"),
            owner=owner,
        )


def trim_inference_memory(keep: int = 0, device: int = 0) -> int:
    """Give memory that the GPU's current memory pool does not use back to the GPU.

    It waits until everything that the GPU has been given to do is done, as what was returned
    before that is still in use.

    Parameters
    ----------
    keep
        How many bytes may stay reserved.
    device
        Number of the GPU.

    Returns
    -------
    int
        Bytes given back.

    Raises
    ------
    GpuUnavailable
        As for `inference_memory`.
    OptionError
        If `keep` is negative or not a number of bytes.
    GpuError
        If the driver refused.
    """
    _check_bytes("keep", keep, 0)
    with _lock:
        driver = _steerable(device)
        pool = _call(driver.cuDeviceGetMemPool, device)
        before = _get(driver, pool, "RESERVED_MEM_CURRENT")
        if before <= keep:
            return 0
        with _device_context(driver, device):
            _call(driver.cuCtxSynchronize)
        _call(driver.cuMemPoolTrimTo, pool, keep)
        return max(0, before - _get(driver, pool, "RESERVED_MEM_CURRENT"))


def inference_memory_status(device: int = 0) -> str:
    """Tell in one line how CTranslate2's memory on a GPU is kept, or why it is not."""
    try:
        now = inference_memory(device)
    except (GpuUnavailable, GpuError) as error:
        return f"off: {error}"
    if now.owner == "speechrnt":
        return f"pool, up to {now.limit >> 20} MiB"
    if now.owner == "other":
        return "left to the pool that another library has installed"
    if now.threshold == 0:
        return "off: given back whenever the GPU is idle"
    size = "all" if now.threshold == _EVERYTHING else f"up to {now.threshold >> 20} MiB"
    return f"kept by the device's pool, {size}"


def why_not_steerable(device: int = 0) -> str | None:
    """Return in one sentence why CTranslate2's memory on a GPU cannot be steered; None if it can.

    Raises
    ------
    OptionError
        If `device` is not a number from 0.
    """
    with _lock:
        try:
            _steerable(device)
        except (GpuUnavailable, GpuError) as error:
            return str(error)
    return None


def free_memory(device: int = 0) -> tuple[int, int]:
    """Return how many bytes of a GPU are free, and how many it has.

    What a memory pool keeps without using it counts as free here, as CTranslate2 can have it.

    Raises
    ------
    GpuUnavailable
        If there is no such GPU.
    GpuError
        If the driver refused.
    """
    with _lock:
        driver = _open(device)
        with _device_context(driver, device):
            free, total = _call(driver.cuMemGetInfo)
        if _why_not_pooled(driver) is None:
            pool = _call(driver.cuDeviceGetMemPool, device)
            free += _get(driver, pool, "RESERVED_MEM_CURRENT")
            free -= _get(driver, pool, "USED_MEM_CURRENT")
        return int(free), int(total)


def _driver() -> ModuleType:
    """Return the Python bindings of the driver."""
    reason = why_no_cuda()
    if reason is not None:
        raise GpuUnavailable(reason)
    try:
        # Imported here, as it takes a tenth of a second, and is an extra.
        from cuda.bindings import driver
    except ImportError as error:
        raise GpuUnavailable(
            "cuda-bindings is not installed (pip install 'speechrnt[gpu]')"
        ) from error
    return driver  # type: ignore[no-any-return]


def _open(device: int) -> ModuleType:
    """Return the driver, if it has this device."""
    if isinstance(device, bool) or not isinstance(device, int) or device < 0:
        raise OptionError(f"device: must be a whole number from 0, not {device!r}")
    driver = _driver()
    _call(driver.cuInit, 0)
    count = _call(driver.cuDeviceGetCount)
    if device >= count:
        raise GpuUnavailable(f"there is no CUDA device {device}: the driver sees {count}")
    return driver


def _steerable(device: int) -> ModuleType:
    """Return the driver, if CTranslate2 takes its memory from this device's memory pool."""
    driver = _open(device)
    reason = _why_not_pooled(driver)
    if reason is not None:
        raise GpuUnavailable(reason)
    return driver


def _why_not_pooled(driver: ModuleType) -> str | None:
    chosen = os.environ.get(_ALLOCATOR_VARIABLE, _STREAM_ORDERED)
    if chosen != _STREAM_ORDERED:
        return (
            f"{_ALLOCATOR_VARIABLE}={chosen} has CTranslate2 keep GPU memory itself, where it "
            "cannot be steered; unset it before Python starts"
        )
    # CTranslate2 asks them all, and takes its other allocator if one has none.
    attribute = driver.CUdevice_attribute.CU_DEVICE_ATTRIBUTE_MEMORY_POOLS_SUPPORTED
    for device in range(_call(driver.cuDeviceGetCount)):
        if not _call(driver.cuDeviceGetAttribute, attribute, device):
            return f"CUDA device {device} has no memory pools, so CTranslate2 uses none"
    return None


def _call(function: Any, *arguments: Any) -> Any:
    """Return what a call of the driver gives, and raise what it refuses."""
    try:
        code, *results = function(*arguments)
    except RuntimeError as error:  # the driver is too old to have the function
        raise GpuError(f"{function.__name__}: {error}") from error
    if int(code):
        raise GpuError(f"{function.__name__}: the NVIDIA driver returned {code.name}")
    if not results:
        return None
    return results[0] if len(results) == 1 else results


def _same(one: Any, other: Any) -> bool:
    return int(one) == int(other)


def _get(driver: ModuleType, pool: Any, name: str) -> int:
    attribute = getattr(driver.CUmemPool_attribute, f"CU_MEMPOOL_ATTR_{name}")
    return int(_call(driver.cuMemPoolGetAttribute, pool, attribute))


def _set_threshold(driver: ModuleType, pool: Any, size: int) -> None:
    attribute = driver.CUmemPool_attribute.CU_MEMPOOL_ATTR_RELEASE_THRESHOLD
    _call(driver.cuMemPoolSetAttribute, pool, attribute, driver.cuuint64_t(size))


def _restore_threshold(driver: ModuleType, device: int, state: _Steered) -> None:
    if state.threshold is not None:
        _set_threshold(driver, _call(driver.cuDeviceGetDefaultMemPool, device), state.threshold)
        state.threshold = None


def _begin(driver: ModuleType, device: int) -> _Steered:
    """Retain the context that CTranslate2 uses: what is set lives as long as it is wanted."""
    state = _steered[device] = _Steered(_call(driver.cuDevicePrimaryCtxRetain, device))
    return state


def _end_if_untouched(driver: ModuleType, device: int) -> None:
    state = _steered[device]
    if state.pool is None and state.threshold is None:
        del _steered[device]
        _call(driver.cuDevicePrimaryCtxRelease, device)


@contextlib.contextmanager
def current_device(device: int) -> Iterator[None]:
    """Within it, a GPU is the one that CTranslate2 works on in this thread.

    Raises
    ------
    GpuUnavailable
        If there is no such GPU.
    GpuError
        If the driver refused.
    """
    with _device_context(_open(device), device):
        yield


@contextlib.contextmanager
def _device_context(driver: ModuleType, device: int) -> Iterator[None]:
    """Make the device's primary context, which CTranslate2 uses, that of this thread."""
    context = _call(driver.cuDevicePrimaryCtxRetain, device)
    try:
        with _current(driver, context):
            yield
    finally:
        _call(driver.cuDevicePrimaryCtxRelease, device)


@contextlib.contextmanager
def _current(driver: ModuleType, context: Any) -> Iterator[None]:
    _call(driver.cuCtxPushCurrent, context)
    try:
        yield
    finally:
        _call(driver.cuCtxPopCurrent)


def _create_pool(driver: ModuleType, device: int, limit: int, context: Any) -> Any:
    """Create a pool, and make sure that it keeps to its limit."""
    properties = driver.CUmemPoolProps()
    properties.allocType = driver.CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED
    properties.location.type = driver.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
    properties.location.id = device
    properties.maxSize = limit
    pool = _call(driver.cuMemPoolCreate, properties)
    try:
        _set_threshold(driver, pool, _EVERYTHING)
        with _current(driver, context):
            # Drivers that do not know the field ignore it.
            code, block = driver.cuMemAllocFromPoolAsync(limit + _BEYOND, pool, None)
            if int(code) == int(driver.CUresult.CUDA_SUCCESS):
                _call(driver.cuMemFreeAsync, block, None)
                _call(driver.cuStreamSynchronize, None)
                raise GpuUnavailable(
                    "memory pools cannot be limited with this NVIDIA driver; a newer one can"
                )
            if int(code) != int(driver.CUresult.CUDA_ERROR_OUT_OF_MEMORY):
                raise GpuError(f"cuMemAllocFromPoolAsync: the NVIDIA driver returned {code.name}")
    except BaseException:
        _call(driver.cuMemPoolDestroy, pool)
        raise
    return pool


def _check_bytes(option: str, value: object, least: int) -> None:
    if value is None and option == "threshold":
        return
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= _EVERYTHING:
        raise OptionError(f"{option}: must be a number of bytes from {least}, not {value!r}")
