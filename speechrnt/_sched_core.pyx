"""The native scheduler: queues, picking, stealing, parking. Declarations are in the .pxd.

No function here touches a Python object. docs/scheduler-protocol.md describes the protocol, and
names the partner of each memory order below.
"""

from libc.stddef cimport size_t
from libc.stdint cimport int64_t, uint64_t, uintptr_t
from libcpp.atomic cimport (
    atomic, memory_order_acq_rel, memory_order_acquire, memory_order_relaxed, memory_order_release,
    memory_order_seq_cst,
)
from posix.time cimport CLOCK_MONOTONIC, clock_gettime, timespec

from speechrnt._deque cimport (
    ring_has_room, ring_pop, ring_push, ring_size, ring_take, RING_CAPACITY as C_RING_CAPACITY,
)
from speechrnt._park cimport (
    atomic_thread_fence, idle_announce, idle_choose, idle_retract, lowest_bit,
)

__all__ = ["RING_CAPACITY"]

# What this build was compiled with, for extensions that share the rings.
RING_CAPACITY = C_RING_CAPACITY

cdef extern from *:
    """
    #include <new>

    template <class T>
    static T *speechrnt_make(size_t count) { return new (std::nothrow) T[count](); }

    template <class T>
    static void speechrnt_unmake(T *array) { delete[] array; }

    static thread_local void *speechrnt_this_worker = nullptr;

    #if defined(__x86_64__) || defined(__i386__)
    #define speechrnt_pause() __builtin_ia32_pause()
    #elif defined(__aarch64__)
    #define speechrnt_pause() __asm__ volatile("isb")
    #else
    #define speechrnt_pause() ((void) 0)
    #endif

    static inline int speechrnt_octave(unsigned long long value) {
        return 63 - __builtin_clzll(value);
    }
    """
    T *make "speechrnt_make"[T](size_t count) noexcept nogil
    void unmake "speechrnt_unmake"[T](T *array) noexcept nogil
    void *this_worker "speechrnt_this_worker"
    void pause "speechrnt_pause"() noexcept nogil
    int octave "speechrnt_octave"(uint64_t value) noexcept nogil

cdef enum:
    ADMISSION_CLOSED = 1
    BATCH = 32             # most tasks that a worker takes from a queue at once
    LOOKS = 16             # for work before sleeping, in some 3 µs: less than a wake-up costs
    PAUSES = 8             # between looks, which slow those down who push
    SLICE_TASKS = 8        # gated tasks before the gate is offered to others
    SLICE_NS = 200_000
    SAMPLE_PERIOD = 64     # native tasks per sampled one: two clock reads cost more than a task

# Where a level's tasks may be.
cdef enum Source:
    SOURCE_RING
    SOURCE_NATIVE
    SOURCE_GATED
    SOURCE_VICTIMS
    SOURCES


cdef int64_t now_ns() noexcept nogil:
    cdef timespec time
    clock_gettime(CLOCK_MONOTONIC, &time)
    return <int64_t>time.tv_sec * 1_000_000_000 + time.tv_nsec


cdef inline void bump(atomic[uint64_t] *counter) noexcept nogil:
    """Add one, as the only writer: release, so that who reads the count sees what led to it."""
    counter.store(counter.load(memory_order_relaxed) + 1, memory_order_release)


cdef inline int histogram_bucket(int64_t ns) noexcept nogil:
    if ns < 4:
        return ns if ns > 0 else 0
    cdef int high = octave(ns)
    cdef int bucket = (high - 1) * 4 + ((ns >> (high - 2)) & 3)
    return min(bucket, HISTOGRAM_BUCKETS - 1)


