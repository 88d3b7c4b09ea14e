"""The scheduler for Python: an executor with priorities on native, work-stealing workers.

The workers are Python threads that stay inside `sched_work` for life, so that each has one thread
state; they hold the GIL only while they run Python tasks, a few at a time.
"""

cimport cython
from cpython.ref cimport Py_DECREF, Py_INCREF
from libc.stdint cimport uint64_t
from libcpp.atomic cimport memory_order_acquire, memory_order_relaxed

from speechrnt._future cimport FutureBase, new_future
from speechrnt._sched_core cimport (
    HISTOGRAM_BUCKETS, LEVELS, MAX_WORKERS, SCHED_CLOSED, SCHED_FORKED, SCHED_OK, SCHED_RUNNING,
    SchedResult, gate_t, histogram_limit_ns, histogram_t, now_ns, sched_create,
    sched_depth, sched_destroy, sched_drain, sched_is_worker, sched_queued, sched_resize,
    sched_shutdown, sched_submit, sched_submit_many, sched_t, sched_work, task_t, worker_t,
)
from speechrnt._sched_task cimport PythonTask, new_task

cdef extern from "Python.h" nogil:
    ctypedef enum PyGILState_STATE:
        pass
    PyGILState_STATE PyGILState_Ensure()
    void PyGILState_Release(PyGILState_STATE)

import atexit
import logging
import os
import sys
import threading
import time
import weakref
from collections import deque
from concurrent.futures import Executor
from itertools import chain, islice, repeat

from speechrnt._sched_options import (
    checked_count, checked_seconds, chosen_cores, default_count,
)
from speechrnt._sched_timer import Timer, Watch, report_exception
from speechrnt._sched_types import (
    Priority, SchedulerHealth, SchedulerStatistics, Times, WorkerStatistics,
)
from speechrnt.errors import OptionError, Overloaded, SchedulerClosed

__all__ = ["Priority", "Scheduler"]

logger = logging.getLogger("speechrnt")

STATES = ("running", "draining", "stopped", "forked")
ADAPT_PERIOD_S = 0.05
UNHEALTHY_QUEUE_USE = 0.8
MAP_BATCH = 32  # calls submitted at once

# Cores that must not outlive the interpreter, nor be used in a forked child.
live_cores = weakref.WeakSet()
cdef bint exiting = False  # nothing would end another


cdef int enter_gil() noexcept nogil:
    # Of a thread that has a thread state this only takes the GIL.
    return <int>PyGILState_Ensure()


cdef void leave_gil(int state) noexcept nogil:
    PyGILState_Release(<PyGILState_STATE>state)


