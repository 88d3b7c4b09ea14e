"""Takes and returns buffers of speechrnt's pools without the GIL."""

from libc.stdint cimport uint64_t
from speechrnt.capi cimport (
    SR_ABI_VERSION,
    SR_OK,
    SR_STALE,
    sr_abi_version,
    sr_audio_pool,
    sr_audio_pool_acquire,
    sr_audio_pool_of,
    sr_audio_pool_release,
    sr_pool,
    sr_pool_acquire,
    sr_pool_free,
    sr_pool_new,
    sr_pool_release,
)

if sr_abi_version() != SR_ABI_VERSION:
    raise ImportError(
        f"built for version {SR_ABI_VERSION} of speechrnt's C interface, "
        f"but version {sr_abi_version()} is installed"
    )


def audio_rounds(object audio_buffer_pool, size_t size, long n):
    """Take and return a buffer of a speechrnt.pools.AudioBufferPool n times; count failures."""
    cdef sr_audio_pool *pool = sr_audio_pool_of(audio_buffer_pool)
    cdef uint64_t handle = 0
    cdef void *memory = NULL
    cdef long failures = 0
    with nogil:
        for _ in range(n):
            failures += sr_audio_pool_acquire(pool, size, &handle, &memory) != SR_OK
            (<char *> memory)[0] = 1
            failures += sr_audio_pool_release(pool, handle) != SR_OK
        failures += sr_audio_pool_release(pool, handle) != SR_STALE
    return failures


def object_rounds(long n):
    """The same with objects of a pool of our own."""
    cdef sr_pool *pool = NULL
    cdef uint64_t handle = 0
    cdef void *item = NULL
    cdef long failures = 0
    with nogil:
        failures += sr_pool_new(64, 0, 1024, False, &pool) != SR_OK
        for _ in range(n):
            failures += sr_pool_acquire(pool, &handle, &item) != SR_OK
            failures += sr_pool_release(pool, handle) != SR_OK
        failures += sr_pool_release(pool, handle) != SR_STALE
        failures += sr_pool_free(pool) != SR_OK
    return failures
