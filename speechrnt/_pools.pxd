"""C interface of the pools' common part and of the pool of fixed-size objects.

The functions run without the GIL, take no Python object and return an sr_status. All but
object_pool_free may run on any number of threads at once. The protocol is described in
_object_slab.h.
"""

from libc.stdint cimport uint32_t, uint64_t

cdef extern from "_pool_types.h":
    cdef enum sr_status:
        SR_OK
        SR_EXHAUSTED
        SR_NO_MEMORY
        SR_STALE
        SR_FOREIGN
        SR_IN_USE
        SR_INVALID
        SR_CLOSED

    struct sr_pool:
        pass

    struct sr_pool_options:
        size_t object_size
        uint32_t initial
        uint32_t soft
        uint32_t hard
        bint overflow
        void (*destroy)(void *object) noexcept nogil

    struct sr_pool_statistics:
        uint64_t acquired
        uint64_t misses
        uint64_t overflows
        uint64_t purges
        uint64_t in_use
        uint64_t idle
        uint64_t peak
        uint64_t reserved_bytes

# Objects are 16-byte aligned, and zeroed before their first use; later, an object is as its last
# user left it.
cdef int object_pool_new(const sr_pool_options *options, sr_pool **pool) noexcept nogil

# Frees the pool, which no other thread may be using; SR_IN_USE, and nothing, if an object is
# leased.
cdef int object_pool_free(sr_pool *pool) noexcept nogil

# Objects may be released by another thread than acquired them.
cdef int object_pool_acquire(sr_pool *pool, uint64_t *handle, void **object) noexcept nogil
cdef int object_pool_release(sr_pool *pool, uint64_t handle) noexcept nogil

# The object of a live lease, or null.
cdef void *object_pool_get(sr_pool *pool, uint64_t handle) noexcept nogil

# Free what is idle: all beyond `initial`, or, at `now`, in seconds of any steady clock, what demand
# of the last ten epochs does not explain and has been seen idle for free_after seconds.
cdef void object_pool_trim(sr_pool *pool) noexcept nogil
cdef void object_pool_maintain(
    sr_pool *pool, double now, double epoch, double free_after,
) noexcept nogil

cdef void object_pool_statistics(sr_pool *pool, sr_pool_statistics *statistics) noexcept nogil

# Raise the Python exception of a status that is not SR_OK; `limit` names what is exhausted.
cdef int raise_status(int status, object limit) except -1

# The time that maintenance is told, or else, with None, that of the system.
cdef double seconds_of(object now) except -1
