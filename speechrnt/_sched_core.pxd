"""The native scheduler, for cimport: tasks are C functions, nothing needs the GIL.

A task is a `task_t` that the caller owns and embeds in its own data, so that none is allocated.
Between submission and the start of `fn` it belongs to the scheduler; `fn` may already reuse it.
Threads are the host's: each one enters `sched_work` with a number of its own. Functions return a
`SchedResult` and never raise; except where noted, any thread may call them.

docs/scheduler-protocol.md describes the protocol.
"""

from libc.stdint cimport int32_t, int64_t, uint8_t, uint64_t, uintptr_t
from libcpp.atomic cimport atomic
from libcpp.mutex cimport mutex

from speechrnt._deque cimport ring_t
from speechrnt._park cimport Monitor, Semaphore

cdef enum:
    MAX_WORKERS = 64         # bits of the idle mask
    LEVELS = 4
    FAIR_PERIOD = 32         # every 32nd pick lets the next level, in turn, go first
    HISTOGRAM_BUCKETS = 160  # four per octave of nanoseconds, up to 18 minutes

cdef enum SchedPriority:
    SCHED_CRITICAL
    SCHED_HIGH
    SCHED_NORMAL
    SCHED_LOW

cdef enum SchedState:
    SCHED_RUNNING    # accepts tasks
    SCHED_DRAINING   # accepts only what its tasks spawn
    SCHED_STOPPED    # all tasks are done, the workers leave sched_work
    SCHED_FORKED     # a copy in a child process, which has no workers

cdef enum SchedResult:
    SCHED_OK
    SCHED_OVERLOADED   # max_queued tasks are waiting
    SCHED_CLOSED       # draining, stopped or forked
    SCHED_QUEUED       # the task is queued already

# What `done` and counters get in place of the status of a task that was dropped before its start.
cdef enum:
    TASK_CANCELLED = -1

# Returns a status, 0 for success. Runs on a worker.
ctypedef int (*task_fn)(void *arg) noexcept nogil
# Called with the task's `arg` and status after `fn`, or instead of it.
ctypedef void (*task_done)(void *arg, int status) noexcept nogil

# Pending tasks of one kind. All fields are internal.
cdef struct counter_t:
    atomic[int64_t] pending
    atomic[int32_t] failure
    Monitor monitor

# The caller sets all fields but the last two before each submission, `queued` once: a task that is
# queued already is refused, unless two threads queue it at the same moment.
cdef struct task_t:
    task_fn fn
    void *arg
    task_done done       # NULL: not called
    counter_t *counter   # NULL: not counted; counted after `done`
    uint8_t priority     # a SchedPriority
    uint8_t queued       # false before the first submission; from then on the scheduler's
    bint gated           # runs inside the gate, such as the GIL
    task_t *next
    int64_t queued_ns    # 0: waiting and running time of this task are not sampled

# What gated tasks need before they run. An `exclusive` gate admits one thread at a time, and at
# most one worker waits to enter it.
cdef struct gate_t:
    int (*enter)() noexcept nogil
    void (*leave)(int entered) noexcept nogil
    bint exclusive

# One writer each; everybody reads.
cdef struct histogram_t:
    atomic[uint64_t] counts[HISTOGRAM_BUCKETS]

# Tasks in order, taken from a stack. `length` may be too high by those that have just left it.
cdef struct queue_t:
    mutex lock
    task_t *head
    task_t *tail
    atomic[int64_t] length

cdef struct worker_t:
    sched_t *sched
    int index
    int levels               # a reserved worker serves only the first two
    ring_t[LEVELS] rings     # that of SCHED_CRITICAL stays empty
    # The worker's own, up to the counters.
    uint64_t picks
    uint64_t random
    bint searched            # since the last task
    bint in_gate
    int entered              # what gate.enter returned
    int slice_tasks          # gated tasks since entering
    int64_t slice_end_ns
    # Counters, written by the worker alone.
    atomic[uint64_t] spawned
    atomic[uint64_t] executed[LEVELS]
    atomic[uint64_t] stolen
    atomic[uint64_t] spilled
    atomic[uint64_t] parks
    atomic[int64_t] parked_ns
    atomic[int64_t] parked_since_ns   # 0: awake
    atomic[int64_t] started_ns
    histogram_t[LEVELS] wait
    histogram_t run
    char[128] apart
    Semaphore semaphore

