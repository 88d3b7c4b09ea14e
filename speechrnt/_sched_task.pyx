"""A Python call as a gated task of the native scheduler."""

cimport cython
from cpython.contextvars cimport PyContext_CopyCurrent, PyContext_Enter, PyContext_Exit
from cpython.ref cimport Py_DECREF
from libcpp.atomic cimport memory_order_acq_rel, memory_order_relaxed

from speechrnt._future cimport FutureBase
from speechrnt._sched_core cimport TASK_CANCELLED

import logging
import time

from speechrnt._sched_timer import report_exception
from speechrnt.errors import DeadlineExceeded

__all__ = []

logger = logging.getLogger("speechrnt")


cdef int run_python(void *arg) noexcept with gil:
    cdef PythonTask task = <PythonTask>arg
    try:
        task.run()
    except BaseException:  # from a callback of the future, say, and SystemExit must not exit here
        report_exception()
    return 0


cdef void release_python(void *arg, int status) noexcept with gil:
    cdef PythonTask task = <PythonTask>arg
    try:
        if status == TASK_CANCELLED:
            task.cancel()
        task.forget()
    except BaseException:
        report_exception()
    Py_DECREF(task)  # the reference that whoever queued it took


@cython.final
@cython.freelist(64)
@cython.no_gc  # nobody but its queue and its timer refers to it, and `forget` ends that
cdef class PythonTask:
    """A call that waits for a worker, for its time, or for both."""

    cdef bint claim(self) noexcept:
        return not self.claimed.exchange(True, memory_order_acq_rel)

    cdef int run(self) except -1:
        cdef FutureBase future = self.future
        # The timer may be late, and has ended when a shutdown runs what is left.
        if self.deadline is not None and time.monotonic() >= self.expires:
            self.expire()
            return 0
        if not self.claim():
            return 0
        if future is None:
            self.call()
            return 0
        if not future.begin():
            return 0
        try:
            result = self.call()
        except BaseException as error:
            future.finish(None, error)
        else:
            future.finish(result, None)
        return 0

    cdef object call(self):
        PyContext_Enter(self.context)
        try:
            if self.kwargs is None:
                return self.function(*self.args)
            return self.function(*self.args, **self.kwargs)
        finally:
            PyContext_Exit(self.context)

    def cancel(self):
        """Cancel the future, unless the task has run, been cancelled or expired."""
        cdef FutureBase future = self.future  # whose callbacks may have the task forget it
        if self.claim() and future is not None and future.cancel():
            future.begin()

    def fail(self, error):
        """Give the future an exception in place of a result, unless it is claimed."""
        cdef FutureBase future = self.future  # whose callbacks may have the task forget it
        if not self.claim():
            return
        if future is None:
            logger.warning("a delayed task was not run: %s", error)
        elif future.begin():
            future.finish(None, error)

    def expire(self):
        """Give up, the deadline having passed before a worker came to it."""
        self.fail(DeadlineExceeded("the task had not started when its deadline passed"))

    cdef int forget(self) except -1:
        """Drop all references: the done task may still be in the timer."""
        if self.deadline is not None:
            self.timer.cancel(self.deadline)
        self.function = self.args = self.kwargs = self.context = None
        self.future = self.timer = self.deadline = None
        return 0


cdef PythonTask new_task(function, tuple args, dict kwargs, int priority, FutureBase future):
    cdef PythonTask task = PythonTask.__new__(PythonTask)
    task.claimed.store(False, memory_order_relaxed)
    task.task.fn = run_python
    task.task.arg = <void *>task
    task.task.done = release_python
    task.task.counter = NULL
    task.task.priority = priority
    task.task.queued = False
    task.task.gated = True
    task.function = function
    task.args = args
    task.kwargs = kwargs
    task.context = PyContext_CopyCurrent()
    task.future = future
    return task
