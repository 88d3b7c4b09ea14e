"""Which of the waiting model jobs is next, and which may join its batch: plain data, no threads.

- A level of higher priority goes first. But every `FAIR_PERIOD`-th pick lets the next level, in
  turn, go first, so that a level waits for ``FAIR_PERIOD`` times the number of levels at most.
- Inside a level, the job that is due first goes first (EDF).
- A job is due at its deadline, or `DEFAULT_SLACK_S` after its arrival if it has none; but a client
  that asks for more than its share of the model's time moves away from that. Each client has a
  clock that every job of its own advances by the job's cost times the number of clients waiting;
  it stands at the present at least, and no job is due before its client's clock (VirtualClock:
  Zhang 1990, https://doi.org/10.1145/99508.99525). Clocks are finite, so that nobody starves.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Hashable, Iterator, Mapping
from typing import Generic, Protocol, TypeVar

from ._sched import Priority

__all__ = ["DEFAULT_SLACK_S", "FAIR_PERIOD", "JobQueue", "Queueable"]

FAIR_PERIOD = 8
DEFAULT_SLACK_S = 10.0

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


_Job = TypeVar("_Job", bound=Queueable)
_Entry = tuple[float, int, _Job]  # when it is due, number, job


class JobQueue(Generic[_Job]):
    """The waiting jobs. Not thread-safe.

    Adding and picking cost O(log jobs + kinds of jobs waiting), removing O(jobs of the same kind).
    """

    def __init__(self) -> None:
        self._levels: list[dict[Hashable, list[_Entry[_Job]]]] = [{} for _ in range(_LEVELS)]
        self._sizes = [0] * _LEVELS
        self._waiting: Counter[Hashable] = Counter()  # jobs of each client
        self._clocks: dict[Hashable, float] = {}
        self._sweep_at = _LEAST_SWEEP
        self._added = 0
        self._picks = 0
        self.cost_s = 0.0
        """Expected model time of all that waits."""

    def __len__(self) -> int:
        return sum(self._sizes)

    def __iter__(self) -> Iterator[_Job]:
        for level in self._levels:
            for heap in level.values():
                for _, _, job in heap:
                    yield job

    @property
    def sizes(self) -> Mapping[Priority, int]:
        """Waiting jobs of each priority."""
        return dict(zip(Priority, self._sizes, strict=True))

    def add(self, job: _Job, now: float) -> None:
        """Let a job wait."""
        due = now + DEFAULT_SLACK_S if job.deadline is None else job.deadline
        if job.client is not None:
            self._waiting[job.client] += 1
            clock = max(now, self._clocks.get(job.client, now))
            due += clock - now if job.deadline is None else 0.0
            due = max(due, clock)
            self._clocks[job.client] = clock + job.cost_s * len(self._waiting)
            self._forget_clients(now)
        self._added += 1
        heap = self._levels[job.priority].setdefault(job.key, [])
        heapq.heappush(heap, (due, self._added, job))
        self._sizes[job.priority] += 1
        self.cost_s += job.cost_s

    def pick(self) -> _Job | None:
        """Remove and return the next job; None if none waits."""
        first = 0
        if self._picks % FAIR_PERIOD == FAIR_PERIOD - 1:
            first = self._picks // FAIR_PERIOD % _LEVELS
        for priority in (first, *range(_LEVELS)):
            if self._sizes[priority]:
                self._picks += 1
                level = self._levels[priority]
                return self._take(priority, min(level, key=lambda key: level[key][0]))
        return None

    def pick_like(self, leader: _Job) -> _Job | None:
        """Remove and return the next job that may join the batch of `leader`; None if none may.

        None may while a job of higher priority than the leader's waits for something else: the
        batch is not to delay it. CRITICAL jobs take nobody along, for the same reason.
        """
        key = leader.key
        for priority in range(_LEVELS):
            if priority > leader.priority == Priority.CRITICAL:
                return None
            if key in self._levels[priority]:
                return self._take(priority, key)
            if self._sizes[priority] and priority < leader.priority:
                return None
        return None

    def discard(self, job: _Job) -> bool:
        """Remove a job; False if it does not wait."""
        heap = self._levels[job.priority].get(job.key, [])
        for index, entry in enumerate(heap):
            if entry[2] is job:
                heap[index] = heap[-1]
                heap.pop()
                heapq.heapify(heap)
                self._removed(job)
                return True
        return False

    def _take(self, priority: int, key: Hashable) -> _Job:
        job = heapq.heappop(self._levels[priority][key])[2]
        self._removed(job)
        return job

    def _removed(self, job: _Job) -> None:
        level = self._levels[job.priority]
        if not level[job.key]:
            del level[job.key]
        self._sizes[job.priority] -= 1
        # Never below zero by rounding, and exact when it matters least.
        self.cost_s = max(self.cost_s - job.cost_s, 0.0) if len(self) else 0.0
        if job.client is not None:
            self._waiting[job.client] -= 1
            if not self._waiting[job.client]:
                del self._waiting[job.client]

    def _forget_clients(self, now: float) -> None:
        """Drop, now and then, the clocks that are not ahead of the present."""
        if len(self._clocks) >= self._sweep_at:
            self._clocks = {client: at for client, at in self._clocks.items() if at > now}
            self._sweep_at = max(2 * len(self._clocks), _LEAST_SWEEP)
