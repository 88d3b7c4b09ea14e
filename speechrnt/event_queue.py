"""A stream's events on their way to its user: bounded, and without what is out of date."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Executor
from dataclasses import replace

from .errors import UtteranceError
from .events import Closed, Committed, Event, Final, Partial

__all__ = ["EventQueue"]

logger = logging.getLogger("speechrnt")

_CAPACITY = 1024


class EventQueue:
    """Events of one stream, for a callback or for one coroutine. Thread-safe.

    A partial that nobody has seen gives way to the next one, and to the final of its window; what
    was committed meanwhile comes in one piece. Nothing else is dropped as long as somebody takes
    the events: a full queue is for the stream to wait for. Of events that nobody takes the oldest
    are dropped, and counted.

    Parameters
    ----------
    callback
        Called with each event, one at a time, by a thread of `threads`.
    threads
        Whose threads callbacks may block.
    on_room
        Called when the queue is not full any more.
    count
        Called with the name of each thing that went otherwise than planned: see
        `StreamStatistics`.
    """

    def __init__(
        self,
        callback: Callable[[Event], object] | None,
        threads: Executor,
        on_room: Callable[[], None],
        count: Callable[[str], None],
    ) -> None:
        self._callback = callback
        self._threads = threads
        self._on_room = on_room
        self._count = count
        self._lock = threading.Lock()
        self._events: deque[Event] = deque()
        self._is_calling = False
        self._waiter: tuple[asyncio.AbstractEventLoop, asyncio.Future[None]] | None = None
        self._has_reader = callback is not None
        self._is_closed = False

    @property
    def is_full(self) -> bool:
        """Whether the stream must wait until events are taken."""
        return self._has_reader and len(self._events) >= _CAPACITY

    def put(self, event: Event) -> None:
        """Queue an event; one after `Closed` is dropped."""
        with self._lock:
            if self._is_closed:
                return
            self._is_closed = isinstance(event, Closed)
            if isinstance(event, Partial | Committed | Final | Closed):
                self._drop_partials()
            if isinstance(event, Committed) and self._events:
                last = self._events[-1]
                if isinstance(last, Committed):
                    self._events.pop()
                    event = replace(event, delta=last.delta + event.delta)
            self._events.append(event)
            if not self._has_reader and len(self._events) > _CAPACITY:
                self._events.popleft()
                self._count("unread_events")
            waiter, self._waiter = self._waiter, None
            calls = self._callback is not None and not self._is_calling
            self._is_calling |= calls
        if waiter is not None:
            loop, future = waiter
            try:
                loop.call_soon_threadsafe(_wake, future)
            except RuntimeError:  # the loop was closed, and its coroutine with it
                logger.debug("an event came after the loop was closed")
        if calls:
            self._threads.submit(self._call)

    def _drop_partials(self) -> None:
        """Drop the partial that nobody has seen; there is one at most."""
        for index, event in enumerate(self._events):
            if isinstance(event, Partial):
                del self._events[index]
                self._count("stale_partials")
                return

    def _take(self) -> Event | None:
        with self._lock:
            was_full = self.is_full
            event = self._events.popleft() if self._events else None
            if event is None:
                self._is_calling = False
        if was_full:
            self._on_room()
        return event

    def _call(self) -> None:
        """Call back with what there is."""
        assert self._callback is not None
        while (event := self._take()) is not None:
            try:
                self._callback(event)
            except BaseException:  # whatever it is, the next events are not to suffer for it
                self._count("callback_errors")
                logger.exception("the callback of utterance %r failed", event.utterance_id)

    async def get(self) -> Event:
        """Wait for the next event.

        Raises
        ------
        UtteranceError
            If another coroutine waits already.
        """
        self._has_reader = True
        while (event := self._take()) is None:
            loop = asyncio.get_running_loop()
            future: asyncio.Future[None] = loop.create_future()
            with self._lock:
                if self._events:
                    continue
                if self._waiter is not None and not self._waiter[1].done():
                    raise UtteranceError("another coroutine waits for the events of this utterance")
                self._waiter = (loop, future)
            await future
        return event


def _wake(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)
