# cython: cdivision=True
"""C tasks and bare deques for tests/test_sched_native.py and others."""

from libc.stdint cimport int64_t, uint64_t, uintptr_t
from libc.stdlib cimport calloc, free
from libcpp.atomic cimport atomic, memory_order_relaxed
from libcpp.vector cimport vector

from speechrnt._deque cimport (
    ring_has_room, ring_pop, ring_push, ring_size, ring_t, ring_take, RING_CAPACITY,
)
from speechrnt._sched cimport sched_of
from speechrnt._sched_core cimport (
    counter_create, counter_destroy, counter_t, now_ns, sched_spawn, sched_submit, sched_t,
    sched_wait, task_t, LEVELS, SCHED_OK,
)

cdef extern from "<sched.h>" nogil:
    int sched_yield()

CAPACITY = RING_CAPACITY


cdef class Ring:
    """A bare ring of positive numbers."""

    cdef ring_t ring

    def size(self):
        return ring_size(&self.ring)

    def push(self, uintptr_t number):
        if not ring_has_room(&self.ring):
            return False
        ring_push(&self.ring, <void *>number)
        return True

    def take(self):
        return <uintptr_t>ring_take(&self.ring)

    def pop(self):
        return <uintptr_t>ring_pop(&self.ring)

    def own(self, int64_t count, int pop_every, int take_every):
        """Push 1..count, removing one now and then; return what was removed, newest or oldest."""
        cdef vector[int64_t] got
        cdef int64_t number = 1
        cdef uintptr_t item
        with nogil:
            while number <= count:
                if ring_has_room(&self.ring):
                    ring_push(&self.ring, <void *><uintptr_t>number)
                    number += 1
                else:
                    sched_yield()
                if pop_every and number % pop_every == 0:
                    item = <uintptr_t>ring_pop(&self.ring)
                    if item:
                        got.push_back(item)
                if take_every and number % take_every == 0:
                    item = <uintptr_t>ring_take(&self.ring)
                    if item:
                        got.push_back(item)
        return got

    def steal(self, Stop stop):
        """Take until told to stop and empty; return what was taken, in order."""
        cdef vector[int64_t] got
        cdef uintptr_t item
        cdef bint last
        with nogil:
            while True:
                last = stop.flag.load(memory_order_relaxed)
                item = <uintptr_t>ring_take(&self.ring)
                if item:
                    got.push_back(item)
                elif last:
                    break
                else:
                    sched_yield()
        return got


cdef class Stop:
    """A flag for code without the GIL."""

    cdef atomic[bint] flag

    def set(self):
        self.flag.store(True, memory_order_relaxed)


cdef struct item_t:
    task_t task
    Batch_t *batch
    int64_t number
    uint64_t state

cdef struct Batch_t:
    sched_t *sched
    atomic[int64_t] runs
    atomic[int64_t] cancelled
    atomic[int64_t] order
    atomic[int64_t] limit
    int64_t[LEVELS] last     # by one worker only
    int64_t[LEVELS] longest
    int status
    counter_t *counter
    int64_t spin
    atomic[bint] held


cdef int run_item(void *arg) noexcept nogil:
    cdef item_t *item = <item_t *>arg
    item.state += 1
    item.batch.runs.fetch_add(1, memory_order_relaxed)
    spin(item.batch.spin)
    return item.batch.status


cdef void count_cancelled(void *arg, int status) noexcept nogil:
    if status < 0:
        (<item_t *>arg).batch.cancelled.fetch_add(1, memory_order_relaxed)


cdef void spin(int64_t count) noexcept nogil:
    cdef atomic[int64_t] sink
    while count > 0:
        sink.store(count, memory_order_relaxed)
        count -= 1


cdef int run_respawning(void *arg) noexcept nogil:
    """Note how long this level was not served, and keep it non-empty."""
    cdef item_t *item = <item_t *>arg
    cdef Batch_t *batch = item.batch
    cdef int level = item.task.priority
    cdef int64_t now = batch.order.fetch_add(1, memory_order_relaxed)
    batch.longest[level] = max(batch.longest[level], now - batch.last[level])
    batch.last[level] = now
    if now < batch.limit.load(memory_order_relaxed):
        if item.state:
            sched_spawn(batch.sched, &item.task)
        else:
            sched_submit(batch.sched, &item.task)
    return 0


cdef int run_hold(void *arg) noexcept nogil:
    """Say so, and keep a worker busy until the batch is released."""
    (<item_t *>arg).batch.order.store(1)
    while (<item_t *>arg).batch.held.load():
        sched_yield()
    return 0


