"""What the scheduler takes and reports, as plain values."""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum

__all__ = ["Priority", "SchedulerHealth", "SchedulerStatistics", "Times", "WorkerStatistics"]


class Priority(IntEnum):
    """How soon a task should start. Waiting tasks of a lower priority are never shut out."""

    CRITICAL = 0
    HIGH = 1
    NORMAL = 2
    LOW = 3


@dataclass(frozen=True)
class Times:
    """Percentiles of a sampled time, each at most a quarter too high.

    Attributes
    ----------
    count : int
        Samples: every Python task, and one in 64 of the native tasks of each source.
    p50_s, p90_s, p99_s : float
        Seconds; 0 if there are no samples.
    """

    count: int
    p50_s: float
    p90_s: float
    p99_s: float


@dataclass(frozen=True)
class WorkerStatistics:
    """One worker since it started.

    Attributes
    ----------
    executed, stolen, parks : int
        Tasks it ran, tasks among them that it took from another worker's ring, times it slept.
    utilisation : float
        Share of the time that it did not sleep, 0 to 1.
    core : int or None
        The CPU that it is bound to.
    """

    executed: int
    stolen: int
    parks: int
    utilisation: float
    core: int | None


@dataclass(frozen=True)
class SchedulerStatistics:
    """Counts since the scheduler was made. Of a scheduler in use they are only nearly consistent.

    Attributes
    ----------
    submitted, spawned : int
        Tasks accepted in the shared queues, and on the ring of the worker that ran their parent.
    executed : Mapping of Priority to int
        Tasks that ran, also to an error, or had been cancelled when their turn came.
    stolen, spilled, rejected, dropped : int
        Tasks taken from another worker's ring; spawned when the ring was full, and so submitted;
        refused because the queue was full; cancelled by a shutdown.
    queued : Mapping of Priority to int
        Tasks that wait now.
    delayed : int
        Tasks that are not due yet.
    wait, run : Mapping of Priority to Times, and Times
        From submission to start, and from start to end.
    parks, wakeups, lock_operations : int
        Times a worker slept, and was woken for a task; times the mutex of the queues was taken.
    size : int
        Workers that take tasks now, those reserved included.
    workers : tuple of WorkerStatistics
        All workers, those beyond `size` too.
    affinity_note : str
        Why no worker is bound to a core although that was asked for; empty otherwise.
    """

    submitted: int
    spawned: int
    executed: Mapping[Priority, int]
    stolen: int
    spilled: int
    rejected: int
    dropped: int
    queued: Mapping[Priority, int]
    delayed: int
    wait: Mapping[Priority, Times]
    run: Times
    parks: int
    wakeups: int
    lock_operations: int
    size: int
    workers: tuple[WorkerStatistics, ...]
    affinity_note: str


@dataclass(frozen=True)
class SchedulerHealth:
    """Whether the scheduler can be expected to start a new task soon.

    Attributes
    ----------
    ok : bool
        It is running, less than 80 % of `max_queued` tasks wait, and no worker is stalled.
    state : str
        ``"running"``, ``"draining"``, ``"stopped"`` or ``"forked"``.
    queue_use : float
        Waiting tasks per `max_queued`.
    stalled : Mapping of int to float
        For each worker whose task has run longer than `stall_after`, the seconds so far, at least.
    problems : tuple of str
        What is not ok, a sentence each.
    """

    ok: bool
    state: str
    queue_use: float
    stalled: Mapping[int, float]
    problems: tuple[str, ...]