@cython.final
cdef class Core:
    """The native scheduler and its threads, without the interface.

    The threads refer to this object alone, so that a `Scheduler` nobody refers to can end.
    """

    cdef object __weakref__
    cdef sched_t *sched
    cdef readonly int size
    cdef readonly int delayed
    cdef readonly object threads
    cdef public object timer
    cdef public str at_exit
    cdef object cores  # the CPU of each worker, or None
    cdef set closing   # the threads in `close`, by identifier
    cdef cython.pymutex delayed_lock

    def __cinit__(self, int n_workers, int reserved, long long max_queued, int size, cores):
        cdef gate_t gate
        gate.enter = enter_gil
        gate.leave = leave_gil
        gate.exclusive = getattr(sys, "_is_gil_enabled", lambda: True)()
        self.sched = sched_create(n_workers, reserved, max_queued, &gate)
        if self.sched == NULL:
            raise MemoryError
        self.cores = cores
        self.closing = set()
        self.threads = []
        self.resize(size)

    def __dealloc__(self):
        # In a forked child, destroying the semaphores of lost threads could wait for them forever.
        if self.sched != NULL and self.sched.state.load(memory_order_relaxed) != SCHED_FORKED:
            sched_destroy(self.sched)

    def start(self, name):
        """Start the threads."""
        for index in range(self.sched.n_workers):
            thread = threading.Thread(
                target=self.work, args=(index,), name=f"{name}-{index}", daemon=True
            )
            thread.start()
            self.threads.append(thread)

    def work(self, int index):
        """Be a worker."""
        if self.cores is not None:
            os.sched_setaffinity(0, {self.cores[index]})
        with nogil:
            sched_work(self.sched, index)

    @property
    def state(self):
        return self.sched.state.load(memory_order_acquire)

    def mark_forked(self):
        """Refuse everything from now on: this is a child, without the threads."""
        self.sched.state.store(SCHED_FORKED, memory_order_relaxed)

    cdef int check_open(self) except -1:
        """Raise SchedulerClosed if no tasks are accepted."""
        cdef int state = self.sched.state.load(memory_order_acquire)
        if state == SCHED_FORKED:
            raise SchedulerClosed(
                "this scheduler belongs to the parent process and has no workers here; "
                "make another after the fork"
            )
        if state != SCHED_RUNNING:
            raise SchedulerClosed("the scheduler is shut down and accepts no tasks")
        return 0

    cdef int enqueue(self, PythonTask task) except -1:
        """Queue a task."""
        Py_INCREF(task)  # released when it is done
        cdef SchedResult result = sched_submit(self.sched, &task.task)
        if result != SCHED_OK:
            Py_DECREF(task)
            self.refuse(result, 1)
        return 0

    cdef int enqueue_many(self, list tasks) except -1:
        """Queue tasks of one priority, all or none of them."""
        cdef PythonTask task
        cdef task_t *first = NULL
        cdef task_t *last = NULL
        cdef SchedResult result
        for task in tasks:
            Py_INCREF(task)  # released when it is done
            if first == NULL:
                first = &task.task
            else:
                last.next = &task.task
            last = &task.task
        result = sched_submit_many(self.sched, first, len(tasks))
        if result != SCHED_OK:
            for task in tasks:
                Py_DECREF(task)
            self.refuse(result, len(tasks))
        return 0

    cdef int refuse(self, SchedResult result, Py_ssize_t count) except -1:
        """Raise what became of a submission."""
        if result == SCHED_CLOSED:
            self.check_open()
        raise Overloaded(
            f"no room for {count} more: {sched_queued(self.sched)} tasks are waiting, "
            f"of {self.sched.max_queued} allowed"
        )

    cdef int submit(
        self, PythonTask task, object delay_s, object deadline_s,
    ) except -1:
        """Queue a task, now or later."""
        self.check_open()  # first: in a forked child the timer may be locked for ever
        cdef FutureBase future = task.future
        now = time.monotonic()
        if deadline_s is not None:
            task.timer = self.timer
            task.expires = now + deadline_s
            task.deadline = self.timer.call_at(task.expires, task.expire)
        try:
            if delay_s is None:
                self.enqueue(task)
                return 0
            with self.delayed_lock:
                if self.delayed >= self.sched.max_queued:
                    raise Overloaded(
                        f"{self.delayed} tasks are delayed, which is the most allowed"
                    )
                self.delayed += 1
            delayed = Delayed(self, task)
            delayed.entry = self.timer.call_at(now + delay_s, delayed)
            if delayed.entry is None:
                self.forget_delayed()
                self.check_open()
            elif future is not None:
                future.add_done_callback(delayed.withdraw)
        except (Overloaded, SchedulerClosed):
            task.forget()
            raise
        return 0

    cdef void forget_delayed(self) noexcept:
        with self.delayed_lock:
            self.delayed -= 1

    def executed(self, int index):
        """Tasks that worker `index` ran."""
        cdef uint64_t total = 0
        for level in range(LEVELS):
            total += self.sched.workers[index].executed[level].load(memory_order_relaxed)
        return total

    def is_parked(self, int index):
        """Whether worker `index` sleeps."""
        return self.sched.workers[index].parked_since_ns.load(memory_order_relaxed) != 0

    def queue_length(self):
        """Tasks that wait in the queues, which are bounded by max_queued."""
        return sched_queued(self.sched)

    def queued(self):
        """Tasks that wait, also on the rings of workers."""
        return sum([sched_depth(self.sched, level) for level in range(LEVELS)])

    def resize(self, int size):
        """Set how many workers take tasks, those reserved included."""
        self.size = size
        sched_resize(self.sched, size - self.sched.reserved)

    def is_worker(self):
        """Whether a task of this scheduler is calling."""
        return sched_is_worker(self.sched)

    def is_awaited(self):
        """Whether the end of all tasks waits for the caller: for a task, or a future's callback."""
        return (
            sched_is_worker(self.sched)
            or threading.current_thread() is self.timer.thread
            or threading.get_ident() in self.closing
        )

    def drain(self, timeout):
        """Wait for all tasks; False if that takes longer."""
        cdef double seconds = -1 if timeout is None else timeout
        cdef bint drained
        with nogil:
            drained = sched_drain(self.sched, seconds)
        return drained

    def close(self, bint cancel):
        """Accept nothing more, and stop when all that was accepted is done."""
        if self.state == SCHED_FORKED:
            return
        caller = threading.get_ident()
        outermost = caller not in self.closing
        self.closing.add(caller)
        try:
            for call in self.timer.close():
                if isinstance(call, Delayed):
                    call.cancel()
            # Holding the GIL, as dropped Python tasks need it; no worker waits for it with the
            # mutex.
            sched_shutdown(self.sched, cancel)
        finally:
            if outermost:
                self.closing.discard(caller)

    def join(self, timeout):
        """Wait for the threads of a closed scheduler; False if they take longer."""
        end = None if timeout is None else time.monotonic() + timeout
        if self.state == SCHED_FORKED:
            return True
        for thread in [*self.threads, self.timer.thread]:
            if thread.ident is None:
                continue  # there was no thread to be had for it
            thread.join(None if end is None else max(end - time.monotonic(), 0))
            if thread.is_alive():
                return False
        return True

    cdef object times(self, list histograms):
        """Sum up histograms, given as lists of counts."""
        counts = [sum(column) for column in zip(*histograms)]
        total = sum(counts)
        values = []
        for share in (0.5, 0.9, 0.99):
            seen = 0
            limit = 0
            for bucket, count in enumerate(counts):
                seen += count
                if count and seen >= share * total:
                    limit = histogram_limit_ns(bucket)
                    break
            values.append(limit * 1e-9)
        return Times(total, *values)

    def statistics(self, note):
        """Make a `SchedulerStatistics`."""
        cdef sched_t *sched = self.sched
        cdef worker_t *worker
        workers = []
        wait = [[] for _ in range(LEVELS)]
        run = []
        executed = [0] * LEVELS
        spawned = stolen = spilled = parks = 0
        now = now_ns()
        for index in range(sched.n_workers):
            worker = &sched.workers[index]
            for level in range(LEVELS):
                executed[level] += worker.executed[level].load(memory_order_relaxed)
                wait[level].append(counts_of(&worker.wait[level]))
            run.append(counts_of(&worker.run))
            spawned += worker.spawned.load(memory_order_relaxed)
            stolen += worker.stolen.load(memory_order_relaxed)
            spilled += worker.spilled.load(memory_order_relaxed)
            parks += worker.parks.load(memory_order_relaxed)
            started = worker.started_ns.load(memory_order_relaxed)
            parked = worker.parked_ns.load(memory_order_relaxed)
            since = worker.parked_since_ns.load(memory_order_relaxed)
            if since:
                parked += max(now - since, 0)
            awake = 1 - parked / (now - started) if started and now > started else 0
            workers.append(
                WorkerStatistics(
                    executed=self.executed(index),
                    stolen=worker.stolen.load(memory_order_relaxed),
                    parks=worker.parks.load(memory_order_relaxed),
                    utilisation=min(max(awake, 0.0), 1.0),
                    core=None if self.cores is None else self.cores[index],
                )
            )
        return SchedulerStatistics(
            submitted=sched.admitted.load(memory_order_relaxed) >> 1,
            spawned=spawned,
            executed=dict(zip(Priority, executed)),
            stolen=stolen,
            spilled=spilled,
            rejected=sched.rejected.load(memory_order_relaxed),
            dropped=sched.dropped.load(memory_order_relaxed),
            queued={priority: sched_depth(sched, priority) for priority in Priority},
            delayed=self.delayed,
            wait={priority: self.times(wait[priority]) for priority in Priority},
            run=self.times(run),
            parks=parks,
            wakeups=sched.wakeups.load(memory_order_relaxed),
            lock_operations=sched.lock_operations.load(memory_order_relaxed),
            size=self.size,
            workers=tuple(workers),
            affinity_note=note,
        )


