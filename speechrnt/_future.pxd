"""The future of a Python task, for those that resolve it."""


cdef class FutureBase:
    cdef int state
    cdef object value           # result, once finished
    cdef object error           # or exception
    cdef list callbacks         # None: none
    cdef list blocked           # a locked lock of each thread in `result` or `exception`, or None
    cdef object condition       # None: nobody has asked for it
    cdef list waiters           # made with the condition

    cdef bint change_alone(self, int allowed, int state, object value, object error) noexcept
    cdef bint change(self, int allowed, int state, object value, object error) except -1
    cdef int call_back(self) except -1
    cdef int call(self, object callback) except -1
    cdef bint is_done(self) noexcept
    cdef int wait(self, object timeout) except -1

    # Begin to run, or return False: it was cancelled.
    cdef bint begin(self) except -1

    # Finish with a result, or with an exception if that is not None.
    cdef int finish(self, object value, object error) except -1


# A pending `TaskFuture`.
cdef FutureBase new_future()
