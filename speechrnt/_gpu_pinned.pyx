"""Page-locked memory of the host, for pools of audio buffers.

The GPU copies from and to such memory at full speed, and while the host does something else.
"""

from cpython.mem cimport PyMem_Free, PyMem_Malloc
from cpython.pycapsule cimport PyCapsule_GetPointer, PyCapsule_New
from libc.string cimport memset
from speechrnt._audio_pool cimport sr_memory
from speechrnt._gpu_driver cimport (
    device_number, error_text, gpu_driver, pinned_alloc, pinned_free,
)

from speechrnt.errors import GpuError

__all__ = ["pinned_memory"]

cdef const char *NAME = b"speechrnt.sr_memory"


cdef struct Source:
    sr_memory memory  # first: the capsule points to it
    void *context
    int device


cdef void *source_alloc(void *ctx, size_t size, size_t alignment) noexcept nogil:
    # The driver locks whole pages, which is more alignment than any buffer asks for.
    cdef void *memory = NULL
    if gpu_driver().push_context((<Source *> ctx).context) != 0:
        return NULL
    if pinned_alloc(&memory, size) != 0:
        memory = NULL
    gpu_driver().pop_context()
    return memory


cdef void source_free(void *ctx, void *memory, size_t size) noexcept nogil:
    # With a dead context, or in a forked child, the driver refuses, and the process keeps it.
    if gpu_driver().push_context((<Source *> ctx).context) == 0:
        pinned_free(memory)
        gpu_driver().pop_context()


cdef void forget(object capsule) noexcept:
    cdef Source *source = <Source *> PyCapsule_GetPointer(capsule, NAME)
    gpu_driver().release_context(source.device)
    PyMem_Free(source)


def pinned_memory(device=0):
    """Return what makes an `AudioBufferPool` keep its buffers in page-locked memory.

    The system cannot swap such memory or use it otherwise: bound the pool, and keep what it needs
    in reserve, as locking pages takes long. A pool keeps the capsule, and the capsule the device's
    primary context.

    Parameters
    ----------
    device : int
        Number of the GPU in whose context it is allocated. All GPUs may copy from and to it.

    Returns
    -------
    capsule
        For `memory` of `AudioBufferPool`.

    Raises
    ------
    OptionError
        There is no such device.
    GpuUnavailable
        There is no driver that works.
    GpuError
        The driver refused.

    Examples
    --------
    >>> pool = AudioBufferPool(PoolLimits(max_bytes=2**26), memory=pinned_memory())
    """
    cdef Source *source
    cdef int code
    cdef int number = device_number(device)
    source = <Source *> PyMem_Malloc(sizeof(Source))
    if source == NULL:
        raise MemoryError
    memset(source, 0, sizeof(Source))
    code = gpu_driver().retain_context(number, &source.context)
    if code != 0:
        PyMem_Free(source)
        raise GpuError(f"GPU {number} cannot be used: {error_text(code)}")
    source.device = number
    source.memory.alloc = source_alloc
    source.memory.free = source_free
    source.memory.ctx = source
    try:
        return PyCapsule_New(source, NAME, forget)
    except MemoryError:
        gpu_driver().release_context(number)
        PyMem_Free(source)
        raise