cdef struct sched_t:
    worker_t *workers
    int n_workers
    int reserved             # workers at the end that serve only CRITICAL and HIGH
    int64_t max_queued
    bint stealing            # set before the workers start, as the next
    bint searching_allowed   # worthless with one CPU: whoever could queue work is not running
    gate_t gate
    char[128] apart1
    atomic[uint64_t] idle    # workers that sleep, or are about to
    char[128] apart2
    atomic[uint64_t] active  # workers that may take what is not theirs
    atomic[int] state
    atomic[bint] cancelling
    atomic[int] searching    # workers that look for work before they sleep
    atomic[int] drain_waiters
    atomic[int] gate_waiters
    Monitor quiet            # notified when the last task is done and somebody waits for that
    char[128] apart3
    # Queues are numbered by level for native tasks, LEVELS + level for gated ones.
    atomic[uint64_t] admitted     # 2 * tasks accepted in queues, + 1 once these are closed
    atomic[uintptr_t] stacks[2 * LEVELS]  # tasks submitted since somebody looked, newest first
    atomic[uint64_t] rejected
    atomic[uint64_t] wakeups
    char[128] apart4
    atomic[uint64_t] taken[2 * LEVELS]    # tasks that have left the queue, written by its holder
    queue_t queues[2 * LEVELS]
    atomic[uint64_t] dropped      # by a shutdown that cancels
    atomic[uint64_t] lock_operations

# A scheduler of n_workers, or NULL for want of memory. Requires 0 <= reserved < n_workers <=
# MAX_WORKERS. `gate` is copied; NULL if there will be no gated tasks.
cdef sched_t *sched_create(
    int n_workers, int reserved, int64_t max_queued, const gate_t *gate,
) noexcept nogil

# No thread may be inside any function of `sched` or enter one.
cdef void sched_destroy(sched_t *sched) noexcept nogil

# Serve as worker `index` until the scheduler has stopped. One thread per index.
cdef void sched_work(sched_t *sched, int index) noexcept nogil

# Queue a task behind those of its priority that were submitted before. No lock.
cdef SchedResult sched_submit(sched_t *sched, task_t *task) noexcept nogil

# Queue `count` tasks, the first linked to the others by `next`, all of one priority and kind: all
# of them or, unchanged, none.
cdef SchedResult sched_submit_many(
    sched_t *sched, task_t *first, int64_t count,
) noexcept nogil

# Queue a task on the ring of the worker that runs the calling task: no lock, and still accepted
# while draining. Elsewhere, and for tasks that a ring does not take, the same as sched_submit.
cdef SchedResult sched_spawn(sched_t *sched, task_t *task) noexcept nogil

# A counter at 0. Each accepted task that points to it counts 1 until it is done.
cdef counter_t *counter_create() noexcept nogil
cdef void counter_destroy(counter_t *counter) noexcept nogil

# Wait until the counter is 0; return and clear the first status that was not 0. A worker helps
# meanwhile, with its newest spawned tasks first; others block. The caller does not hold the GIL.
# TASK_CANCELLED at once in a forked child.
cdef int sched_wait(sched_t *sched, counter_t *counter) noexcept nogil

# Wait until no accepted task is left, which new ones may delay; False if `seconds` pass first (a
# negative number is unlimited). Not for tasks.
cdef bint sched_drain(sched_t *sched, double seconds) noexcept nogil

# Accept nothing more and stop once all tasks are done. With `cancel`, tasks that have not started
# are dropped; inside the gate only, if the scheduler has one.
cdef void sched_shutdown(sched_t *sched, bint cancel) noexcept nogil

# Let the first `count` workers, and the reserved ones, take tasks; others finish their own.
cdef void sched_resize(sched_t *sched, int count) noexcept nogil

# Whether the calling thread is one of this scheduler's workers.
cdef bint sched_is_worker(sched_t *sched) noexcept nogil

# Tasks waiting in the queues, of which there are at most max_queued.
cdef int64_t sched_queued(sched_t *sched) noexcept nogil

# Tasks waiting at one priority, in queues and on rings. Inside the gate, if the scheduler has one.
cdef int64_t sched_depth(sched_t *sched, int priority) noexcept nogil

cdef int64_t now_ns() noexcept nogil

# The longest time, in nanoseconds, that a bucket counts.
cdef int64_t histogram_limit_ns(int bucket) noexcept nogil
