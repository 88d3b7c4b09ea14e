"""A `concurrent.futures.Future` that is cheap to make, to resolve and to wait for.

Most of what a task with a standard future costs is that future: a condition, its lock and its
queue, the lists, and methods that take the lock. Here all of that is made when it is first asked
for, which `concurrent.futures.wait` and `as_completed` do, and hardly anybody else.

What changes a future is one step that no other thread sees halfway: on free-threaded Python a
critical section, elsewhere code that cannot lose the GIL, because it neither calls Python nor
allocates what the garbage collector tracks. Once there is a condition, its lock is held as well, so
that those who hold it may rely on what they see.
"""

cimport cython
from cpython.object cimport PyObject, PyTypeObject

from _thread import allocate_lock
from concurrent.futures import CancelledError, Future, InvalidStateError
from concurrent.futures import TimeoutError as FuturesTimeoutError
from concurrent.futures import _base
from threading import Condition

__all__ = ["FutureBase", "TaskFuture"]

cdef enum:
    PENDING
    RUNNING
    CANCELLED  # from here on done
    CANCELLED_AND_NOTIFIED
    FINISHED

NAMES = (
    _base.PENDING, _base.RUNNING, _base.CANCELLED, _base.CANCELLED_AND_NOTIFIED, _base.FINISHED,
)


