"""The timer thread of a scheduler: calls at given times, and a regular look at the workers."""

import heapq
import itertools
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

__all__ = ["Timer", "Watch", "next_size", "report_exception"]

SHRINK_AFTER = 40  # ticks without work for all
GROW_AFTER = 2  # ticks with work for more


def report_exception() -> None:
    """Hand the exception being handled to `threading.excepthook`: the thread goes on."""
    details = (*sys.exc_info(), threading.current_thread())
    threading.excepthook(threading.ExceptHookArgs(details))


class Timer:
    """One thread that makes calls when they are due.

    Calls must be short; what they raise is reported. All methods may be called from any thread.

    Parameters
    ----------
    name : str
        Name of the thread.
    tick : callable
        Called every `period_s` seconds.
    period_s : float
        Seconds between ticks.

    Attributes
    ----------
    thread : threading.Thread
        To be started, and joined after `close`.
    """

    def __init__(self, name: str, tick: Callable[[], object], period_s: float) -> None:
        self._condition = threading.Condition()
        # Entries are [when, number, call]; a cancelled one has no call. Numbers keep equal times
        # in order and calls from being compared.
        self._heap: list[list[Any]] = []
        self._numbers = itertools.count()
        self._cancelled = 0
        self._closed = False
        self._tick = tick
        self._period_s = period_s
        self.thread = threading.Thread(target=self._run, name=name, daemon=True)

    def call_at(self, when: float, call: Callable[[], object]) -> list[Any] | None:
        """Make a call at a `time.monotonic` time.

        Returns
        -------
        list or None
            What `cancel` takes; None if the timer is closed.
        """
        with self._condition:
            if self._closed:
                return None
            entry = [when, next(self._numbers), call]
            heapq.heappush(self._heap, entry)
            if self._heap[0] is entry:
                self._condition.notify()
            return entry

    def cancel(self, entry: list[Any]) -> bool:
        """Forget a call; False if it has been made, cancelled, or left by `close`."""
        with self._condition:
            if entry[2] is None:
                return False
            entry[2] = None
            self._cancelled += 1
            # At most half of the entries are dead weight, at a constant cost per call.
            if self._cancelled > 32 and self._cancelled * 2 > len(self._heap):
                self._heap = [entry for entry in self._heap if entry[2] is not None]
                heapq.heapify(self._heap)
                self._cancelled = 0
            return True

    def close(self) -> list[Callable[[], object]]:
        """Make no more calls, and return those that are left."""
        with self._condition:
            self._closed = True
            left = [entry[2] for entry in self._heap if entry[2] is not None]
            for entry in self._heap:
                entry[2] = None
            self._heap.clear()
            self._cancelled = 0
            self._condition.notify()
        return left

    def _run(self) -> None:
        next_tick = time.monotonic() + self._period_s
        while True:
            due = []
            with self._condition:
                if self._closed:
                    return
                now = time.monotonic()
                while self._heap and self._heap[0][0] <= now:
                    entry = heapq.heappop(self._heap)
                    if entry[2] is None:
                        self._cancelled -= 1
                    else:
                        due.append(entry[2])
                        entry[2] = None
                if not due and now < next_tick:
                    wake = min(next_tick, self._heap[0][0]) if self._heap else next_tick
                    self._condition.wait(wake - now)
                    continue
            if now >= next_tick:
                due.append(self._tick)
                next_tick = now + self._period_s
            for call in due:
                try:
                    call()
                except BaseException:  # a callback of a future may raise anything
                    report_exception()
            del due


def next_size(size: int, minimum: int, maximum: int, busy_ticks: int, idle_ticks: int) -> int:
    """Decide how many workers there should be.

    Parameters
    ----------
    size, minimum, maximum : int
        Workers now, at least and at most.
    busy_ticks : int
        Ticks in a row at which tasks waited and no worker slept, those reserved apart.
    idle_ticks : int
        Ticks in a row at which no task waited and some worker slept, those reserved apart.
    """
    if busy_ticks >= GROW_AFTER:
        return min(size + 1, maximum)
    if idle_ticks >= SHRINK_AFTER:
        return max(size - 1, minimum)
    return size


class Watch:
    """Finds stalled workers and adapts the number of workers; a scheduler's timer ticks it.

    Parameters
    ----------
    core : object
        Tells ``size``, ``queued()``, ``executed(i)`` and ``is_parked(i)``, and takes
        ``resize(n)``.
    workers : int
        Workers to watch, from 0.
    reserved : int
        How many of the workers at the end, and of the size, serve only urgent tasks.
    minimum, maximum : int
        Bounds of the size.
    """

    def __init__(self, core: Any, workers: int, reserved: int, minimum: int, maximum: int) -> None:
        self._core = core
        self._reserved = reserved
        self._minimum = minimum
        self._maximum = maximum
        self._executed = [-1] * workers
        self._since = [0.0] * workers
        self._busy_ticks = 0
        self._idle_ticks = 0

    def tick(self) -> None:
        """Look at the workers once."""
        now = time.monotonic()
        for index in range(len(self._executed)):
            executed = self._core.executed(index)
            is_parked = self._core.is_parked(index)
            if is_parked or executed != self._executed[index]:
                self._since[index] = now
                self._executed[index] = executed
        if self._minimum < self._maximum:
            # Those beyond the size sleep as well, and those reserved may be all that do.
            asleep = any(map(self._core.is_parked, range(self._core.size - self._reserved)))
            waiting = self._core.queued() > 0
            self._busy_ticks = self._busy_ticks + 1 if waiting and not asleep else 0
            self._idle_ticks = self._idle_ticks + 1 if asleep and not waiting else 0
            size = self._core.size
            wanted = next_size(
                size, self._minimum, self._maximum, self._busy_ticks, self._idle_ticks
            )
            if wanted != size:
                self._busy_ticks = self._idle_ticks = 0
                self._core.resize(wanted)

    def running_s(self, index: int) -> float:
        """Seconds for which a worker is known to have been running one task, or 0."""
        if self._executed[index] < 0 or self._core.is_parked(index):
            return 0.0
        if self._core.executed(index) != self._executed[index]:
            return 0.0
        return time.monotonic() - self._since[index]
