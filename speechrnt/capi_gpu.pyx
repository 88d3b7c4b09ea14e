"""The public C interface of GPU memory: see capi_gpu.pxd. There is nothing here for Python."""

# In this form because cythonize does not see that another depends on the declarations.
cimport speechrnt._gpu_pool as _gpu_pool

__all__ = []


cdef sr_gpu_pool *sr_gpu_pool_of(object pool) except NULL:
    return <sr_gpu_pool *> _gpu_pool.gpu_pool_of(pool)


cdef int sr_gpu_alloc(
    sr_gpu_pool *pool, size_t size, uint64_t *handle, uint64_t *address,
) noexcept nogil:
    cdef _gpu_pool.sr_gpu_block block
    cdef int status = _gpu_pool.gpu_memory_alloc(<_gpu_pool.sr_gpu_pool *> pool, size, &block)
    if status == 0:
        handle[0] = block.handle
        address[0] = block.address
    return status


cdef int sr_gpu_alloc_on(
    sr_gpu_pool *pool, size_t size, void *stream, uint64_t *handle, uint64_t *address,
) noexcept nogil:
    cdef _gpu_pool.sr_gpu_block block
    cdef int status = _gpu_pool.gpu_memory_alloc_on(
        <_gpu_pool.sr_gpu_pool *> pool, size, stream, &block
    )
    if status == 0:
        handle[0] = block.handle
        address[0] = block.address
    return status


cdef int sr_gpu_free(sr_gpu_pool *pool, uint64_t handle) noexcept nogil:
    return _gpu_pool.gpu_memory_free(<_gpu_pool.sr_gpu_pool *> pool, handle)


cdef int sr_gpu_free_on(sr_gpu_pool *pool, uint64_t handle, void *stream) noexcept nogil:
    return _gpu_pool.gpu_memory_free_on(<_gpu_pool.sr_gpu_pool *> pool, handle, stream)


cdef int sr_gpu_flush(sr_gpu_pool *pool, void *stream) noexcept nogil:
    return _gpu_pool.gpu_stream_flush(<_gpu_pool.sr_gpu_pool *> pool, stream)


cdef uint64_t sr_gpu_get(sr_gpu_pool *pool, uint64_t handle) noexcept nogil:
    return _gpu_pool.gpu_memory_address(<_gpu_pool.sr_gpu_pool *> pool, handle)


cdef int sr_gpu_pool_use(
    sr_gpu_pool *pool, uint64_t *in_use, uint64_t *reserved, uint64_t *limit,
) noexcept nogil:
    cdef _gpu_pool.sr_gpu_statistics now
    cdef int status = _gpu_pool.gpu_memory_statistics(<_gpu_pool.sr_gpu_pool *> pool, &now)
    if status == 0:
        in_use[0] = now.in_use_bytes
        reserved[0] = now.reserved_bytes
        limit[0] = now.limit_bytes
    return status
