"""Takes and frees blocks of speechrnt's pool of GPU memory without the GIL.

Builds without CUDA's headers. Import it where `speechrnt.gpu.available()`.
"""

from libc.stdint cimport uint64_t
from speechrnt.capi cimport SR_ABI_VERSION, SR_EXHAUSTED, SR_OK, SR_STALE, sr_abi_version
from speechrnt.capi_gpu cimport (
    sr_gpu_alloc,
    sr_gpu_alloc_on,
    sr_gpu_flush,
    sr_gpu_free,
    sr_gpu_free_on,
    sr_gpu_get,
    sr_gpu_pool,
    sr_gpu_pool_of,
    sr_gpu_pool_use,
)

if sr_abi_version() != SR_ABI_VERSION:
    raise ImportError(
        f"built for version {SR_ABI_VERSION} of speechrnt's C interface, "
        f"but version {sr_abi_version()} is installed"
    )


def rounds(object gpu_memory_pool, size_t size, long n):
    """Take and free a block of a speechrnt.gpu.GpuMemoryPool n times; count failures."""
    cdef sr_gpu_pool *pool = sr_gpu_pool_of(gpu_memory_pool)
    cdef uint64_t handle = 0
    cdef uint64_t address = 0
    cdef long failures = 0
    with nogil:
        for _ in range(n):
            failures += sr_gpu_alloc(pool, size, &handle, &address) != SR_OK
            failures += sr_gpu_get(pool, handle) != address
            failures += sr_gpu_free(pool, handle) != SR_OK
        failures += sr_gpu_free(pool, handle) != SR_STALE
        failures += sr_gpu_get(pool, handle) != 0
    return failures


def rounds_on(object gpu_memory_pool, object stream, size_t size, long n):
    """The same with blocks for the use of one stream."""
    cdef sr_gpu_pool *pool = sr_gpu_pool_of(gpu_memory_pool)
    cdef void *c_stream = <void *> <size_t> stream
    cdef uint64_t handle = 0
    cdef uint64_t address = 0
    cdef long failures = 0
    with nogil:
        for _ in range(n):
            failures += sr_gpu_alloc_on(pool, size, c_stream, &handle, &address) != SR_OK
            failures += sr_gpu_free_on(pool, handle, c_stream) != SR_OK
        failures += sr_gpu_free_on(pool, handle, c_stream) != SR_STALE
        failures += sr_gpu_flush(pool, c_stream) != SR_OK
    return failures


def fill(object gpu_memory_pool, size_t size):
    """Take blocks until there are no more; return their number and what the pool then has."""
    cdef sr_gpu_pool *pool = sr_gpu_pool_of(gpu_memory_pool)
    cdef uint64_t[64] handles
    cdef uint64_t address = 0
    cdef uint64_t in_use = 0
    cdef uint64_t reserved = 0
    cdef uint64_t limit = 0
    cdef int status = SR_OK
    cdef int n = 0
    with nogil:
        while n < 64:
            status = sr_gpu_alloc(pool, size, &handles[n], &address)
            if status != SR_OK:
                break
            n += 1
        sr_gpu_pool_use(pool, &in_use, &reserved, &limit)
        for i in range(n):
            sr_gpu_free(pool, handles[i])
    return n, status == SR_EXHAUSTED, in_use, reserved, limit
