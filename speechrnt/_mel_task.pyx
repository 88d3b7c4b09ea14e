"""Log-mel features as native tasks of a scheduler: no GIL, and any idle worker can take them."""

cimport cython
from cpython.ref cimport Py_DECREF, Py_INCREF
from libc.math cimport INFINITY
from libc.stdint cimport int64_t

from speechrnt._mel cimport MEL_FLOAT32, MEL_LOG10, mel_frame_count, mel_frames
from speechrnt._sched cimport sched_of
from speechrnt._sched_core cimport (
    SCHED_OK, SCHED_OVERLOADED, SchedResult, now_ns, sched_spawn, sched_t,
)

from speechrnt._sched_timer import report_exception
from speechrnt.errors import Overloaded, SchedulerClosed

__all__ = ["compute", "spawn"]


cdef int run(void *arg) noexcept nogil:
    cdef Work *work = <Work *> arg
    cdef int64_t started = now_ns()
    mel_frames(
        work.pcm, work.n_samples, work.first, work.n_frames - work.first, work.n_mels, MEL_LOG10,
        &work.rows, &work.maximum,
    )
    work.elapsed_ns = now_ns() - started
    return 0


cdef void finish(void *arg, int status) noexcept with gil:
    cdef MelTask task = <MelTask> (<Work *> arg).owner
    done = task.done
    try:
        task.forget()
        if status:
            done(None, 0.0)
        else:
            done(task.work.maximum, task.work.elapsed_ns * 1e-9)
    except BaseException:
        report_exception()
    Py_DECREF(task)


@cython.final
cdef class MelTask:
    """Arguments of a call, kept until it is done."""

    cdef int prepare(self, const float[::1] pcm, float[:, ::1] out, Py_ssize_t first) except -1:
        cdef Work *work = &self.work
        if out.shape[0] != 80 and out.shape[0] != 128:
            raise ValueError(f"out must have 80 or 128 rows, not {out.shape[0]}")
        if not 0 < out.shape[1] <= mel_frame_count(pcm.shape[0]):
            raise ValueError(
                f"{pcm.shape[0]} samples have {mel_frame_count(pcm.shape[0])} frames, of which "
                f"out asks for {out.shape[1]}"
            )
        if not 0 <= first < out.shape[1]:
            raise ValueError(f"first must be one of the {out.shape[1]} frames, not {first}")
        self.pcm = pcm
        self.out = out
        work.pcm = &pcm[0]
        work.n_samples = pcm.shape[0]
        work.first = first
        work.n_frames = out.shape[1]
        work.n_mels = <int> out.shape[0]
        work.rows.data = &out[0, first]
        work.rows.stride = out.strides[0]
        work.rows.layout = MEL_FLOAT32
        work.maximum = -INFINITY
        return 0

    cdef int forget(self) except -1:
        self.done = None
        self.pcm = None
        self.out = None
        return 0


def compute(const float[::1] pcm not None, float[:, ::1] out not None, Py_ssize_t first=0):
    """Compute the first frames of a signal; see `_mel.log10_mel`.

    Parameters
    ----------
    pcm : (n,) buffer of float32
        16 kHz mono.
    out : (n_mels, frames) buffer of float32
        Where to put ``log10`` of the mel power; `frames` at most as many as the signal has.
    first : int
        The first frame to compute; what stands in `out` before it is left alone.

    Returns
    -------
    float
        The largest value of those computed.

    Raises
    ------
    ValueError
        The shape of `out` is none that this can be, or `first` is not in it.
    """
    cdef MelTask task = MelTask.__new__(MelTask)
    task.prepare(pcm, out, first)
    with nogil:
        run(&task.work)
    return task.work.maximum


def spawn(scheduler, int priority, const float[::1] pcm not None, float[:, ::1] out not None, done):
    """Have a scheduler do the same.

    Parameters
    ----------
    scheduler : Scheduler
        In one of its tasks, the work is left to whichever worker is free first.
    priority : Priority
        Of the task.
    pcm, out
        Not to be touched until it is done.
    done : callable
        Called by the worker with the largest value and the seconds that it took; with None and 0.0
        if the scheduler is shut down before.

    Raises
    ------
    ValueError
        The shape of `out` is none that this can be.
    Overloaded, SchedulerClosed
        The scheduler takes no tasks. `done` will not be called.
    """
    cdef sched_t *sched = sched_of(scheduler)
    cdef MelTask task = MelTask.__new__(MelTask)
    cdef SchedResult result
    task.prepare(pcm, out, 0)
    task.done = done
    task.work.owner = <PyObject *> task
    task.work.task.fn = run
    task.work.task.arg = &task.work
    task.work.task.done = finish
    task.work.task.counter = NULL
    task.work.task.priority = priority
    task.work.task.gated = False
    Py_INCREF(task)  # released by `finish`
    result = sched_spawn(sched, &task.work.task)
    if result == SCHED_OK:
        return
    Py_DECREF(task)
    if result == SCHED_OVERLOADED:
        raise Overloaded("the scheduler's queue is full")
    raise SchedulerClosed("the scheduler is shut down and accepts no tasks")
