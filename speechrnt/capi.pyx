"""The public C interface: see capi.pxd. There is nothing here for Python to call."""

from libc.stdint cimport INT64_MAX
from libcpp.atomic cimport memory_order_acquire

# In this form because cythonize does not see that another depends on the declarations.
cimport speechrnt._audio_pool as _audio_pool
cimport speechrnt._pools as _pools
cimport speechrnt._sched as _sched
cimport speechrnt._sched_core as _sched_core

__all__ = []

if sizeof(_sched_core.task_t) > sizeof(sr_task):
    raise ImportError("a task does not fit its storage: SR_ABI_VERSION must change with its size")


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


cdef sr_sched *sr_sched_of(object scheduler) except NULL:
    return <sr_sched *> _sched.sched_of(scheduler)


cdef int sr_task_init(
    sr_task *task, sr_task_fn fn, void *arg, int priority, sr_task_done done, sr_counter *counter,
) noexcept nogil:
    cdef _sched_core.task_t *inner = <_sched_core.task_t *> task
    if fn == NULL or not 0 <= priority < _sched_core.LEVELS:
        inner.fn = NULL
        return SR_INVALID
    inner.fn = fn
    inner.arg = arg
    inner.done = done
    inner.counter = <_sched_core.counter_t *> counter
    inner.priority = priority
    inner.queued = False
    inner.gated = False
    return SR_OK


cdef int status_of(_sched_core.SchedResult result) noexcept nogil:
    if result == _sched_core.SCHED_OK:
        return SR_OK
    if result == _sched_core.SCHED_QUEUED:
        return SR_IN_USE
    return SR_OVERLOADED if result == _sched_core.SCHED_OVERLOADED else SR_CLOSED


cdef int sr_sched_submit(sr_sched *sched, sr_task *task) noexcept nogil:
    cdef _sched_core.task_t *inner = <_sched_core.task_t *> task
    if inner.fn == NULL:
        return SR_INVALID
    return status_of(_sched_core.sched_submit(<_sched_core.sched_t *> sched, inner))


cdef int sr_sched_submit_many(
    sr_sched *sched, sr_task *tasks, size_t stride, size_t count,
) noexcept nogil:
    cdef _sched_core.task_t *first = <_sched_core.task_t *> tasks
    cdef _sched_core.task_t *task
    cdef _sched_core.task_t *last = NULL
    cdef size_t i
    if (count > 1 and stride < sizeof(sr_task)) or count > <size_t> INT64_MAX:
        return SR_INVALID
    for i in range(count):
        task = <_sched_core.task_t *> (<char *> tasks + i * stride)
        if task.fn == NULL or task.priority != first.priority:
            return SR_INVALID
        if task.queued:
            return SR_IN_USE
        if last != NULL:
            last.next = task
        last = task
    return status_of(
        _sched_core.sched_submit_many(<_sched_core.sched_t *> sched, first, count)
    )


cdef int sr_sched_spawn(sr_sched *sched, sr_task *task) noexcept nogil:
    cdef _sched_core.task_t *inner = <_sched_core.task_t *> task
    if inner.fn == NULL:
        return SR_INVALID
    return status_of(_sched_core.sched_spawn(<_sched_core.sched_t *> sched, inner))


cdef uint64_t sr_sched_queued(sr_sched *sched) noexcept nogil:
    return _sched_core.sched_queued(<_sched_core.sched_t *> sched)


cdef int sr_counter_new(sr_counter **counter) noexcept nogil:
    counter[0] = <sr_counter *> _sched_core.counter_create()
    return SR_OK if counter[0] != NULL else SR_NO_MEMORY


cdef void sr_counter_free(sr_counter *counter) noexcept nogil:
    _sched_core.counter_destroy(<_sched_core.counter_t *> counter)


cdef uint64_t sr_counter_pending(sr_counter *counter) noexcept nogil:
    return (<_sched_core.counter_t *> counter).pending.load(memory_order_acquire)


cdef int sr_sched_wait(sr_sched *sched, sr_counter *counter) noexcept nogil:
    return _sched_core.sched_wait(
        <_sched_core.sched_t *> sched, <_sched_core.counter_t *> counter
    )