cdef int run_spawner(void *arg) noexcept nogil:
    """Spawn all other items of the batch."""
    cdef item_t *item = <item_t *>arg
    cdef int64_t i
    for i in range(1, item.number):
        if sched_spawn(item.batch.sched, &item[i].task) != SCHED_OK:
            return 1
    return 0


cdef int run_fork_join(void *arg) noexcept nogil:
    """Sum 0..number-1 into state by halving, each half a child."""
    cdef item_t *item = <item_t *>arg
    cdef item_t[2] halves
    cdef counter_t *counter
    cdef int i
    if item.number <= 1:
        item.state = 1
        return 0
    counter = counter_create()
    for i in range(2):
        halves[i] = item[0]
        halves[i].number = item.number // 2 + (item.number % 2 if i else 0)
        halves[i].task.arg = &halves[i]
        halves[i].task.counter = counter
        if sched_spawn(item.batch.sched, &halves[i].task) != SCHED_OK:
            run_fork_join(&halves[i])
    sched_wait(item.batch.sched, counter)
    counter_destroy(counter)
    item.state = halves[0].state + halves[1].state
    return 0


cdef class Batch:
    """C tasks of one scheduler."""

    cdef Batch_t *batch
    cdef item_t *items
    cdef readonly int64_t count
    cdef readonly object scheduler

    def __cinit__(self, scheduler, int64_t count, int priority=2, int status=0, int64_t spin=0):
        self.scheduler = scheduler
        self.count = count
        self.batch = <Batch_t *>calloc(1, sizeof(Batch_t))
        self.items = <item_t *>calloc(count, sizeof(item_t))
        self.batch.sched = sched_of(scheduler)
        self.batch.counter = counter_create()
        self.batch.status = status
        self.batch.spin = spin
        for i in range(count):
            self.items[i].batch = self.batch
            self.items[i].number = i
            self.items[i].task.fn = run_item
            self.items[i].task.done = count_cancelled
            self.items[i].task.arg = &self.items[i]
            self.items[i].task.counter = self.batch.counter
            self.items[i].task.priority = priority

    def __dealloc__(self):
        counter_destroy(self.batch.counter)
        free(self.batch)
        free(self.items)

    @property
    def runs(self):
        return self.batch.runs.load()

    @property
    def order(self):
        return self.batch.order.load()

    @property
    def cancelled(self):
        return self.batch.cancelled.load()

    @property
    def states(self):
        return [self.items[i].state for i in range(self.count)]

    def submit(self, int64_t start=0, int64_t stop=-1):
        """Submit the items, one by one; return how many were accepted."""
        cdef int64_t accepted = 0
        cdef int64_t i
        stop = self.count if stop < 0 else stop
        with nogil:
            for i in range(start, stop):
                if sched_submit(self.batch.sched, &self.items[i].task) == SCHED_OK:
                    accepted += 1
        return accepted

    def wait(self):
        """Wait for the items; return the first status that was not 0."""
        cdef int status
        with nogil:
            status = sched_wait(self.batch.sched, self.batch.counter)
        return status

    def submit_and_wait(self, int64_t rounds, uint64_t random):
        """Submit the first item `rounds` times, after random delays, waiting for each."""
        with nogil:
            for _ in range(rounds):
                random = random * 6364136223846793005ULL + 1442695040888963407ULL
                spin((random >> 33) % 3000)
                sched_submit(self.batch.sched, &self.items[0].task)
                sched_wait(self.batch.sched, self.batch.counter)

    def saturate(self, int64_t limit):
        """Keep every level of rings and queues full until `limit` tasks ran; longest gaps.

        Of a scheduler with one worker. The first item holds it until the others are queued.
        """
        cdef int64_t i
        self.batch.limit.store(limit)
        self.batch.held.store(True)
        self.items[0].task.fn = run_hold
        for i in range(1, self.count):
            self.items[i].task.fn = run_respawning
            self.items[i].task.priority = i % LEVELS
            self.items[i].state = (i // LEVELS) % 2
        self.submit(0, 1)
        with nogil:
            while self.batch.order.load() == 0:
                sched_yield()
        self.submit(1, self.count)
        self.batch.held.store(False)
        self.wait()
        return [self.batch.longest[i] for i in range(LEVELS)]

    def end(self):
        """Have a saturation end now."""
        self.batch.limit.store(0)

    def spawn_all(self):
        """Submit one item that spawns the others; wait for all; return the nanoseconds."""
        cdef int64_t started = now_ns()
        self.items[0].task.fn = run_spawner
        self.items[0].number = self.count
        self.submit(0, 1)
        self.wait()
        return now_ns() - started

    def fork_join(self, int64_t number):
        """Count to `number` by halving."""
        self.items[0].task.fn = run_fork_join
        self.items[0].number = number
        self.submit(0, 1)
        self.wait()
        return self.items[0].state
