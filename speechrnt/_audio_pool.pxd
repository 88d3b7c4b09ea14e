"""C interface of the pool of audio buffers.

The functions run without the GIL, take no Python object and return an sr_status (_pools.pxd). All
but audio_pool_free may run on any number of threads at once.
"""

from libc.stdint cimport uint32_t, uint64_t

cdef extern from "_pool_types.h":
    struct sr_audio_pool:
        pass

    # In Python, a capsule named "speechrnt.sr_memory" holds a pointer to one.
    struct sr_memory:
        void *(*alloc)(void *ctx, size_t size, size_t alignment) noexcept nogil
        void (*free)(void *ctx, void *memory, size_t size) noexcept nogil
        void *ctx

    struct sr_audio_options:
        uint32_t soft
        uint32_t hard
        size_t soft_bytes
        size_t hard_bytes
        bint overflow
        const sr_memory *memory

    struct sr_audio_statistics:
        uint64_t acquired
        uint64_t misses
        uint64_t overflows
        uint64_t purges
        uint64_t kept
        uint64_t in_use
        uint64_t idle
        uint64_t peak
        uint64_t in_use_bytes
        uint64_t idle_bytes

cdef int audio_pool_new(const sr_audio_options *options, sr_audio_pool **pool) noexcept nogil

# Frees the pool, which no other thread may be using; SR_IN_USE, and nothing, if a buffer is in
# use.
cdef int audio_pool_free(sr_audio_pool *pool) noexcept nogil

# A buffer of at least `size` bytes, from 1 to 2 GiB, 64-byte aligned, whose contents are arbitrary.
# It may be released by another thread than acquired it.
cdef int audio_pool_acquire(
    sr_audio_pool *pool, size_t size, uint64_t *handle, void **memory,
) noexcept nogil
cdef int audio_pool_release(sr_audio_pool *pool, uint64_t handle) noexcept nogil

# The memory of a live lease, or null.
cdef void *audio_pool_get(sr_audio_pool *pool, uint64_t handle) noexcept nogil

# Have `count` buffers of `size` bytes idle and in memory, and leave them in clean-up from now on.
cdef int audio_pool_reserve(sr_audio_pool *pool, size_t size, uint32_t count) noexcept nogil

# Give up what is idle: all that was not reserved, or, at `now`, in seconds of any steady clock,
# what demand of the last ten epochs does not explain, in two stages.
cdef void audio_pool_trim(sr_audio_pool *pool) noexcept nogil
cdef void audio_pool_maintain(
    sr_audio_pool *pool, double now, double epoch, double purge_after, double free_after,
) noexcept nogil

cdef void audio_pool_statistics(
    sr_audio_pool *pool, sr_audio_statistics *statistics,
) noexcept nogil

# The native pool of an AudioBufferPool, for as long as that lives.
cdef sr_audio_pool *audio_pool_of(object pool) except NULL
