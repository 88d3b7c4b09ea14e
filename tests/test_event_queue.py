"""A stream's events on their way to a callback or a coroutine."""

import asyncio
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import pytest

from speechrnt import event_queue
from speechrnt.errors import UtteranceError
from speechrnt.event_queue import EventQueue
from speechrnt.events import Closed, Committed, Final, Overload, Partial, SpeechStarted

WAIT_S = 20


def partial(text):
    return Partial("u", 0.0, "", text)


def committed(delta):
    return Committed("u", 0.0, delta)


def final(text):
    return Final("u", 0.0, text, None, "en", False, False, None)


def other(number=0.0):
    return Overload("u", 0.0, number)


CLOSED = Closed("u", 0.0, "finalized")


@pytest.fixture
def threads():
    with ThreadPoolExecutor(2) as threads:
        yield threads


@pytest.fixture
def counts():
    return Counter()


@pytest.fixture
def make(threads, counts):
    """Make a queue; its attribute `room` counts the times that it told of room."""

    def make(callback=None):
        told = []
        queue = EventQueue(
            callback, threads, lambda: told.append(1), lambda name: counts.update([name])
        )
        queue.told = told
        return queue

    return make


class Gate:
    """A callback that keeps its events, once it is opened."""

    def __init__(self):
        self.open, self.entered = threading.Event(), threading.Event()
        self.events = []

    def __call__(self, event):
        self.entered.set()
        assert self.open.wait(WAIT_S)
        self.events.append(event)

    def block(self, queue):
        """Have a first event block it."""
        queue.put(SpeechStarted("u", 0.0, 0.0))
        assert self.entered.wait(WAIT_S)

    def rest(self, threads):
        """Let it go, and return what came after the first event."""
        self.open.set()
        threads.shutdown()
        return self.events[1:]


class TestCoalescing:
    def test_the_latest_partial_wins(self, make, threads, counts):
        gate = Gate()
        queue = make(gate)
        gate.block(queue)
        for text in "abc":
            queue.put(partial(text))
        assert gate.rest(threads) == [partial("c")]
        assert counts == {"stale_partials": 2}

    def test_what_is_committed_comes_in_one_piece(self, make, threads):
        gate = Gate()
        queue = make(gate)
        gate.block(queue)
        for delta in ("a", " b", " c"):
            queue.put(committed(delta))
            queue.put(partial("?"))
        assert gate.rest(threads) == [committed("a b c"), partial("?")]

    def test_the_final_replaces_its_windows_partial_but_not_what_was_committed(self, make, threads):
        gate = Gate()
        queue = make(gate)
        gate.block(queue)
        for event in (committed("a"), partial("b"), final("a b"), committed("c"), CLOSED):
            queue.put(event)
        assert gate.rest(threads) == [committed("a"), final("a b"), committed("c"), CLOSED]

    def test_nothing_else_gives_way(self, make, threads, counts):
        gate = Gate()
        queue = make(gate)
        gate.block(queue)
        events = [other(1), final("a"), other(2), final("b"), other(3)]
        for event in events:
            queue.put(event)
        assert gate.rest(threads) == events
        assert not counts

    def test_nothing_comes_after_closed(self, make, threads):
        gate = Gate()
        queue = make(gate)
        gate.block(queue)
        for event in (CLOSED, final("late"), CLOSED):
            queue.put(event)
        assert gate.rest(threads) == [CLOSED]


class TestCallback:
    def test_events_come_one_at_a_time_and_in_order(self, make, threads):
        inside = threading.Semaphore(1)
        seen = []

        def callback(event):
            assert inside.acquire(blocking=False)
            seen.append(event.partial_interval_s)
            inside.release()

        queue = make(callback)
        for number in range(500):
            queue.put(other(number))
        threads.shutdown()
        assert seen == list(range(500))

    @pytest.mark.parametrize("error", [ValueError, SystemExit, KeyboardInterrupt])
    def test_one_that_raises_gets_the_next_event_all_the_same(self, make, threads, counts, error):
        seen = []

        def callback(event):
            seen.append(event)
            raise error("of the user")

        queue = make(callback)
        for number in range(3):
            queue.put(other(number))
        threads.shutdown()
        assert len(seen) == 3
        assert counts == {"callback_errors": 3}

    def test_a_full_queue_is_for_the_stream_to_wait_for(self, make, threads, monkeypatch):
        monkeypatch.setattr(event_queue, "_CAPACITY", 4)
        gate = Gate()
        queue = make(gate)
        gate.block(queue)
        for number in range(4):
            assert not queue.is_full
            queue.put(other(number))
        assert queue.is_full
        queue.put(final("accepted"))
        assert gate.rest(threads) == [*map(other, range(4)), final("accepted")]
        assert queue.told
        assert not queue.is_full


class TestCoroutine:
    def test_it_gets_what_was_there_and_what_comes(self, make):
        queue = make()

        async def read():
            first = await queue.get()
            later = asyncio.create_task(queue.get())
            await asyncio.sleep(0)
            threading.Thread(target=queue.put, args=[CLOSED]).start()
            return first, await asyncio.wait_for(later, WAIT_S)

        queue.put(other())
        assert asyncio.run(read()) == (other(), CLOSED)

    def test_many_events_of_another_thread(self, make):
        queue = make()

        async def read():
            return [(await queue.get()).partial_interval_s for _ in range(2000)]

        thread = threading.Thread(target=lambda: [queue.put(other(n)) for n in range(2000)])

        async def main():
            reading = asyncio.create_task(read())
            await asyncio.sleep(0)
            thread.start()
            return await asyncio.wait_for(reading, WAIT_S)

        numbers = asyncio.run(main())
        thread.join()
        assert numbers == list(range(2000))

    def test_of_what_nobody_reads_the_oldest_goes_and_is_counted(self, make, counts, monkeypatch):
        monkeypatch.setattr(event_queue, "_CAPACITY", 4)
        queue = make()
        for number in range(10):
            queue.put(other(number))
        assert not queue.is_full
        assert counts == {"unread_events": 6}
        assert asyncio.run(queue.get()) == other(6)

    def test_a_cancelled_wait_loses_nothing(self, make):
        queue = make()

        async def main():
            with pytest.raises(asyncio.TimeoutError):
                await asyncio.wait_for(queue.get(), 0.01)
            queue.put(CLOSED)
            return await queue.get()

        assert asyncio.run(main()) == CLOSED

    def test_a_second_reader_is_told_so(self, make):
        queue = make()

        async def main():
            first = asyncio.create_task(queue.get())
            await asyncio.sleep(0)
            with pytest.raises(UtteranceError, match="another coroutine"):
                await queue.get()
            queue.put(CLOSED)
            return await first

        assert asyncio.run(main()) == CLOSED

    def test_the_loop_may_be_closed_while_it_waits(self, make):
        queue = make()
        loop = asyncio.new_event_loop()
        task = loop.create_task(queue.get())
        loop.run_until_complete(asyncio.sleep(0))
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            loop.run_until_complete(task)
        loop.close()
        queue.put(other())
        queue.put(CLOSED)
        assert asyncio.run(queue.get()) == other()
