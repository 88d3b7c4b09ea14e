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
    struct sr_sched;
    struct sr_counter;
    struct sr_task { void *opaque[8]; };
    """
    const int SR_ABI_VERSION

    struct sr_pool:
        pass

    struct sr_audio_pool:
        pass

    struct sr_sched:
        pass

    struct sr_counter:
        pass

    # Storage of a task: its size and alignment, and nothing else, are part of the interface.
    struct sr_task:
        pass

cdef enum:
    SR_OK = 0
    SR_EXHAUSTED = 1   # the pool is at its limit
    SR_NO_MEMORY = 2   # the system has none
    SR_STALE = 3       # the handle was released already
    SR_FOREIGN = 4     # the handle is of another pool, or none at all
    SR_IN_USE = 5      # something is still on loan; the task is queued already
    SR_INVALID = 6     # an argument is out of range
    SR_CLOSED = 7      # the AudioBufferPool is closed; the scheduler is shut down, or a parent's
    SR_OVERLOADED = 8  # the queue of the scheduler is full

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

# Tasks for the workers of a speechrnt.Scheduler: C functions, which run without the GIL.

# The first that has tasks is served first; no level is kept waiting by the others for ever.
cdef enum:
    SR_CRITICAL = 0
    SR_HIGH = 1
    SR_NORMAL = 2
    SR_LOW = 3

# In place of the status of a task that was dropped before its start, by a shutdown.
cdef enum:
    SR_CANCELLED = -1

# Returns a status, 0 for success.
ctypedef int (*sr_task_fn)(void *arg) noexcept nogil
# Called after `fn` with its argument and status, on the worker; or instead of it, with
# SR_CANCELLED, on the thread that shuts the scheduler down.
ctypedef void (*sr_task_done)(void *arg, int status) noexcept nogil

# The scheduler of a speechrnt.Scheduler, which must outlive its use. Needs the GIL.
cdef sr_sched *sr_sched_of(object scheduler) except NULL

# Describe a task, in storage of the caller that nothing is known about, so that a task which is
# queued must not be described anew: that would not be noticed. Nothing is allocated, and
# nothing must be freed. `done` and `counter` may be null. SR_INVALID: no function, or a priority
# that does not exist.
cdef int sr_task_init(
    sr_task *task, sr_task_fn fn, void *arg, int priority, sr_task_done done, sr_counter *counter,
) noexcept nogil

# Queue a task. Until `fn` starts, or `done` instead, its storage belongs to the scheduler; then it
# may be freed, initialised or queued again, by `fn` itself too. SR_IN_USE if it is queued already
# and not started; but two threads must not queue it at the same moment. With the GIL or without.
cdef int sr_sched_submit(sr_sched *sched, sr_task *task) noexcept nogil

# Queue `count` tasks of one priority, each `stride` bytes behind the last: all or none of them.
# SR_INVALID if their priorities differ, SR_IN_USE if one of them is queued already.
cdef int sr_sched_submit_many(
    sr_sched *sched, sr_task *tasks, size_t stride, size_t count,
) noexcept nogil

# From a task: queue another with the worker that is running, which costs less, needs no room in
# the queue of the scheduler, and is possible during a shutdown. Elsewhere the same as submitting.
cdef int sr_sched_spawn(sr_sched *sched, sr_task *task) noexcept nogil

# Tasks that wait in the queue of the scheduler, those of Python too.
cdef uint64_t sr_sched_queued(sr_sched *sched) noexcept nogil

# A counter of tasks that are not done. Each queued task that names it counts until its `done` has
# returned. It may be used by any number of tasks, and again and again.
cdef int sr_counter_new(sr_counter **counter) noexcept nogil

# Only when no task counts, and nobody waits.
cdef void sr_counter_free(sr_counter *counter) noexcept nogil
cdef uint64_t sr_counter_pending(sr_counter *counter) noexcept nogil

# Wait until no task counts; return the status of the first that failed since the last wait, or 0.
# A task that waits runs other tasks meanwhile. Without the GIL. SR_CANCELLED at once in a forked
# child.
cdef int sr_sched_wait(sr_sched *sched, sr_counter *counter) noexcept nogil
