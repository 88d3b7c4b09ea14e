"""Log-mel features as a native task; internal."""

from cpython.ref cimport PyObject
from libc.stdint cimport int64_t

from speechrnt._mel cimport MelRows
from speechrnt._sched_core cimport task_t

cdef struct Work:
    task_t task
    const float *pcm
    Py_ssize_t n_samples
    Py_ssize_t first
    Py_ssize_t n_frames  # with those before the first
    int n_mels
    MelRows rows
    float maximum
    int64_t elapsed_ns
    PyObject *owner  # the MelTask; while the task is queued, the scheduler has a reference


cdef class MelTask:
    cdef Work work
    cdef object done
    cdef const float[::1] pcm
    cdef float[:, ::1] out
    cdef int prepare(self, const float[::1] pcm, float[:, ::1] out, Py_ssize_t first) except -1
    cdef int forget(self) except -1
