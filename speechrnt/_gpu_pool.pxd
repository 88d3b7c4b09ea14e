"""C interface of the pool of GPU memory.

The functions run without the GIL, take no Python object and return an sr_status (_pools.pxd) or an
sr_gpu_status. All but gpu_pool_delete may run on any number of threads at once, but not with the
GIL held, except those that say so. How the pool works is described in _gpu_pool.h.
"""

from libc.stdint cimport uint64_t

cdef extern from "_gpu_types.h":
    cdef enum sr_gpu_status:
        SR_DRIVER_ERROR
        SR_POISONED
        SR_FORKED

    cdef enum:
        SR_GPU_SIZE_CLASSES

    struct sr_gpu_pool:
        pass

    struct sr_gpu_options:
        int device
        int backing
        size_t initial
        size_t limit
        size_t alignment
        size_t chunk
        bint defragment
        bint trim_mempool

    struct sr_gpu_block:
        uint64_t handle
        uint64_t address
        size_t size

    struct sr_gpu_statistics:
        uint64_t allocations
        uint64_t frees
        uint64_t in_use_bytes
        uint64_t requested_bytes
        uint64_t pending_bytes
        uint64_t reserved_bytes
        uint64_t limit_bytes
        uint64_t peak_bytes
        uint64_t peak_reserved_bytes
        uint64_t free_bytes
        uint64_t largest_free_bytes
        uint64_t pinned_free_bytes
        uint64_t blocks
        uint64_t free_blocks
        uint64_t chunks
        uint64_t splits
        uint64_t merges
        uint64_t grows
        uint64_t trims
        uint64_t defragmentations
        uint64_t remapped_chunks
        uint64_t retries
        uint64_t ooms
        uint64_t fragmented_ooms
        uint64_t by_size[48]
        bint vmm
        int error

    struct sr_gpu_defragmentation:
        uint64_t remapped_chunks
        uint64_t largest_free_before
        uint64_t largest_free_after

# Frees the pool, which no other thread may be using; SR_IN_USE, and nothing, if a block is in use.
cdef int gpu_pool_delete(sr_gpu_pool *pool) noexcept nogil

# A block of at least `size` bytes. May take long: it may grow the pool, or wait for streams.
cdef int gpu_memory_alloc(sr_gpu_pool *pool, size_t size, sr_gpu_block *block) noexcept nogil

# The same for use on `stream` only, by work given to it from now on. Such a block may be one that
# was freed on the stream and is still used by earlier work there.
cdef int gpu_memory_alloc_on(
    sr_gpu_pool *pool, size_t size, void *stream, sr_gpu_block *block,
) noexcept nogil

# Nothing on the device uses the block any more.
cdef int gpu_memory_free(sr_gpu_pool *pool, uint64_t handle) noexcept nogil

# Only what has been given to `stream` so far still uses it. The stream must outlive the pool, or
# gpu_stream_flush must be called before it is destroyed.
cdef int gpu_memory_free_on(sr_gpu_pool *pool, uint64_t handle, void *stream) noexcept nogil
cdef int gpu_stream_flush(sr_gpu_pool *pool, void *stream) noexcept nogil

# The address of a live block, or 0.
cdef uint64_t gpu_memory_address(sr_gpu_pool *pool, uint64_t handle) noexcept nogil
cdef int gpu_memory_statistics(
    sr_gpu_pool *pool, sr_gpu_statistics *statistics,
) noexcept nogil

# The native pool of a GpuMemoryPool, for as long as that lives. Needs the GIL.
cdef sr_gpu_pool *gpu_pool_of(object pool) except NULL

# SR_OK, SR_FORKED, SR_POISONED or SR_CLOSED; the pool's context; and what the pool makes of a code
# that the driver gave somebody else in that context. With or without the GIL.
cdef int gpu_pool_state(sr_gpu_pool *pool) noexcept nogil
cdef void *gpu_pool_context(sr_gpu_pool *pool) noexcept nogil
cdef int gpu_pool_judge(sr_gpu_pool *pool, int code, const char *call) noexcept nogil


cdef class BasePool:
    cdef object __weakref__
    cdef sr_gpu_pool *pool
    cdef readonly int device
    cdef size_t initial
    cdef bint moves
    cdef void *copies  # the stream of copies that are waited for; made by the first of them

    cdef int check(self, int status, size_t size) except -1
    cdef void *make_stream(self) except NULL
    cdef void destroy_stream(self, void *stream) noexcept
    cdef void *copy_stream(self) except NULL
    cdef OwnedBlock lend(self, size_t size, object stream)


cdef class GpuStream:
    cdef BasePool pool
    cdef void *stream

    cdef void *living(self) except NULL
    cdef void end(self) noexcept


cdef class OwnedBlock:
    cdef BasePool pool
    cdef uint64_t handle  # 0 once it went back
    cdef uint64_t address
    cdef object stream    # that may still have work for the block; None if none has
    cdef void *c_stream   # its address, as the object may not always tell it
    cdef bint shared      # by several handles
    cdef object partner   # memory of the host that such work copies from or to

    cdef void use_on(self, object stream, void *c_stream) noexcept
    cdef bint is_used_on(self, void **stream) noexcept
    cdef int give_back(self) noexcept


cdef void *stream_address(object stream) except? NULL
cdef int synchronize_stream(BasePool pool, void *stream) noexcept
cdef int order_streams(BasePool pool, void *first, void *then) noexcept
