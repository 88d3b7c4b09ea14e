"""Runs C tasks on the workers of a speechrnt.Scheduler, without the GIL."""

from libc.stdint cimport uint64_t
from libc.stdlib cimport calloc, free
from speechrnt.capi cimport (
    SR_ABI_VERSION,
    SR_CANCELLED,
    SR_CLOSED,
    SR_INVALID,
    SR_IN_USE,
    SR_LOW,
    SR_NORMAL,
    SR_OK,
    SR_OVERLOADED,
    sr_abi_version,
    sr_counter,
    sr_counter_free,
    sr_counter_new,
    sr_counter_pending,
    sr_sched,
    sr_sched_of,
    sr_sched_queued,
    sr_sched_spawn,
    sr_sched_submit,
    sr_sched_submit_many,
    sr_sched_wait,
    sr_task,
    sr_task_init,
)

if sr_abi_version() != SR_ABI_VERSION:
    raise ImportError("built for another version of speechrnt's C interface")

STATUSES = {
    "ok": SR_OK,
    "invalid": SR_INVALID,
    "overloaded": SR_OVERLOADED,
    "closed": SR_CLOSED,
    "in_use": SR_IN_USE,
    "cancelled": SR_CANCELLED,
}


cdef struct square_t:
    sr_task task  # in our own data: nothing is allocated for a task
    sr_sched *sched
    uint64_t number
    uint64_t result
    uint64_t done


cdef int run_square(void *arg) noexcept nogil:
    cdef square_t *square = <square_t *> arg
    square.result = square.number * square.number
    return SR_OK


cdef int run_failing(void *arg) noexcept nogil:
    return 42


cdef void note_done(void *arg, int status) noexcept nogil:
    (<square_t *> arg).done += 1 + (status != SR_OK)


# The parent of all others: spawns them.
cdef int run_parent(void *arg) noexcept nogil:
    cdef square_t *square = <square_t *> arg
    cdef uint64_t i
    for i in range(1, square.number):
        if sr_sched_spawn(square.sched, &square[i].task) != SR_OK:
            run_square(&square[i])
    return SR_OK


cdef class Squares:
    """`count` tasks, each of which squares its number."""

    cdef object scheduler  # `sched` lives as long as this does
    cdef sr_sched *sched
    cdef sr_counter *counter
    cdef square_t *squares
    cdef readonly uint64_t count

    def __cinit__(self, scheduler, uint64_t count):
        self.scheduler = scheduler
        self.sched = sr_sched_of(scheduler)
        self.count = count
        self.squares = <square_t *> calloc(count, sizeof(square_t))
        if self.squares == NULL or sr_counter_new(&self.counter) != SR_OK:
            raise MemoryError
        cdef square_t *square
        for i in range(count):
            square = &self.squares[i]
            square.sched = self.sched
            square.number = i
            sr_task_init(&square.task, run_square, square, SR_NORMAL, note_done, self.counter)

    def __dealloc__(self):
        if self.counter != NULL:
            sr_counter_free(self.counter)
        free(self.squares)

    def submit(self):
        """Submit each by itself, waiting for room when there is none; count what is refused."""
        cdef uint64_t i
        cdef uint64_t refused = 0
        cdef int status
        with nogil:
            for i in range(self.count):
                status = sr_sched_submit(self.sched, &self.squares[i].task)
                if status == SR_OVERLOADED:
                    sr_sched_wait(self.sched, self.counter)
                    status = sr_sched_submit(self.sched, &self.squares[i].task)
                refused += status != SR_OK
        return refused

    def submit_many(self):
        """Submit all together; return the status."""
        cdef int status
        with nogil:
            status = sr_sched_submit_many(
                self.sched, &self.squares[0].task, sizeof(square_t), self.count
            )
        return status

    def spawn(self):
        """Submit the first, which spawns the others."""
        cdef square_t *parent = &self.squares[0]
        parent.number = self.count
        sr_task_init(&parent.task, run_parent, parent, SR_LOW, note_done, self.counter)
        return sr_sched_submit(self.sched, &parent.task)

    def fail(self):
        """Submit one task that fails."""
        cdef square_t *square = &self.squares[0]
        sr_task_init(&square.task, run_failing, square, SR_NORMAL, note_done, self.counter)
        return sr_sched_submit(self.sched, &square.task)

    def init_wrongly(self):
        """Try what is no task, submit it and a batch with it; return the statuses."""
        cdef square_t *square = &self.squares[0]
        return [
            sr_task_init(&square.task, NULL, square, SR_NORMAL, NULL, NULL),
            sr_task_init(&square.task, run_square, square, SR_LOW + 1, NULL, NULL),
            sr_task_init(&square.task, run_square, square, -1, NULL, NULL),
            sr_sched_submit(self.sched, &square.task),
            sr_sched_spawn(self.sched, &square.task),
            sr_sched_submit_many(self.sched, &square.task, sizeof(square_t), self.count),
            sr_task_init(&square.task, run_square, square, SR_LOW, NULL, NULL),
            sr_sched_submit_many(self.sched, &square.task, sizeof(square_t), self.count),
            sr_sched_submit_many(self.sched, &square.task, 1, self.count),
        ]

    def submit_twice(self):
        """Submit all, and what is queued already in every way; return the statuses."""
        cdef sr_task *task = &self.squares[self.count - 1].task
        return [
            sr_sched_submit_many(self.sched, &self.squares[0].task, sizeof(square_t), self.count),
            sr_sched_submit(self.sched, task),
            sr_sched_spawn(self.sched, task),
            sr_sched_submit_many(self.sched, &self.squares[0].task, sizeof(square_t), self.count),
        ]

    def wait(self):
        """Wait for all; return the status of the first that failed."""
        cdef int status
        with nogil:
            status = sr_sched_wait(self.sched, self.counter)
        return status

    def pending(self):
        """Count those that are not done."""
        return sr_counter_pending(self.counter)

    def queued(self):
        """Count those that wait, of the whole scheduler."""
        return sr_sched_queued(self.sched)

    def wrong(self, uint64_t first=0):
        """Count the tasks that did not run once and report so once."""
        cdef uint64_t i
        cdef uint64_t wrong = 0
        cdef square_t *square
        for i in range(first, self.count):
            square = &self.squares[i]
            wrong += square.result != i * i or square.done != 1
            square.result = square.done = 0
        return wrong
