"""Regular maintenance of pools, as LOW tasks of a scheduler."""

from __future__ import annotations

import math
import time
import weakref
from collections.abc import Iterable
from types import TracebackType
from typing import Any, Protocol

from typing_extensions import Self

from ._sched import Priority, Scheduler
from ._sched_timer import report_exception
from .errors import OptionError, Overloaded, SchedulerClosed

__all__ = ["Maintainable", "Maintenance", "maintain_on"]


class Maintainable(Protocol):
    """What can be maintained: the pools of this package, and the module `inference_memory`.

    It can be referred to weakly. With an attribute `closed`, maintenance leaves it when that is
    true.
    """

    def maintain(self) -> object:
        """Give back what is idle and not needed any more."""


def maintain_on(
    scheduler: Scheduler, pools: Iterable[Maintainable], interval_s: float = 1.0
) -> Maintenance:
    """Have a scheduler call ``maintain`` of each pool, again and again.

    Each round is one LOW task, and the next one is due `interval_s` after it has ended. Rounds go
    on for as long as the scheduler runs and one of the pools is alive and not closed; they keep
    none of them alive. What a pool raises goes to `threading.excepthook`, and neither the others
    nor the next rounds are affected.

    Parameters
    ----------
    scheduler
        Where the rounds run.
    pools
        `AudioBufferPool`, `ObjectPool`, `TranscriptionResultPool`, or the module
        `speechrnt.inference_memory`.
    interval_s
        Seconds between rounds. About the `epoch_s` of the pools' limits.

    Returns
    -------
    Maintenance
        To end it before. It need not be kept.

    Raises
    ------
    OptionError
        If the interval is not positive and finite, or there is no pool.
    SchedulerClosed
        If the scheduler is shut down, or belongs to a parent process.
    TypeError
        If the scheduler or a pool is something else.

    Notes
    -----
    In a forked child nothing runs; call this again there, with a scheduler of the child.

    Examples
    --------
    >>> with Scheduler(workers=1) as scheduler:
    ...     pool = AudioBufferPool()
    ...     maintenance = maintain_on(scheduler, [pool, inference_memory])
    """
    if not isinstance(scheduler, Scheduler):
        raise TypeError(f"a Scheduler is needed, not {type(scheduler).__name__}")
    if isinstance(interval_s, bool) or not isinstance(interval_s, (int, float)):
        raise OptionError(f"interval_s must be a number of seconds, not {interval_s!r}")
    if not math.isfinite(interval_s) or interval_s <= 0:
        raise OptionError(f"interval_s must be positive and finite, not {interval_s!r}")
    references = [_refer(pool) for pool in pools]
    if not references:
        raise OptionError("pools must name at least one pool")
    if scheduler.health().state != "running":
        raise SchedulerClosed("the scheduler does not run here, and cannot maintain pools")
    return Maintenance(scheduler, references, interval_s)


def _refer(pool: Maintainable) -> weakref.ref[Any]:
    if not callable(getattr(pool, "maintain", None)):
        raise TypeError(f"a pool must have a method maintain, which {pool!r} has not")
    return weakref.ref(pool)


class Maintenance:
    """Regular maintenance of pools, made by `maintain_on`. Any thread may use it.

    Attributes
    ----------
    rounds : int
        Rounds so far.
    skipped : int
        Rounds left out because the scheduler's queue was full.
    """

    def __init__(
        self, scheduler: Scheduler, pools: list[weakref.ref[Any]], interval_s: float
    ) -> None:
        self.rounds = 0
        self.skipped = 0
        self._scheduler: weakref.ref[Any] = weakref.ref(scheduler)  # Any: for its timer
        self._pools = pools
        self._interval_s = interval_s
        self._closed = False
        self._wait()

    @property
    def closed(self) -> bool:
        """Whether no further round begins: closed, or the scheduler or all pools are gone."""
        scheduler = self._scheduler()
        return (
            self._closed
            or scheduler is None
            or scheduler.health().state != "running"
            or not any(_is_living(pool) for pool in self._pools)
        )

    def close(self) -> None:
        """End it. A round that runs goes on to its end. Closing twice is harmless."""
        # No lock, and nothing of the timer: a child of a fork must be able to come through here.
        self._closed = True

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc_value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _wait(self) -> None:
        # With the timer itself: a delayed task can be refused, and nothing would come after it. A
        # timer that is closed belongs to a scheduler that is.
        scheduler = self._scheduler()
        if scheduler is not None:
            scheduler._core.timer.call_at(time.monotonic() + self._interval_s, self._queue_round)

    def _queue_round(self) -> None:
        scheduler = self._scheduler()
        if self._closed or scheduler is None:
            return
        try:
            scheduler.submit_nowait(self._run_round, priority=Priority.LOW)
        except Overloaded:
            self.skipped += 1
            self._wait()
        except SchedulerClosed:
            pass

    def _run_round(self) -> None:
        if self._closed:
            return
        for reference in self._pools:
            pool = reference()
            try:
                if pool is not None and _is_living(reference):
                    pool.maintain()
            except BaseException:  # of a callable of the pool's user, which may raise anything
                report_exception()
            del pool  # or it would live until the next one, or the next round
        self._pools = [pool for pool in self._pools if _is_living(pool)]
        self.rounds += 1
        if self._pools:
            self._wait()


def _is_living(reference: weakref.ref[Any]) -> bool:
    """Whether the pool is neither gone nor closed."""
    pool = reference()
    return pool is not None and not getattr(pool, "closed", False)