cdef list counts_of(const histogram_t *histogram):
    return [histogram.counts[i].load(memory_order_relaxed) for i in range(HISTOGRAM_BUCKETS)]


@cython.final
cdef class Delayed:
    """What the timer calls for a delayed task."""

    cdef Core core
    cdef PythonTask task
    cdef object entry  # of the timer

    def __init__(self, Core core, PythonTask task):
        self.core = core
        self.task = task

    def __call__(self):
        self.core.forget_delayed()
        try:
            self.core.enqueue(self.task)
        except (Overloaded, SchedulerClosed) as error:
            self.task.fail(error)
            self.task.forget()

    def withdraw(self, future):
        """Give the place up of a task whose future has ended before its time came."""
        if self.core.timer.cancel(self.entry):
            self.core.forget_delayed()
            self.task.claim()
            self.task.forget()

    def cancel(self):
        """Cancel the task: its time will not come."""
        self.core.forget_delayed()
        if self.task.future is None:
            logger.warning("a delayed task was cancelled by the end of its scheduler")
        try:
            self.task.cancel()
            self.task.forget()
        except BaseException:  # from a callback of the future; the others are to be cancelled too
            report_exception()


def stop_at_exit():
    """Let no scheduler be cut off by the end of the interpreter."""
    global exiting
    exiting = True
    for core in list(live_cores):
        core.close(core.at_exit == "cancel")
        core.join(None)