@cython.auto_pickle(False)
cdef class FutureBase:
    """The methods of `concurrent.futures.Future`, which says what they do."""

    cdef bint change_alone(self, int allowed, int state, object value, object error) noexcept:
        if not (1 << self.state) & allowed:
            return False
        if state == FINISHED:
            self.value = value
            self.error = error
        self.state = state
        return True

    cdef bint change(self, int allowed, int state, object value, object error) except -1:
        """Change the state, if it is one of `allowed`, a bit each, and tell those who wait."""
        cdef bint changed = False
        cdef list blocked
        with cython.critical_section(self):
            condition = self.condition
            if condition is None:
                changed = self.change_alone(allowed, state, value, error)
        if condition is not None:
            with condition:
                with cython.critical_section(self):
                    changed = self.change_alone(allowed, state, value, error)
                if changed and state >= CANCELLED:
                    condition.notify_all()
                    for waiter in self.waiters:
                        if state == CANCELLED_AND_NOTIFIED:
                            waiter.add_cancelled(self)
                        elif state == FINISHED and error is None:
                            waiter.add_result(self)
                        elif state == FINISHED:
                            waiter.add_exception(self)
        if changed and state >= CANCELLED:
            with cython.critical_section(self):  # nobody adds a lock any more
                blocked = self.blocked
                self.blocked = None
            if blocked is not None:
                for lock in blocked:
                    lock.release()
        return changed

    cdef int call_back(self) except -1:
        """Make the calls that wait for the end."""
        cdef list callbacks
        with cython.critical_section(self):
            callbacks = self.callbacks
            self.callbacks = None
        if callbacks is not None:
            for callback in callbacks:
                self.call(callback)
        return 0

    cdef int call(self, callback) except -1:
        try:
            callback(self)
        except Exception:
            _base.LOGGER.exception("exception calling callback for %r", self)
        return 0

    cdef bint is_done(self) noexcept:
        cdef bint done
        with cython.critical_section(self):
            done = self.state >= CANCELLED
        return done

    cdef int wait(self, timeout) except -1:
        """Wait for the end, or raise TimeoutError."""
        cdef list blocked
        cdef bint done
        cdef Py_ssize_t i
        if self.is_done():
            return 0
        lock = allocate_lock()
        lock.acquire()
        blocked = [lock]  # made here, as it may run the garbage collector
        with cython.critical_section(self):
            done = self.state >= CANCELLED
            if not done:
                if self.blocked is None:
                    self.blocked = blocked
                else:
                    self.blocked.append(lock)
        if done:
            return 0
        done = False
        try:
            if timeout is None:
                done = lock.acquire()
            elif timeout > 0:
                done = lock.acquire(True, timeout)
            else:
                done = lock.acquire(False)
        finally:
            if not done:
                with cython.critical_section(self):
                    if self.blocked is not None:
                        for i in range(len(self.blocked)):
                            if self.blocked[i] is lock:
                                del self.blocked[i]
                                break
        if not done and not self.is_done():
            raise FuturesTimeoutError()
        return 0

    cdef bint begin(self) except -1:
        if self.change(1 << PENDING, RUNNING, None, None):
            return True
        if self.change(1 << CANCELLED, CANCELLED_AND_NOTIFIED, None, None):
            return False
        _base.LOGGER.critical("Future %s in unexpected state: %s", id(self), self._state)
        raise RuntimeError("Future in unexpected state")

    cdef int finish(self, object value, object error) except -1:
        if not self.change(1 << PENDING | 1 << RUNNING, FINISHED, value, error):
            raise InvalidStateError(f"{self._state}: {self!r}")
        self.call_back()
        return 0

    def cancel(self):
        """Cancel the future, if it does not run and is not done."""
        if self.change(1 << PENDING, CANCELLED, None, None):
            self.call_back()
            return True
        return self.cancelled()

    def cancelled(self):
        """Tell whether the future was cancelled."""
        with cython.critical_section(self):
            cancelled = self.state == CANCELLED or self.state == CANCELLED_AND_NOTIFIED
        return cancelled

    def running(self):
        """Tell whether a worker is executing the task."""
        with cython.critical_section(self):
            running = self.state == RUNNING
        return running

    def done(self):
        """Tell whether the future has finished or was cancelled."""
        return self.is_done()

    def result(self, timeout=None):
        """Wait for the result and return it, or raise what the task raised."""
        self.wait(timeout)
        if self.cancelled():
            raise CancelledError()
        if self.error is not None:
            raise self.error
        return self.value

    def exception(self, timeout=None):
        """Wait for the end; return what the task raised, or None."""
        self.wait(timeout)
        if self.cancelled():
            raise CancelledError()
        return self.error

    def add_done_callback(self, fn):
        """Have ``fn(future)`` called at the end, or now if that was before."""
        cdef bint done
        cdef list callbacks = [fn]
        with cython.critical_section(self):
            done = self.state >= CANCELLED
            if not done:
                if self.callbacks is None:
                    self.callbacks = callbacks
                else:
                    self.callbacks.append(fn)
        if done:
            self.call(fn)

    def set_running_or_notify_cancel(self):
        """Begin to run and return True, or return False: the future was cancelled."""
        return self.begin()

    def set_result(self, result):
        """Finish with a result."""
        self.finish(result, None)

    def set_exception(self, exception):
        """Finish with an exception."""
        self.finish(None, exception)

    # What `concurrent.futures.wait` and its like use, holding the condition.

    @property
    def _condition(self):
        cdef list waiters
        if self.condition is None:
            condition = Condition()
            waiters = []
            with cython.critical_section(self):
                if self.condition is None:
                    self.waiters = waiters
                    self.condition = condition
        return self.condition

    @property
    def _waiters(self):
        _ = self._condition
        return self.waiters

    @property
    def _state(self):
        return NAMES[self.state]

    @property
    def _result(self):
        return self.value

    @property
    def _exception(self):
        return self.error


class TaskFuture(FutureBase, Future):
    """The future of a task of a `speechrnt.Scheduler`; to be used like any other.

    It is a `concurrent.futures.Future`, and differs in nothing but what it costs.
    """

    __slots__ = ()

    def __init__(self):
        """Make a pending future."""


cdef PyTypeObject *future_type = <PyTypeObject *>TaskFuture
cdef tuple no_arguments = ()


cdef FutureBase new_future():
    return <FutureBase>future_type.tp_new(TaskFuture, <PyObject *>no_arguments, NULL)
