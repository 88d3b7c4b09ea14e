"""A Python call as a task, for the scheduler that queues it; internal."""

from libcpp.atomic cimport atomic

from speechrnt._future cimport FutureBase
from speechrnt._sched_core cimport task_t


cdef class PythonTask:
    cdef task_t task
    cdef atomic[bint] claimed  # by whoever runs, cancels or expires it
    cdef object function, args, kwargs, context
    cdef FutureBase future     # None: nobody asked for the result
    cdef object timer
    cdef object deadline       # the timer's entry, or None
    cdef double expires        # when, if there is one

    # True once: for whoever may run the task or end its future.
    cdef bint claim(self) noexcept
    cdef int run(self) except -1
    cdef object call(self)

    # Drop all references: the done task may still be in the timer.
    cdef int forget(self) except -1


# A task to be queued with a reference to it, which its end drops. None for no future.
cdef PythonTask new_task(
    object function, tuple args, dict kwargs, int priority, FutureBase future,
)