def refuse_in_child():
    """Mark the schedulers of the parent as unusable."""
    for core in list(live_cores):
        core.mark_forked()


atexit.register(stop_at_exit)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=refuse_in_child)


class Scheduler(Executor):
    """An executor with priorities, for Python callables and for native tasks.

    Higher priorities start first, and equal ones in the order of submission; but once in 32 tasks
    a worker serves another priority, in turn, so that none waits forever. Running tasks are not
    interrupted: a CRITICAL task waits at most for the shortest of those that run, unless workers
    are reserved for it.

    Workers hold the GIL for at most 8 Python tasks or 200 µs in a row, and only one at a time waits
    for it; more workers therefore do not slow Python tasks down, and help those that release the
    GIL. Native tasks never take it.

    All methods may be called from any thread, also by tasks, except that tasks cannot wait for all
    tasks. A scheduler that is not shut down is when the interpreter exits or nothing refers to it.
    In a forked child it raises `SchedulerClosed`.

    Parameters
    ----------
    workers : int, optional
        Threads that take tasks, 1 to 64. Default: the CPUs that this process may use.
    affinity : "auto" or iterable of int, optional
        CPUs to bind the workers to, in turn: ``"auto"`` is all that the process may use. Threads
        that tasks start inherit the binding. Without effect where the platform has none, see
        `SchedulerStatistics.affinity_note`.
    reserved : int
        How many of the workers serve only CRITICAL and HIGH. Less than `min_workers`.
    min_workers, max_workers : int, optional
        Bounds between which the number of workers follows the load: one more after 0.1 s in which
        tasks waited and no worker slept, one fewer after 2 s in which none waited and some slept,
        those reserved apart. Default: `workers`.
    max_queued : int
        Tasks that may wait in the shared queues, and, counted apart, be delayed. What workers have
        taken over to their rings, or spawned there, comes on top: native tasks only, at most 256 of
        each of HIGH, NORMAL and LOW per worker. A spawned task beyond that needs room in the queue.
    stealing : bool
        Whether a worker without work takes what another one's task has spawned.
    stall_after : float
        Seconds after which `health` calls a worker stalled that is still at the same task.
    at_exit : "drain" or "cancel"
        What the exit of the interpreter does with waiting tasks; running ones end in any case.
    name : str
        Of the threads, before a number.

    Raises
    ------
    OptionError
        An option is out of range, contradicts another, or names a CPU that is not allowed.
    SchedulerClosed
        The interpreter exits, and has ended its schedulers.

    Examples
    --------
    >>> with Scheduler(workers=2) as scheduler:
    ...     scheduler.submit(pow, 2, 10, priority=Priority.HIGH).result()
    1024
    """

    def __init__(
        self, workers=None, *, affinity=None, reserved=0, min_workers=None, max_workers=None,
        max_queued=65536, stealing=True, stall_after=10.0, at_exit="drain", name="speechrnt",
    ):
        cdef Core core
        if exiting:
            raise SchedulerClosed("the interpreter exits: what this scheduler took could be lost")
        if min_workers is not None:
            min_workers = checked_count("min_workers", min_workers, 1, MAX_WORKERS)
        if max_workers is not None:
            max_workers = checked_count("max_workers", max_workers, 1, MAX_WORKERS)
        if workers is None:
            workers = max(default_count(), min_workers or 1)
            workers = min(workers, max_workers or MAX_WORKERS)
        count = checked_count("workers", workers, 1, MAX_WORKERS)
        low = min_workers or count
        high = max_workers or count
        if not low <= count <= high:
            raise OptionError(
                "min_workers, workers and max_workers must not decrease, "
                f"but are {low}, {count} and {high}"
            )
        reserved = checked_count("reserved", reserved, 0, low - 1)
        max_queued = checked_count("max_queued", max_queued, 1, 2**31 - 1)
        if not isinstance(stealing, bool):
            raise OptionError(f"stealing must be True or False, not {stealing!r}")
        stall_after = checked_seconds("stall_after", stall_after, False)
        if at_exit not in ("drain", "cancel"):
            raise OptionError(f"at_exit must be 'drain' or 'cancel', not {at_exit!r}")
        cores, self._affinity_note = chosen_cores(affinity, high)
        self._max_queued = max_queued
        self._min_workers = low
        self._max_workers = high
        self._stall_after_s = stall_after
        self._core = core = Core(high, reserved, max_queued, count, cores)
        core.sched.stealing = stealing
        core.sched.searching_allowed = default_count() > 1
        core.at_exit = at_exit
        self._watch = Watch(core, high, reserved, low, high)
        period_s = stall_after / 4
        if low < high:
            period_s = min(period_s, ADAPT_PERIOD_S)
        core.timer = Timer(f"{name}-timer", self._watch.tick, period_s)
        live_cores.add(core)
        try:
            core.start(name)
            core.timer.thread.start()
        except BaseException:
            core.close(True)
            raise
        self._finalizer = weakref.finalize(self, core.close, False)
        self._finalizer.atexit = False

    def submit(
        self, fn, /, *args, priority=Priority.NORMAL, delay=None, deadline=None, **kwargs
    ):
        """Have a worker call ``fn(*args, **kwargs)``, in a copy of the caller's context.

        Parameters
        ----------
        fn : callable
            To pass it an argument that is named like one of these, use `functools.partial`.
        priority : Priority
            How soon to start it.
        delay : float, optional
            Seconds before which it is not queued.
        deadline : float, optional
            Seconds from now after which it is not started any more.

        Returns
        -------
        concurrent.futures.Future
            Gets the result, or what `fn` raised, of any class, or `DeadlineExceeded`; for a delayed
            task also `Overloaded`, if the queue is full when its time comes. Cancelling works
            until a worker begins. A task that waits for another's future occupies its worker.

        Raises
        ------
        OptionError
            The priority is unknown or a time is not positive and finite.
        Overloaded
            `max_queued` tasks are waiting.
        SchedulerClosed
            The scheduler is shut down, or belongs to a parent process.
        TypeError
            `fn` is not callable.
        """
        future = new_future()
        submit(self._core, fn, args, kwargs, priority, delay, deadline, future)
        return future

    def submit_nowait(
        self, fn, /, *args, priority=Priority.NORMAL, delay=None, deadline=None, **kwargs
    ):
        """Have a worker call ``fn(*args, **kwargs)`` and ignore the result: no future, less work.

        Parameters and errors are those of `submit`. What `fn` raises goes to
        `threading.excepthook`, and a task that is not run because of its deadline or because its
        scheduler ends is logged.
        """
        submit(self._core, fn, args, kwargs, priority, delay, deadline, None)

    def submit_many(self, fn, arguments, /, *, priority=Priority.NORMAL):
        """Submit ``fn(*args)`` for each `args` of `arguments`: all of them or none.

        It costs less than as many calls of `submit`, and may wake fewer workers.

        Parameters
        ----------
        fn : callable
        arguments : iterable of iterable
            The positional arguments of each call, as for `itertools.starmap`.
        priority : Priority
            Of all the calls.

        Returns
        -------
        list of concurrent.futures.Future
            As of `submit`, one per call.

        Raises
        ------
        OptionError, Overloaded, SchedulerClosed, TypeError
            As for `submit`; Overloaded also if there is room for only some.
        """
        return submit_many(self._core, fn, arguments, priority)

    def map(
        self, fn, *iterables, timeout=None, chunksize=1, buffersize=None, priority=Priority.NORMAL
    ):
        """Call `fn` with the elements of the iterables, like the built-in `map`.

        Parameters
        ----------
        fn : callable
        *iterables : iterable
        timeout : float, optional
            Seconds from now after which waiting for a result raises TimeoutError.
        chunksize : int
            Without effect, as for threads in general.
        buffersize : int, optional
            Calls to submit ahead of the last result taken. Default: half of `max_queued`.
        priority : Priority
            Of all the calls.

        Returns
        -------
        iterator
            The results in order. Closing it, and an exception of a call, cancels those not
            started.

        Raises
        ------
        OptionError, Overloaded, SchedulerClosed, TypeError
            As for `submit`.
        """
        end = None if timeout is None else time.monotonic() + timeout
        if buffersize is None:
            buffersize = max(self._max_queued // 2, 1)
        else:
            buffersize = checked_count("buffersize", buffersize, 1, 2**31 - 1)
        batch = max(min(buffersize // 2, MAP_BATCH), 1)
        calls = zip(*iterables)
        futures = deque()

        def submit_next(count):
            futures.extend(submit_many(self._core, fn, islice(calls, count), priority))

        def results():
            try:
                while futures:
                    left = None if end is None else max(end - time.monotonic(), 0)
                    result = futures[0].result(left)
                    futures.popleft()
                    if len(futures) <= buffersize - batch:
                        submit_next(batch)
                    yield result
            finally:
                for future in futures:
                    future.cancel()

        try:
            # The first ones begin while the others are made, which may take its time.
            for count in chain((1,), repeat(batch, (buffersize - 1) // batch)):
                submitted = len(futures)
                submit_next(count)
                if len(futures) < submitted + count:
                    break
        except BaseException:
            for future in futures:
                future.cancel()
            raise
        return results()

    def resize(self, workers):
        """Set how many workers take tasks.

        Those beyond it finish what they have and sleep. Between different `min_workers` and
        `max_workers` the number goes on following the load.

        Raises
        ------
        OptionError
            `workers` is not between `min_workers` and `max_workers`.
        """
        workers = checked_count("workers", workers, self._min_workers, self._max_workers)
        self._core.resize(workers)

    def drain(self, timeout=None):
        """Wait until no task waits or runs. New ones stay welcome, and delay it.

        Parameters
        ----------
        timeout : float, optional
            Seconds to wait at most. Delayed tasks that are not due are not waited for.

        Raises
        ------
        RuntimeError
            The caller is a task of this scheduler, or the callback of a future that its timer or
            its shutdown ends: it would wait for itself.
        SchedulerClosed
            This is a forked child.
        TimeoutError
            Tasks were left at the end of that time.
        """
        cdef Core core = self._core
        if timeout is not None:
            timeout = checked_seconds("timeout", timeout, True)
        if core.state == SCHED_FORKED:
            core.check_open()
        if core.is_awaited():
            raise RuntimeError("a task or callback cannot wait for its own scheduler to drain")
        if not core.drain(timeout):
            raise TimeoutError(f"tasks were still waiting or running after {timeout} s")

    def shutdown(self, wait=True, *, cancel_futures=False, timeout=None):
        """Accept no more tasks, and end once those accepted are done.

        Delayed tasks that are not due are cancelled. May be called again, to wait or to cancel.

        Parameters
        ----------
        wait : bool
            Return only when the threads have ended.
        cancel_futures : bool
            Cancel the tasks that have not started.
        timeout : float, optional
            Seconds to wait at most.

        Raises
        ------
        RuntimeError
            The caller waits although it is a task of this scheduler, or the callback of a future
            that its timer or another shutdown ends. Nothing was changed.
        TimeoutError
            The threads had not ended by then. They still will.
        """
        core = self._core
        if timeout is not None:
            timeout = checked_seconds("timeout", timeout, True)
        if wait and core.is_awaited():
            raise RuntimeError("a task or callback cannot wait for its own scheduler to shut down")
        core.close(cancel_futures)
        if wait and not core.join(timeout):
            raise TimeoutError(f"tasks were still running after {timeout} s")

    def is_worker(self):
        """Tell whether one of this scheduler's tasks is calling.

        Returns
        -------
        bool
        """
        return self._core.is_worker()

    def statistics(self):
        """Count what has happened so far.

        Returns
        -------
        SchedulerStatistics
        """
        return self._core.statistics(self._affinity_note)

    def health(self):
        """Judge whether new tasks will start soon.

        Returns
        -------
        SchedulerHealth
        """
        core = self._core
        state = STATES[core.state]
        stalled = {}
        problems = []
        if state != "running":
            problems.append(f"The scheduler is {state}.")
        else:
            for index in range(self._max_workers):
                running_s = self._watch.running_s(index)
                if running_s > self._stall_after_s:
                    stalled[index] = running_s
                    problems.append(f"Worker {index} has been at one task for {running_s:.1f} s.")
        queue_use = core.queue_length() / self._max_queued
        if queue_use >= UNHEALTHY_QUEUE_USE:
            problems.append(f"The queue is {queue_use:.0%} full.")
        return SchedulerHealth(not problems, state, queue_use, stalled, tuple(problems))


cdef object checked_priority(priority):
    if type(priority) is Priority:
        return priority
    try:
        return Priority(priority)
    except ValueError:
        raise OptionError(f"priority must be a Priority, not {priority!r}") from None


cdef int check_callable(function) except -1:
    if not callable(function):
        raise TypeError(f"a task must be callable, which {function!r} is not")
    return 0


cdef int submit(
    Core core, function, tuple args, dict kwargs, priority, delay, deadline, FutureBase future,
) except -1:
    check_callable(function)
    priority = checked_priority(priority)
    if delay is not None:
        delay = checked_seconds("delay", delay, True)
    if deadline is not None:
        deadline = checked_seconds("deadline", deadline, False)
    core.submit(new_task(function, args, kwargs, priority, future), delay, deadline)
    return 0


cdef list submit_many(Core core, function, arguments, priority):
    cdef list tasks = []
    cdef list futures = []
    cdef FutureBase future
    check_callable(function)
    priority = checked_priority(priority)
    core.check_open()
    for args in arguments:
        if len(tasks) == core.sched.max_queued:  # `arguments` may have no end
            raise Overloaded(f"more tasks at once than may wait, which is {len(tasks)}")
        future = new_future()
        tasks.append(new_task(function, tuple(args), None, priority, future))
        futures.append(future)
    core.enqueue_many(tasks)
    return futures


cdef sched_t *sched_of(object scheduler) except NULL:
    if not isinstance(scheduler, Scheduler):
        raise TypeError(f"a Scheduler is needed, not {type(scheduler).__name__}")
    return (<Core>scheduler._core).sched
