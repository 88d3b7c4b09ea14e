"""Where the Python work around the model runs: on the scheduler, or in the calling thread."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable
from typing import Any, Protocol

from ._sched import Priority, Scheduler
from .errors import SpeechRNTError

__all__ = ["Executor", "InlineExecutor", "SchedulerExecutor"]

logger = logging.getLogger("speechrnt")


class Executor(Protocol):
    """What runs the work before and after the model. It takes whatever it is given."""

    def submit_nowait(self, fn: Callable[..., object], /, *args: Any, priority: Priority) -> None:
        """Run a function soon."""


class InlineExecutor:
    """Runs what it is given in the thread that gives it. Thread-safe.

    At once, but what a function gives it meanwhile comes after that function: nothing nests,
    however long the chain.
    """

    def __init__(self) -> None:
        self._local = threading.local()

    def submit_nowait(
        self,
        fn: Callable[..., object],
        /,
        *args: Any,
        priority: Priority,  # noqa: ARG002 - nothing waits
    ) -> None:
        """Run a function."""
        waiting: deque[tuple[Callable[..., object], tuple[Any, ...]]] | None
        waiting = getattr(self._local, "waiting", None)
        if waiting is not None:
            waiting.append((fn, args))
            return
        self._local.waiting = waiting = deque([(fn, args)])
        try:
            while waiting:
                fn, args = waiting.popleft()
                try:
                    fn(*args)
                except Exception:
                    logger.exception("a task failed")
        finally:
            self._local.waiting = None


class SchedulerExecutor:
    """Runs what it is given on a scheduler, or inline where that takes nothing. Thread-safe."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        self._inline = InlineExecutor()

    def submit_nowait(self, fn: Callable[..., object], /, *args: Any, priority: Priority) -> None:
        """Run a function soon."""
        try:
            self._scheduler.submit_nowait(fn, *args, priority=priority)
        except (SpeechRNTError, MemoryError) as error:
            logger.debug("a task runs in its caller: %s", error)
            self._inline.submit_nowait(fn, *args, priority=priority)
