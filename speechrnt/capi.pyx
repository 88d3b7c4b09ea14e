"""The public C interface: see capi.pxd. There is nothing here for Python to call."""

from speechrnt cimport _audio_pool, _pools

__all__ = []


cdef int sr_abi_version() noexcept nogil:
    return SR_ABI_VERSION


cdef int sr_pool_new(
    size_t object_size, uint32_t initial, uint32_t limit, bint overflow, sr_pool **pool,
) noexcept nogil:
    cdef _pools.sr_pool_options options
    options.object_size = object_size
    options.initial = initial
    options.soft = limit
    options.hard = limit
    options.overflow = overflow
    options.destroy = NULL
    return _pools.object_pool_new(&options, <_pools.sr_pool **> pool)


cdef int sr_pool_free(sr_pool *pool) noexcept nogil:
    return _pools.object_pool_free(<_pools.sr_pool *> pool)


cdef int sr_pool_acquire(sr_pool *pool, uint64_t *handle, void **object) noexcept nogil:
    return _pools.object_pool_acquire(<_pools.sr_pool *> pool, handle, object)


cdef int sr_pool_release(sr_pool *pool, uint64_t handle) noexcept nogil:
    return _pools.object_pool_release(<_pools.sr_pool *> pool, handle)


cdef void *sr_pool_get(sr_pool *pool, uint64_t handle) noexcept nogil:
    return _pools.object_pool_get(<_pools.sr_pool *> pool, handle)


cdef void sr_pool_trim(sr_pool *pool) noexcept nogil:
    _pools.object_pool_trim(<_pools.sr_pool *> pool)


cdef void sr_pool_use(sr_pool *pool, uint64_t *in_use, uint64_t *idle) noexcept nogil:
    cdef _pools.sr_pool_statistics now
    _pools.object_pool_statistics(<_pools.sr_pool *> pool, &now)
    in_use[0] = now.in_use
    idle[0] = now.idle


cdef int sr_audio_pool_new(
    uint32_t max_buffers, size_t max_bytes, bint overflow, const sr_audio_memory *memory,
    sr_audio_pool **pool,
) noexcept nogil:
    cdef _audio_pool.sr_audio_options options
    options.soft = max_buffers
    options.hard = max_buffers
    options.soft_bytes = max_bytes
    options.hard_bytes = max_bytes
    options.overflow = overflow
    options.memory = <const _audio_pool.sr_memory *> memory
    return _audio_pool.audio_pool_new(&options, <_audio_pool.sr_audio_pool **> pool)


cdef int sr_audio_pool_free(sr_audio_pool *pool) noexcept nogil:
    return _audio_pool.audio_pool_free(<_audio_pool.sr_audio_pool *> pool)


cdef sr_audio_pool *sr_audio_pool_of(object pool) except NULL:
    return <sr_audio_pool *> _audio_pool.audio_pool_of(pool)


cdef int sr_audio_pool_acquire(
    sr_audio_pool *pool, size_t size, uint64_t *handle, void **memory,
) noexcept nogil:
    return _audio_pool.audio_pool_acquire(
        <_audio_pool.sr_audio_pool *> pool, size, handle, memory
    )


cdef int sr_audio_pool_release(sr_audio_pool *pool, uint64_t handle) noexcept nogil:
    return _audio_pool.audio_pool_release(<_audio_pool.sr_audio_pool *> pool, handle)


cdef void *sr_audio_pool_get(sr_audio_pool *pool, uint64_t handle) noexcept nogil:
    return _audio_pool.audio_pool_get(<_audio_pool.sr_audio_pool *> pool, handle)


cdef int sr_audio_pool_reserve(sr_audio_pool *pool, size_t size, uint32_t count) noexcept nogil:
    return _audio_pool.audio_pool_reserve(<_audio_pool.sr_audio_pool *> pool, size, count)


cdef void sr_audio_pool_trim(sr_audio_pool *pool) noexcept nogil:
    _audio_pool.audio_pool_trim(<_audio_pool.sr_audio_pool *> pool)


cdef void sr_audio_pool_use(
    sr_audio_pool *pool, uint64_t *in_use_bytes, uint64_t *idle_bytes,
) noexcept nogil:
    cdef _audio_pool.sr_audio_statistics now
    _audio_pool.audio_pool_statistics(<_audio_pool.sr_audio_pool *> pool, &now)
    in_use_bytes[0] = now.in_use_bytes
    idle_bytes[0] = now.idle_bytes
