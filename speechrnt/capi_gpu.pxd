"""The public C interface of speechrnt's GPU memory, for ``cimport`` by other packages.

As capi.pxd, whose statuses it shares and whose `sr_abi_version` covers it. A module that uses it
can be built without CUDA's headers and without cuda-bindings, but imported only where
`speechrnt.gpu` has its modules: import it when `speechrnt.gpu.available()` says so.

No function may be called with the GIL held, except `sr_gpu_pool_of`, which needs it.
"""

from libc.stdint cimport uint64_t

cdef extern from *:
    """
    struct sr_gpu_pool;
    """
    struct sr_gpu_pool:
        pass

cdef enum:
    SR_GPU_DRIVER_ERROR = 16  # the driver refused, and may not the next time
    SR_GPU_POISONED = 17      # the context is dead, for this process and for good
    SR_GPU_FORKED = 18        # this is a child of the process that made the pool

# The pool of a speechrnt.gpu.GpuMemoryPool, which must outlive its use. Needs the GIL.
cdef sr_gpu_pool *sr_gpu_pool_of(object pool) except NULL

# A block of device memory, of `size` bytes or more and aligned as the pool is; `address` is a
# CUdeviceptr. The handle is never 0 and good for one free, on any thread. SR_EXHAUSTED at the
# pool's limit, SR_NO_MEMORY when the GPU is full, both after all else was tried, which may take
# long.
cdef int sr_gpu_alloc(
    sr_gpu_pool *pool, size_t size, uint64_t *handle, uint64_t *address,
) noexcept nogil

# The same for work on one stream, a CUstream, only. The block may be one that was freed on it.
cdef int sr_gpu_alloc_on(
    sr_gpu_pool *pool, size_t size, void *stream, uint64_t *handle, uint64_t *address,
) noexcept nogil

# Nothing on the device uses the block any more.
cdef int sr_gpu_free(sr_gpu_pool *pool, uint64_t handle) noexcept nogil

# Only what has been given to the stream so far still uses the block. Before a stream is destroyed
# that does not live as long as the pool, call sr_gpu_flush.
cdef int sr_gpu_free_on(sr_gpu_pool *pool, uint64_t handle, void *stream) noexcept nogil
cdef int sr_gpu_flush(sr_gpu_pool *pool, void *stream) noexcept nogil

# The address of a handle that is not freed, or 0.
cdef uint64_t sr_gpu_get(sr_gpu_pool *pool, uint64_t handle) noexcept nogil

# Bytes in use, taken from the device, and the limit of the latter.
cdef int sr_gpu_pool_use(
    sr_gpu_pool *pool, uint64_t *in_use, uint64_t *reserved, uint64_t *limit,
) noexcept nogil
