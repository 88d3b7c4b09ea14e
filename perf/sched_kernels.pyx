# cython: cdivision=True
"""The native rows of bench_sched.py. All functions return nanoseconds per operation."""

from libc.stdint cimport int64_t, uintptr_t
from libc.stdlib cimport calloc, free
from libcpp.atomic cimport atomic, memory_order_relaxed

from speechrnt._deque cimport ring_has_room, ring_pop, ring_push, ring_t, ring_take
from speechrnt._sched cimport sched_of
from speechrnt._sched_core cimport (
    SCHED_OK, counter_create, counter_destroy, counter_t, now_ns, sched_drain, sched_spawn,
    sched_submit, sched_t, sched_wait, task_t,
)

cdef struct work_t:
    task_t task
    sched_t *sched
    counter_t *counter
    work_t *children
    int64_t n_children
    int64_t rounds
    int64_t spin


cdef int run_leaf(void *arg) noexcept nogil:
    cdef work_t *work = <work_t *>arg
    cdef atomic[int64_t] sink
    cdef int64_t i
    for i in range(work.spin):
        sink.store(i, memory_order_relaxed)
    return 0


cdef int run_parent(void *arg) noexcept nogil:
    cdef work_t *work = <work_t *>arg
    cdef int64_t i
    for _ in range(work.rounds):
        for i in range(work.n_children):
            if sched_spawn(work.sched, &work.children[i].task) != SCHED_OK:
                run_leaf(&work.children[i])
        sched_wait(work.sched, work.counter)
    return 0


cdef class Ring:
    cdef ring_t ring

    def push_and_remove(self, int64_t rounds, bint newest):
        """Push 100 items and remove them, as their owner."""
        cdef int64_t started = now_ns()
        cdef uintptr_t i
        with nogil:
            for _round in range(rounds):
                for i in range(1, 101):
                    if ring_has_room(&self.ring):
                        ring_push(&self.ring, <void *>i)
                for _ in range(100):
                    if newest:
                        ring_pop(&self.ring)
                    else:
                        ring_take(&self.ring)
        return (now_ns() - started) / (100.0 * rounds)


cdef class Tasks:
    """A parent and its children, on one scheduler."""

    cdef work_t parent
    cdef counter_t *done
    cdef object scheduler

    def __cinit__(self, scheduler, int64_t n_children, int64_t spin=0, int64_t long_spin=0):
        cdef work_t *child
        self.scheduler = scheduler
        self.parent.sched = sched_of(scheduler)
        self.parent.counter = counter_create()
        self.parent.n_children = n_children
        self.parent.children = <work_t *>calloc(n_children, sizeof(work_t))
        self.done = counter_create()
        self.parent.task.fn = run_parent
        self.parent.task.arg = &self.parent
        self.parent.task.counter = self.done
        self.parent.task.priority = 2
        for i in range(n_children):
            child = &self.parent.children[i]
            child.task.fn = run_leaf
            child.task.arg = child
            child.task.counter = self.parent.counter
            child.task.priority = 2
            child.spin = long_spin if i % 5 == 0 else spin

    def __dealloc__(self):
        counter_destroy(self.parent.counter)
        counter_destroy(self.done)
        free(self.parent.children)

    def spawn(self, int64_t rounds):
        """Have one task spawn the children and wait for them, again and again."""
        cdef int64_t started = now_ns()
        self.parent.rounds = rounds
        with nogil:
            sched_submit(self.parent.sched, &self.parent.task)
            sched_wait(self.parent.sched, self.done)
        return (now_ns() - started) / <double>(rounds * self.parent.n_children)

    def submit(self):
        """Submit the children from this thread; return the times for that, and until all ran."""
        cdef int64_t i, submitted
        for i in range(self.parent.n_children):
            self.parent.children[i].task.counter = NULL
        cdef int64_t started = now_ns()
        with nogil:
            for i in range(self.parent.n_children):
                sched_submit(self.parent.sched, &self.parent.children[i].task)
            submitted = now_ns()
            sched_drain(self.parent.sched, -1)
        n = <double>self.parent.n_children
        return (submitted - started) / n, (now_ns() - started) / n
