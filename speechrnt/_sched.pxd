"""The native scheduler inside a Python `Scheduler`, for cimport."""

from speechrnt._sched_core cimport sched_t

# Borrowed: it lives as long as the object does. TypeError if that is no Scheduler.
cdef sched_t *sched_of(object scheduler) except NULL