cdef int64_t histogram_limit_ns(int bucket) noexcept nogil:
    if bucket < 4:
        return bucket
    return ((<int64_t>(bucket % 4) + 5) << (bucket // 4 - 1)) - 1


cdef inline void histogram_add(histogram_t *histogram, int64_t ns) noexcept nogil:
    bump(&histogram.counts[histogram_bucket(ns)])


cdef counter_t *counter_create() noexcept nogil:
    return make[counter_t](1)


cdef void counter_destroy(counter_t *counter) noexcept nogil:
    unmake(counter)


cdef void counter_done(counter_t *counter, int status) noexcept nogil:
    cdef int64_t pending
    cdef int success = 0
    if status != 0:
        counter.failure.compare_exchange_strong(
            success, status, memory_order_relaxed, memory_order_relaxed
        )
    pending = counter.pending.load(memory_order_relaxed)
    while pending > 1:
        if counter.pending.compare_exchange_weak(
            pending, pending - 1, memory_order_acq_rel, memory_order_relaxed
        ):
            return
    # Who sees 0 under the mutex may destroy the counter, so 0 is written under the mutex.
    counter.monitor.lock()
    if counter.pending.fetch_sub(1, memory_order_acq_rel) == 1:
        counter.monitor.notify_all()
    counter.monitor.unlock()


cdef sched_t *sched_create(
    int n_workers, int reserved, int64_t max_queued, const gate_t *gate,
) noexcept nogil:
    cdef sched_t *sched = make[sched_t](1)
    cdef worker_t *worker
    cdef int index
    if sched == NULL:
        return NULL
    sched.workers = make[worker_t](n_workers)
    if sched.workers == NULL:
        unmake(sched)
        return NULL
    sched.n_workers = n_workers
    sched.reserved = reserved
    sched.max_queued = max_queued
    sched.stealing = True
    if gate != NULL:
        sched.gate = gate[0]
    for index in range(n_workers):
        worker = &sched.workers[index]
        worker.sched = sched
        worker.index = index
        worker.levels = LEVELS if index < n_workers - reserved else SCHED_HIGH + 1
        worker.random = index + 1
    sched_resize(sched, n_workers - reserved)
    return sched


cdef void sched_destroy(sched_t *sched) noexcept nogil:
    unmake(sched.workers)
    unmake(sched)


cdef inline uint64_t first_bits(int count) noexcept nogil:
    return ~<uint64_t>0 >> (64 - count) if count > 0 else 0


cdef inline worker_t *worker_here(sched_t *sched) noexcept nogil:
    """The worker of `sched` that the calling thread is, or NULL."""
    cdef worker_t *worker = <worker_t *>this_worker
    return worker if worker != NULL and worker.sched == sched else NULL


cdef bint sched_is_worker(sched_t *sched) noexcept nogil:
    return worker_here(sched) != NULL


cdef void wake_for(sched_t *sched, int level) noexcept nogil:
    """Wake one worker that may serve `level`, if one is idle. The work is queued already."""
    cdef uint64_t among = sched.active.load(memory_order_relaxed)
    atomic_thread_fence(memory_order_seq_cst)  # pairs with search
    if sched.searching.load(memory_order_relaxed) != 0:
        return  # it will find the work, or wake another
    if sched.idle.load(memory_order_relaxed) & among == 0:
        return
    if level > SCHED_HIGH:
        among &= first_bits(sched.n_workers - sched.reserved)
    cdef int index = idle_choose(&sched.idle, among)
    if index >= 0:
        sched.wakeups.fetch_add(1, memory_order_relaxed)
        sched.workers[index].semaphore.post()


cdef void wake_all(sched_t *sched) noexcept nogil:
    atomic_thread_fence(memory_order_seq_cst)  # pairs with idle_announce
    cdef uint64_t sleeping = sched.idle.exchange(0, memory_order_acq_rel)
    while sleeping != 0:
        sched.workers[lowest_bit(sleeping)].semaphore.post()
        sleeping &= sleeping - 1


cdef inline bint is_queued(sched_t *sched, int index) noexcept nogil:
    """Tell whether a queue has tasks. The order of the two looks matters: see `flush`."""
    return (
        sched.stacks[index].load(memory_order_acquire) != 0
        or sched.queues[index].length.load(memory_order_relaxed) != 0
    )


cdef inline int first_gated(sched_t *sched, int levels) noexcept nogil:
    """The highest of the first `levels` that has queued gated tasks, or -1."""
    cdef int level
    for level in range(levels):
        if is_queued(sched, LEVELS + level):
            return level
    return -1


cdef void wake_for_gated(sched_t *sched) noexcept nogil:
    """See to it that queued gated tasks have a worker which waits for the gate, if one is idle."""
    cdef int level
    atomic_thread_fence(memory_order_seq_cst)  # pairs with gate_wait
    if not sched.gate.exclusive or sched.gate_waiters.load(memory_order_relaxed) == 0:
        level = first_gated(sched, LEVELS)
        if level >= 0:
            wake_for(sched, level)


cdef SchedResult admit(
    sched_t *sched, int64_t count, bint spawned, uint64_t *number,
) noexcept nogil:
    """Accept `count` tasks, or none of them; `number` counts those before. They must be queued.

    A spawning task is not done, so a scheduler that drains cannot have stopped.
    """
    cdef uint64_t admitted = sched.admitted.load(memory_order_relaxed)
    cdef uint64_t taken
    cdef int index
    if sched.state.load(memory_order_relaxed) > SCHED_DRAINING:
        return SCHED_CLOSED
    while True:
        if admitted & ADMISSION_CLOSED and not spawned:
            return SCHED_CLOSED
        taken = 0
        for index in range(2 * LEVELS):
            taken += sched.taken[index].load(memory_order_relaxed)
        # Exact if the exchange succeeds. `taken` may be ahead of `admitted`, hence the sign.
        if <int64_t>((admitted >> 1) - taken) > sched.max_queued - count:
            sched.rejected.fetch_add(count, memory_order_relaxed)
            return SCHED_OVERLOADED
        if sched.admitted.compare_exchange_weak(
            admitted, admitted + 2 * <uint64_t>count, memory_order_acq_rel, memory_order_relaxed
        ):
            number[0] = admitted >> 1
            return SCHED_OK


cdef inline void prepare(task_t *task, uint64_t number) noexcept nogil:
    """Count a task in and note the time, if it is sampled."""
    task.queued = True
    task.queued_ns = now_ns() if task.gated or number % SAMPLE_PERIOD == 0 else 0
    if task.counter != NULL:
        task.counter.pending.fetch_add(1, memory_order_relaxed)


cdef inline void push_stack(sched_t *sched, task_t *newest, task_t *oldest) noexcept nogil:
    """Put tasks, linked from the newest to the oldest, on the stack of their queue; wake a worker.

    Stacks are only ever taken whole, so that an equal top is the same top.
    """
    # What the tasks say must be read before others can take them.
    cdef int level = newest.priority
    cdef bint gated = newest.gated
    cdef atomic[uintptr_t] *stack = &sched.stacks[level + (LEVELS if gated else 0)]
    cdef uintptr_t top = stack.load(memory_order_relaxed)
    while True:
        oldest.next = <task_t *>top
        if stack.compare_exchange_weak(
            top, <uintptr_t>newest, memory_order_release, memory_order_relaxed
        ):
            break
    if gated:
        wake_for_gated(sched)
    else:
        wake_for(sched, level)


cdef SchedResult submit_one(sched_t *sched, task_t *task, bint spawned) noexcept nogil:
    cdef uint64_t number
    cdef SchedResult result
    if task.queued:
        return SCHED_QUEUED
    result = admit(sched, 1, spawned, &number)
    if result == SCHED_OK:
        prepare(task, number)
        push_stack(sched, task, task)
    return result


cdef SchedResult sched_submit(sched_t *sched, task_t *task) noexcept nogil:
    return submit_one(sched, task, False)


cdef SchedResult sched_submit_many(
    sched_t *sched, task_t *first, int64_t count,
) noexcept nogil:
    cdef uint64_t number
    cdef task_t *newest = NULL
    cdef task_t *task = first
    cdef task_t *next
    cdef int64_t i
    if count <= 0:
        return SCHED_OK
    cdef SchedResult result = admit(sched, count, False, &number)
    if result != SCHED_OK:
        return result
    for i in range(count):
        next = task.next
        prepare(task, number + i)
        task.next = newest
        newest = task
        task = next
    push_stack(sched, newest, first)
    return SCHED_OK


cdef SchedResult sched_spawn(sched_t *sched, task_t *task) noexcept nogil:
    cdef worker_t *worker = worker_here(sched)
    cdef int level = task.priority
    if worker == NULL:
        return submit_one(sched, task, False)
    if task.queued:
        return SCHED_QUEUED
    if task.gated or level == SCHED_CRITICAL or level >= worker.levels:
        return submit_one(sched, task, True)
    if not ring_has_room(&worker.rings[level]):
        bump(&worker.spilled)
        return submit_one(sched, task, True)
    cdef uint64_t spawned = worker.spawned.load(memory_order_relaxed)
    prepare(task, spawned)
    bump(&worker.spawned)
    ring_push(&worker.rings[level], task)
    wake_for(sched, level)
    return SCHED_OK


cdef inline void lock_queue(sched_t *sched, int index) noexcept nogil:
    # Whoever takes gated tasks is inside the gate, which is lock enough if it admits one.
    if index < LEVELS or not sched.gate.exclusive:
        sched.queues[index].lock.lock()
        sched.lock_operations.fetch_add(1, memory_order_relaxed)


cdef inline void unlock_queue(sched_t *sched, int index) noexcept nogil:
    if index < LEVELS or not sched.gate.exclusive:
        sched.queues[index].lock.unlock()


cdef void flush(sched_t *sched, int index) noexcept nogil:
    """Append what was submitted to the list of a queue, oldest first. With the queue locked."""
    cdef queue_t *queue = &sched.queues[index]
    cdef int64_t length = queue.length.load(memory_order_relaxed)
    cdef task_t *task
    cdef task_t *newest
    cdef task_t *following = NULL
    cdef task_t *next
    if sched.stacks[index].load(memory_order_relaxed) == 0:
        return
    # At no time may the queue look empty. Who sees the stack empty sees the list longer.
    queue.length.store(length + 1, memory_order_relaxed)
    newest = task = <task_t *>sched.stacks[index].exchange(0, memory_order_acq_rel)
    while task != NULL:
        next = task.next
        task.next = following
        following = task
        task = next
        length += 1
    if queue.head == NULL:
        queue.head = following
    else:
        queue.tail.next = following
    queue.tail = newest
    queue.length.store(length, memory_order_relaxed)


cdef task_t *remove_head(sched_t *sched, int index) noexcept nogil:
    """Take the first task of a queue, or NULL. With the queue locked."""
    cdef queue_t *queue = &sched.queues[index]
    cdef task_t *task = queue.head
    if task == NULL:
        flush(sched, index)
        task = queue.head
        if task == NULL:
            return NULL
    queue.head = task.next
    queue.length.store(queue.length.load(memory_order_relaxed) - 1, memory_order_relaxed)
    bump(&sched.taken[index])
    return task


cdef task_t *take_native(worker_t *worker, int level) noexcept nogil:
    """Take the first task of a queue, and move a fair share of those behind it to the ring."""
    cdef sched_t *sched = worker.sched
    cdef ring_t *ring = &worker.rings[level]
    cdef task_t *task
    cdef int64_t share
    cdef bint more
    if not is_queued(sched, level):
        return NULL
    lock_queue(sched, level)
    flush(sched, level)
    task = remove_head(sched, level)
    more = False
    if level != SCHED_CRITICAL:
        share = sched.queues[level].length.load(memory_order_relaxed) // sched.n_workers
        for _ in range(min(share, BATCH - 1)):
            if not ring_has_room(ring):
                break
            ring_push(ring, remove_head(sched, level))
            more = True
    more = more or sched.queues[level].head != NULL
    unlock_queue(sched, level)
    if more:
        wake_for(sched, level)
    return task


cdef task_t *take_gated(worker_t *worker, int level) noexcept nogil:
    """Take the first gated task of a queue. Inside the gate."""
    cdef sched_t *sched = worker.sched
    cdef task_t *task
    lock_queue(sched, LEVELS + level)
    task = remove_head(sched, LEVELS + level)
    unlock_queue(sched, LEVELS + level)
    # What `task` does is not known: if it blocks, another worker takes those behind it.
    if first_gated(sched, LEVELS) >= 0:
        wake_for_gated(sched)
    return task


cdef void gate_wait(worker_t *worker) noexcept nogil:
    """Enter the gate, having counted oneself as waiting."""
    cdef sched_t *sched = worker.sched
    worker.entered = sched.gate.enter()
    sched.gate_waiters.fetch_sub(1, memory_order_seq_cst)
    atomic_thread_fence(memory_order_seq_cst)  # pairs with wake_for_gated and idle_announce
    worker.in_gate = True
    worker.slice_tasks = 0
    worker.slice_end_ns = now_ns() + SLICE_NS


cdef bint gate_enter(worker_t *worker) noexcept nogil:
    """Enter the gate, unless another worker waits for it: it will take the tasks, or wake one."""
    cdef sched_t *sched = worker.sched
    cdef int nobody = 0
    if not sched.gate.exclusive:
        sched.gate_waiters.fetch_add(1, memory_order_relaxed)
    elif not sched.gate_waiters.compare_exchange_strong(
        nobody, 1, memory_order_relaxed, memory_order_relaxed
    ):
        return False
    gate_wait(worker)
    return True


cdef void gate_leave(worker_t *worker) noexcept nogil:
    cdef sched_t *sched = worker.sched
    if worker.in_gate:
        worker.in_gate = False
        sched.gate.leave(worker.entered)
        if first_gated(sched, LEVELS) >= 0:
            wake_for_gated(sched)


cdef void gate_yield(worker_t *worker) noexcept nogil:
    """Let others through the gate once the slice is over."""
    cdef sched_t *sched = worker.sched
    if worker.slice_tasks >= SLICE_TASKS or now_ns() >= worker.slice_end_ns:
        sched.gate_waiters.fetch_add(1, memory_order_relaxed)
        sched.gate.leave(worker.entered)
        gate_wait(worker)


cdef void steal_more(worker_t *worker, ring_t *theirs, int level) noexcept nogil:
    """Move up to half of a ring over, so that the two workers meet there less often."""
    cdef ring_t *ring = &worker.rings[level]
    cdef void *task
    cdef bint moved = False
    for _ in range(min(ring_size(theirs) // 2, BATCH - 1)):
        if not ring_has_room(ring):
            break
        task = ring_take(theirs)
        if task == NULL:
            break
        ring_push(ring, task)
        bump(&worker.stolen)
        moved = True
    if moved:
        wake_for(worker.sched, level)  # for a while, the tasks were on no ring


cdef task_t *steal(worker_t *worker, int level, bint more) noexcept nogil:
    """Take the oldest task of some other worker's ring, starting at a random one."""
    cdef sched_t *sched = worker.sched
    cdef task_t *task
    cdef worker_t *victim
    cdef int offset
    cdef int n_workers = sched.n_workers
    if not sched.stealing:
        return NULL
    # Marsaglia's xorshift64.
    worker.random ^= worker.random << 13
    worker.random ^= worker.random >> 7
    worker.random ^= worker.random << 17
    cdef int start = worker.random % <uint64_t>n_workers
    for offset in range(n_workers):
        victim = &sched.workers[(start + offset) % n_workers]
        if victim != worker:
            task = <task_t *>ring_take(&victim.rings[level])
            if task != NULL:
                bump(&worker.stolen)
                if more:
                    steal_more(worker, &victim.rings[level], level)
                return task
    return NULL


cdef task_t *pick_fair(worker_t *worker, uint64_t turn) noexcept nogil:
    """Pick from one level only, each level and each of its sources being the first in turn."""
    cdef int level = turn % LEVELS
    cdef int first = turn // LEVELS % SOURCES
    cdef int offset, source
    cdef task_t *task = NULL
    if level >= worker.levels:
        return NULL
    for offset in range(SOURCES):
        source = (first + offset) % SOURCES
        if source == SOURCE_RING:
            task = <task_t *>ring_take(&worker.rings[level])
        elif source == SOURCE_NATIVE:
            task = take_native(worker, level)
        elif source == SOURCE_VICTIMS:
            task = steal(worker, level, False)
        elif is_queued(worker.sched, LEVELS + level):
            if worker.in_gate or gate_enter(worker):
                task = take_gated(worker, level)
        if task != NULL:
            return task
    return NULL


cdef inline bint is_active(worker_t *worker) noexcept nogil:
    return (worker.sched.active.load(memory_order_relaxed) >> worker.index) & 1


cdef task_t *pick(worker_t *worker) noexcept nogil:
    """Take the task to run next, or return NULL.

    Highest priority first; within one, what the worker has, then what is queued for all; stealing
    comes last. Gated and native tasks of a priority take turns. Once in FAIR_PERIOD picks the order
    is another, so that every level is served within FAIR_PERIOD * LEVELS picks.
    """
    cdef sched_t *sched = worker.sched
    cdef task_t *task
    cdef bint gated_first
    cdef int level, turn
    worker.picks += 1
    if not is_active(worker):
        for level in range(SCHED_HIGH, worker.levels):
            task = <task_t *>ring_take(&worker.rings[level])
            if task != NULL:
                return task
        return NULL
    if worker.picks % FAIR_PERIOD == 0:
        task = pick_fair(worker, worker.picks // FAIR_PERIOD)
        if task != NULL:
            return task
    gated_first = worker.picks & 1
    for level in range(worker.levels):
        for turn in range(2):
            if turn != gated_first:
                task = <task_t *>ring_take(&worker.rings[level])
                if task == NULL:
                    task = take_native(worker, level)
                if task != NULL:
                    return task
            elif is_queued(sched, LEVELS + level):
                if worker.in_gate:
                    task = take_gated(worker, level)
                    if task != NULL:
                        return task
                elif gate_enter(worker):
                    return pick(worker)  # entering took its time: what is best now?
    for level in range(SCHED_HIGH, worker.levels):
        task = steal(worker, level, True)
        if task != NULL:
            return task
    return NULL


cdef task_t *pick_to_help(worker_t *worker) noexcept nogil:
    """Take a native task for a worker that waits: the newest of its own, most likely its child."""
    cdef task_t *task
    cdef int level
    for level in range(SCHED_HIGH, worker.levels):
        task = <task_t *>ring_pop(&worker.rings[level])
        if task != NULL:
            return task
    for level in range(worker.levels):
        task = take_native(worker, level)
        if task == NULL:
            task = steal(worker, level, True)
        if task != NULL:
            return task
    return NULL


cdef int seen_level(worker_t *worker) noexcept nogil:
    """The highest priority at which `pick` may find something, or -1."""
    cdef sched_t *sched = worker.sched
    cdef bint active = is_active(worker)
    cdef bint gated = active and (
        not sched.gate.exclusive or sched.gate_waiters.load(memory_order_relaxed) == 0
    )
    cdef int index, level
    for level in range(worker.levels):
        if active and is_queued(sched, level):
            return level
        if gated and is_queued(sched, LEVELS + level):
            return level
        for index in range(sched.n_workers):
            if index == worker.index or (active and sched.stealing):
                if ring_size(&sched.workers[index].rings[level]) > 0:
                    return level
    return -1


cdef bint is_quiescent(sched_t *sched) noexcept nogil:
    """Tell whether all accepted tasks are done.

    Both counts only grow and the second is never behind, so reading them in this order gives equal
    numbers only if they were equal in between.
    """
    cdef int index, level
    cdef uint64_t done = sched.dropped.load(memory_order_acquire)
    cdef uint64_t accepted = 0
    for index in range(sched.n_workers):
        for level in range(LEVELS):
            done += sched.workers[index].executed[level].load(memory_order_acquire)
    for index in range(sched.n_workers):
        accepted += sched.workers[index].spawned.load(memory_order_acquire)
    accepted += sched.admitted.load(memory_order_acquire) >> 1
    return done == accepted


cdef void announce_quiet(sched_t *sched) noexcept nogil:
    """If all tasks are done: tell those who wait for it, and stop if draining."""
    # Looked at first: before, more tasks could be accepted after all were found done.
    cdef int state = sched.state.load(memory_order_seq_cst)
    if not is_quiescent(sched):
        return
    if state == SCHED_DRAINING and sched.state.compare_exchange_strong(
        state, SCHED_STOPPED, memory_order_seq_cst, memory_order_seq_cst
    ):
        wake_all(sched)
    sched.quiet.lock()
    sched.quiet.notify_all()
    sched.quiet.unlock()


cdef bint search(worker_t *worker) noexcept nogil:
    """Look for work for a little while, during which nobody is woken; tell whether there is some.

    If so, and `pick` then finds it, `wake_after_search` must follow.
    """
    cdef sched_t *sched = worker.sched
    if not sched.searching_allowed or worker.levels < LEVELS or not is_active(worker):
        return False
    worker.searched = False
    sched.searching.fetch_add(1, memory_order_relaxed)
    for _ in range(LOOKS):
        for _ in range(PAUSES):
            pause()
        if seen_level(worker) >= 0:
            worker.searched = True
            break
    sched.searching.fetch_sub(1, memory_order_seq_cst)
    atomic_thread_fence(memory_order_seq_cst)  # pairs with wake_for
    return worker.searched


cdef void wake_after_search(worker_t *worker) noexcept nogil:
    """Wake a worker for what was queued during the search besides the task that was found."""
    cdef int level = seen_level(worker)
    worker.searched = False
    if level >= 0:
        wake_for(worker.sched, level)


cdef void park(worker_t *worker) noexcept nogil:
    cdef sched_t *sched = worker.sched
    cdef uint64_t bit = <uint64_t>1 << worker.index
    cdef int64_t since
    idle_announce(&sched.idle, bit)
    # The fence in there also lets the last two workers to finish not overlook each other.
    if (
        sched.state.load(memory_order_relaxed) == SCHED_DRAINING
        or sched.drain_waiters.load(memory_order_relaxed) != 0
    ):
        announce_quiet(sched)
    if sched.state.load(memory_order_relaxed) >= SCHED_STOPPED or seen_level(worker) >= 0:
        if idle_retract(&sched.idle, bit):
            return
    since = now_ns()
    worker.parked_since_ns.store(since, memory_order_relaxed)
    bump(&worker.parks)
    worker.semaphore.wait()
    worker.parked_since_ns.store(0, memory_order_relaxed)
    worker.parked_ns.store(
        worker.parked_ns.load(memory_order_relaxed) + now_ns() - since, memory_order_relaxed
    )
    if not is_active(worker):
        # The wake-up may have been meant for work that this worker has just lost the right to.
        wake_for(sched, SCHED_LOW)


cdef void finish(const task_t *task, int status) noexcept nogil:
    if task.done != NULL:
        task.done(task.arg, status)
    if task.counter != NULL:
        counter_done(task.counter, status)


cdef inline task_t take_over(task_t *queued) noexcept nogil:
    """A copy of a task, whose storage is its owner's again."""
    queued.queued = False
    return queued[0]


cdef void drop(sched_t *sched, const task_t *task) noexcept nogil:
    finish(task, TASK_CANCELLED)
    sched.dropped.fetch_add(1, memory_order_release)


cdef void run(worker_t *worker, task_t *queued) noexcept nogil:
    cdef task_t task = take_over(queued)  # `fn` may reuse it
    cdef int64_t started_ns = 0
    cdef int status
    if worker.sched.cancelling.load(memory_order_relaxed):
        drop(worker.sched, &task)
        return
    if task.queued_ns != 0:
        started_ns = now_ns()
        histogram_add(&worker.wait[task.priority], started_ns - task.queued_ns)
    status = task.fn(task.arg)
    if task.queued_ns != 0:
        histogram_add(&worker.run, now_ns() - started_ns)
    finish(&task, status)
    bump(&worker.executed[task.priority])


cdef void sched_work(sched_t *sched, int index) noexcept nogil:
    global this_worker
    cdef worker_t *worker = &sched.workers[index]
    cdef task_t *task
    this_worker = worker
    worker.started_ns.store(now_ns(), memory_order_relaxed)
    while True:
        if sched.state.load(memory_order_relaxed) == SCHED_FORKED:
            gate_leave(worker)  # a task forked: what is queued is the parent's to run
            break
        if worker.in_gate:
            gate_yield(worker)
        task = pick(worker)
        if task == NULL:
            gate_leave(worker)
            if sched.state.load(memory_order_acquire) >= SCHED_STOPPED:
                break
            if not search(worker):
                park(worker)
            continue
        if worker.searched:
            wake_after_search(worker)
        if task.gated:
            worker.slice_tasks += 1
            run(worker, task)
        else:
            gate_leave(worker)
            run(worker, task)
    this_worker = NULL


cdef int sched_wait(sched_t *sched, counter_t *counter) noexcept nogil:
    cdef worker_t *worker = worker_here(sched)
    cdef task_t *task
    if sched.state.load(memory_order_relaxed) == SCHED_FORKED:
        return TASK_CANCELLED
    # A gated task has left the gate for this, and what it helps with is native.
    if worker != NULL:
        while counter.pending.load(memory_order_acquire) != 0:
            task = pick_to_help(worker)
            if task == NULL:
                break  # the tasks still counted are running, and help themselves if they wait
            run(worker, task)
    counter.monitor.lock()
    while counter.pending.load(memory_order_acquire) != 0:
        counter.monitor.wait(-1)
    counter.monitor.unlock()
    return counter.failure.exchange(0, memory_order_relaxed)


cdef bint sched_drain(sched_t *sched, double seconds) noexcept nogil:
    cdef int64_t deadline = now_ns() + <int64_t>(seconds * 1e9)
    cdef bint quiet
    cdef double left = -1
    sched.drain_waiters.fetch_add(1, memory_order_relaxed)
    atomic_thread_fence(memory_order_seq_cst)  # pairs with idle_announce in park
    sched.quiet.lock()
    while True:
        quiet = is_quiescent(sched)
        if seconds >= 0:
            left = max(1e-9 * <double>(deadline - now_ns()), 0.0)
        if quiet or left == 0:
            break
        sched.quiet.wait(left)
    sched.quiet.unlock()
    sched.drain_waiters.fetch_sub(1, memory_order_relaxed)
    return quiet


cdef void sched_shutdown(sched_t *sched, bint cancel) noexcept nogil:
    cdef task_t *task
    cdef task_t dropped
    cdef int running = SCHED_RUNNING
    cdef int index
    if sched.state.load(memory_order_relaxed) == SCHED_FORKED:
        return
    sched.admitted.fetch_or(ADMISSION_CLOSED, memory_order_acq_rel)
    sched.state.compare_exchange_strong(
        running, SCHED_DRAINING, memory_order_seq_cst, memory_order_seq_cst
    )
    if cancel:
        sched.cancelling.store(True, memory_order_relaxed)
        for index in range(2 * LEVELS):
            while True:
                lock_queue(sched, index)
                task = remove_head(sched, index)
                unlock_queue(sched, index)
                if task == NULL:
                    break
                dropped = take_over(task)
                drop(sched, &dropped)
    atomic_thread_fence(memory_order_seq_cst)  # pairs with idle_announce in park
    announce_quiet(sched)


cdef void sched_resize(sched_t *sched, int count) noexcept nogil:
    cdef uint64_t reserved = first_bits(sched.n_workers) & ~first_bits(
        sched.n_workers - sched.reserved
    )
    sched.active.store(first_bits(count) | reserved, memory_order_relaxed)
    wake_all(sched)


cdef int64_t sched_queued(sched_t *sched) noexcept nogil:
    cdef uint64_t taken = 0
    cdef int index
    for index in range(2 * LEVELS):
        taken += sched.taken[index].load(memory_order_acquire)
    # Read last, so that it is not behind.
    return (sched.admitted.load(memory_order_relaxed) >> 1) - taken


cdef int64_t queue_length(sched_t *sched, int index) noexcept nogil:
    # In a forked child the lock may be held by a thread that is not there.
    if sched.state.load(memory_order_relaxed) != SCHED_FORKED:
        lock_queue(sched, index)
        flush(sched, index)
        unlock_queue(sched, index)
    return sched.queues[index].length.load(memory_order_relaxed)


cdef int64_t sched_depth(sched_t *sched, int priority) noexcept nogil:
    cdef int index
    cdef int64_t depth = queue_length(sched, priority) + queue_length(sched, LEVELS + priority)
    for index in range(sched.n_workers):
        depth += ring_size(&sched.workers[index].rings[priority])
    return depth
