"""The public C interface of speechrnt, for ``cimport`` by other packages.

Only opaque structs and free-standing functions: their C signatures are checked when a module that
uses them is imported, while the layout of a struct or of a class would not be. A module built
against this file works with all later releases of the same `SR_ABI_VERSION`; it compares that
constant, which is compiled into it, with what `sr_abi_version` returns.

Nothing here takes the GIL, unless it says so. Functions that can fail return a status.
"""

from libc.stdint cimport uint32_t, uint64_t

cdef extern from *:
    """
    #define SR_ABI_VERSION 1
    struct sr_pool;
    struct sr_audio_pool;
    """
    const int SR_ABI_VERSION

    struct sr_pool:
        pass

    struct sr_audio_pool:
        pass

cdef enum:
    SR_OK = 0
    SR_EXHAUSTED = 1  # the pool is at its limit
    SR_NO_MEMORY = 2  # the system has none
    SR_STALE = 3      # the handle was released already
    SR_FOREIGN = 4    # the handle is of another pool, or none at all
    SR_IN_USE = 5     # something is still on loan
    SR_INVALID = 6    # a size or a limit is out of range
    SR_CLOSED = 7     # the AudioBufferPool is closed

cdef int sr_abi_version() noexcept nogil

# Pools of objects of one size. An acquire gives a handle, which is never 0 and good for one
# release, on any thread. Objects are aligned to 16 bytes, zero before their first use, and later as
# their last user left them. Up to 32 idle objects are cached per thread that uses the pool.

# A pool of at most `limit` objects, 1 to 524288, of which `initial` exist from the start. Beyond
# the limit, acquires fail, or with `overflow` are served for once, for as many objects again.
cdef int sr_pool_new(
    size_t object_size, uint32_t initial, uint32_t limit, bint overflow, sr_pool **pool,
) noexcept nogil

# SR_IN_USE while an object is on loan; otherwise no other thread may be using the pool.
cdef int sr_pool_free(sr_pool *pool) noexcept nogil
cdef int sr_pool_acquire(sr_pool *pool, uint64_t *handle, void **object) noexcept nogil
cdef int sr_pool_release(sr_pool *pool, uint64_t handle) noexcept nogil

# The object of a handle that is not released, or null.
cdef void *sr_pool_get(sr_pool *pool, uint64_t handle) noexcept nogil

# Free what is idle; other threads give back what they have cached at their next release.
cdef void sr_pool_trim(sr_pool *pool) noexcept nogil
cdef void sr_pool_use(sr_pool *pool, uint64_t *in_use, uint64_t *idle) noexcept nogil

# Pools of audio buffers, of 1 byte to 2 GiB, aligned to 64 bytes, with arbitrary contents. Handles
# are as above. Use `sr_audio_pool_of` to share a pool with Python.

# Memory from elsewhere than the system. Both functions may be called from any thread, with or
# without the GIL; alloc returns null when there is none. In Python, a capsule named
# "speechrnt.sr_memory" that holds a pointer to one is what AudioBufferPool takes as `memory`.
cdef struct sr_audio_memory:
    void *(*alloc)(void *ctx, size_t size, size_t alignment) noexcept nogil
    void (*free)(void *ctx, void *memory, size_t size) noexcept nogil
    void *ctx

# `memory` is copied, and may be null.
cdef int sr_audio_pool_new(
    uint32_t max_buffers, size_t max_bytes, bint overflow, const sr_audio_memory *memory,
    sr_audio_pool **pool,
) noexcept nogil
cdef int sr_audio_pool_free(sr_audio_pool *pool) noexcept nogil

# The pool of a speechrnt.AudioBufferPool, which must outlive its use. Needs the GIL.
cdef sr_audio_pool *sr_audio_pool_of(object pool) except NULL
cdef int sr_audio_pool_acquire(
    sr_audio_pool *pool, size_t size, uint64_t *handle, void **memory,
) noexcept nogil
cdef int sr_audio_pool_release(sr_audio_pool *pool, uint64_t handle) noexcept nogil
cdef void *sr_audio_pool_get(sr_audio_pool *pool, uint64_t handle) noexcept nogil

# Have `count` buffers of `size` bytes idle and in memory, and leave them there when trimming.
cdef int sr_audio_pool_reserve(sr_audio_pool *pool, size_t size, uint32_t count) noexcept nogil
cdef void sr_audio_pool_trim(sr_audio_pool *pool) noexcept nogil
cdef void sr_audio_pool_use(
    sr_audio_pool *pool, uint64_t *in_use_bytes, uint64_t *idle_bytes,
) noexcept nogil
