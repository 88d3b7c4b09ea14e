"""Which of the waiting model jobs is next, and which may join its batch: plain data, no threads.

- A level of higher priority goes first. But every `FAIR_PERIOD`-th pick lets the next level, in
  turn, go first, so that a level waits for ``FAIR_PERIOD`` times the number of levels at most.
- Inside a level, clients share the model's time evenly, in rounds of `ROUND_S` each: what a client
  asks for beyond that is for later rounds. A job begins where the client's job before it ends, in
  seconds of the client's model time, but not before the last job picked (start-time fair queueing:
  Goyal, Vin, Cheng 1996, https://doi.org/10.1145/248156.248171); that makes its round. So a client
  that has asked for little is never behind by more than a round of each of the others.
- Inside a round, the job that is due first goes first (EDF). A job is due at its deadline, or
  `DEFAULT_SLACK_S` after its arrival if it has none.
"""

from __future__ import annotations

import heapq
from collections.abc import Hashable, Iterator, Mapping
from typing import Generic, Protocol, TypeVar

from ._sched import Priority

__all__ = ["DEFAULT_SLACK_S", "FAIR_PERIOD", "ROUND_S", "JobQueue", "Queueable"]

FAIR_PERIOD = 8
DEFAULT_SLACK_S = 10.0
ROUND_S = 0.25

_LEVELS = len(Priority)
_LEAST_SWEEP = 64


class Queueable(Protocol):
    """What the queue asks of a job. None of it may change while the job waits.

    Attributes
    ----------
    key
        Jobs of equal keys may share a batch.
    priority
        Its level.
    deadline
        Seconds, of the clock that `JobQueue.add` is given; None if there is none.
    client
        On whose behalf; None is a client of its own.
    cost_s
        Expected seconds of model time.
    """

    key: Hashable
    priority: Priority
    deadline: float | None
    client: Hashable | None
    cost_s: float

    @property
    def n_windows(self) -> int:
        """How much room it takes in a batch."""


_Job = TypeVar("_Job", bound=Queueable)
_Entry = tuple[float, float, int, float, _Job]  # round, when it is due, number, beginning, job


class _Level(Generic[_Job]):
    """The jobs of one priority, and where in their model time the clients are."""

    def __init__(self) -> None:
        self.heaps: dict[Hashable, list[_Entry[_Job]]] = {}
        self.size = 0
        self.begun_s = 0.0
        self._ends_s: dict[Hashable, float] = {}
        self._sweep_at = _LEAST_SWEEP

    def begin(self, job: _Job) -> float:
        """Return where a new job begins."""
        if job.client is None:
            return self.begun_s
        begin_s = max(self._ends_s.get(job.client, 0.0), self.begun_s)
        self._ends_s[job.client] = begin_s + job.cost_s
        if len(self._ends_s) >= self._sweep_at:
            self._ends_s = {client: s for client, s in self._ends_s.items() if s > self.begun_s}
            self._sweep_at = max(2 * len(self._ends_s), _LEAST_SWEEP)
        return begin_s

    def remove(self, key: Hashable) -> None:
        """Note that the heap of a key has lost a job."""
        if not self.heaps[key]:
            del self.heaps[key]
        self.size -= 1
        if not self.size:  # nobody waits, and nobody is behind
            self._ends_s.clear()


class JobQueue(Generic[_Job]):
    """The waiting jobs. Not thread-safe.

    Adding and picking cost O(log jobs + kinds of jobs waiting), removing O(jobs of the same kind).
    """

    def __init__(self) -> None:
        self._levels: list[_Level[_Job]] = [_Level() for _ in range(_LEVELS)]
        self._added = 0
        self._picks = 0
        self.cost_s = 0.0
        """Expected model time of all that waits."""

    def __len__(self) -> int:
        return sum(level.size for level in self._levels)

    def __iter__(self) -> Iterator[_Job]:
        for level in self._levels:
            for heap in level.heaps.values():
                for entry in heap:
                    yield entry[-1]

    @property
    def sizes(self) -> Mapping[Priority, int]:
        """Waiting jobs of each priority."""
        return {priority: self._levels[priority].size for priority in Priority}

    def add(self, job: _Job, now: float) -> None:
        """Let a job wait."""
        due = now + DEFAULT_SLACK_S if job.deadline is None else job.deadline
        level = self._levels[job.priority]
        begin_s = level.begin(job)
        self._added += 1
        heap = level.heaps.setdefault(job.key, [])
        heapq.heappush(heap, (begin_s // ROUND_S, due, self._added, begin_s, job))
        level.size += 1
        self.cost_s += job.cost_s

    def pick(self) -> _Job | None:
        """Remove and return the next job; None if none waits."""
        first = 0
        if self._picks % FAIR_PERIOD == FAIR_PERIOD - 1:
            first = self._picks // FAIR_PERIOD % _LEVELS
        for priority in (first, *range(_LEVELS)):
            level = self._levels[priority]
            if level.size:
                self._picks += 1
                heaps = level.heaps
                key = min(heaps, key=lambda key: heaps[key][0])
                level.begun_s = max(level.begun_s, heaps[key][0][3])
                return self._take(level, key)
        return None

    def pick_like(self, leader: _Job, room: int) -> _Job | None:
        """Remove and return the next job that may join the batch of `leader`; None if none may.

        None may that has more than `room` windows, and none overtakes it. None may while a job of
        higher priority than the leader's waits for something else: the batch is not to delay it.
        CRITICAL jobs take nobody along, for the same reason.
        """
        key = leader.key
        for priority, level in enumerate(self._levels):
            if priority > leader.priority == Priority.CRITICAL:
                return None
            if key in level.heaps:
                fits = level.heaps[key][0][-1].n_windows <= room
                return self._take(level, key) if fits else None
            if level.size and priority < leader.priority:
                return None
        return None

    def discard(self, job: _Job) -> bool:
        """Remove a job; False if it does not wait."""
        level = self._levels[job.priority]
        heap = level.heaps.get(job.key, [])
        for index, entry in enumerate(heap):
            if entry[-1] is job:
                heap[index] = heap[-1]
                heap.pop()
                heapq.heapify(heap)
                self._removed(level, job)
                return True
        return False

    def _take(self, level: _Level[_Job], key: Hashable) -> _Job:
        job = heapq.heappop(level.heaps[key])[-1]
        self._removed(level, job)
        return job

    def _removed(self, level: _Level[_Job], job: _Job) -> None:
        level.remove(job.key)
        # Never below zero by rounding, and exact when it matters least.
        self.cost_s = max(self.cost_s - job.cost_s, 0.0) if len(self) else 0.0
