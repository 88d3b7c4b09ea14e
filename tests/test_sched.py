"""The scheduler: scenarios in C and in Python. Nothing here depends on how long things take."""

import asyncio
import contextvars
import gc
import logging
import os
import random
import shutil
import subprocess
import sys
import textwrap
import threading
import time
import weakref
from concurrent import futures
from contextlib import contextmanager
from itertools import count, repeat
from pathlib import Path

import pytest
from native import load
from waiting import eventually

from speechrnt import (
    DeadlineExceeded,
    OptionError,
    Overloaded,
    Priority,
    Scheduler,
    SchedulerClosed,
    SpeechRNTError,
)
from speechrnt._sched_timer import GROW_AFTER, SHRINK_AFTER, Timer, Watch, next_size

# A sanitizer makes everything ten times slower.
SCALE = 1 if os.environ.get("SPEECHRNT_BUILD", "debug") == "debug" else 10
LEVELS = len(Priority)
FAIR_PERIOD = 32


@pytest.fixture(scope="session")
def native():
    return load("sched_native")


@pytest.fixture
def scheduler():
    with Scheduler(workers=2) as scheduler:
        yield scheduler


class Blocker:
    """Occupies the workers of a scheduler until released."""

    def __init__(self, scheduler, workers=1, priority=Priority.CRITICAL):
        self._release = threading.Event()
        started = threading.Semaphore(0)

        def block():
            started.release()
            self._release.wait()

        self.futures = [scheduler.submit(block, priority=priority) for _ in range(workers)]
        for _ in range(workers):
            started.acquire()

    def __enter__(self):
        return self

    def __exit__(self, *exc_info):
        self._release.set()


@contextmanager
def held_timer(scheduler):
    """Keep the timer's thread from making calls inside the block."""
    reached, go_on = threading.Event(), threading.Event()

    def hold():
        reached.set()
        go_on.wait()

    scheduler._core.timer.call_at(time.monotonic(), hold)
    assert reached.wait(60)
    try:
        yield
    finally:
        go_on.set()


def run_script(script, **environment):
    """Run a script in a Python of its own; return what it printed."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        capture_output=True,
        text=True,
        env=os.environ | environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout.split()


class TestRing:
    def test_oldest_and_newest(self, native):
        ring = native.Ring()
        assert (ring.take(), ring.pop(), ring.size()) == (0, 0, 0)
        for number in (1, 2, 3, 4):
            assert ring.push(number)
        assert (ring.take(), ring.pop(), ring.take(), ring.pop()) == (1, 4, 2, 3)
        assert (ring.take(), ring.pop(), ring.size()) == (0, 0, 0)

    def test_full(self, native):
        ring = native.Ring()
        for _ in range(3):
            assert [ring.push(i + 1) for i in range(native.CAPACITY)] == [True] * native.CAPACITY
            assert not ring.push(1)
            assert ring.take() == 1
            assert ring.push(native.CAPACITY + 1)
            assert [ring.take() for _ in range(native.CAPACITY)] == list(
                range(2, native.CAPACITY + 2)
            )

    def test_spsc(self, native):
        ring, stop = native.Ring(), native.Stop()
        with futures.ThreadPoolExecutor(2) as pool:
            taken = pool.submit(ring.steal, stop)
            pool.submit(ring.own, 200_000 // SCALE, 0, 0).result()
            stop.set()
            assert taken.result() == list(range(1, 200_000 // SCALE + 1))

    @pytest.mark.parametrize(("pop_every", "take_every"), [(0, 0), (3, 0), (0, 3), (2, 3)])
    def test_stampede(self, native, pop_every, take_every):
        ring, stop = native.Ring(), native.Stop()
        with futures.ThreadPoolExecutor(4) as pool:
            thieves = [pool.submit(ring.steal, stop) for _ in range(3)]
            kept = pool.submit(ring.own, 100_000 // SCALE, pop_every, take_every).result()
            stop.set()
            taken = [thief.result() for thief in thieves]
        assert sorted(sum(taken, kept)) == list(range(1, 100_000 // SCALE + 1))
        for numbers in taken:  # each thief sees the order of the pushes
            assert pop_every or numbers == sorted(numbers)


class TestHandover:
    """The short form of `make tsan`, which runs all of this file."""

    def test_nothing_is_lost(self):
        assert load("handover").hand_over(100_000 // SCALE) == 0

    @pytest.mark.skipif("SPEECHRNT_BUILD" in os.environ, reason="this is a build for tests")
    def test_under_the_thread_sanitizer(self):
        compiler = shutil.which("g++")
        if compiler is None or shutil.which("setarch") is None:
            pytest.skip("needs g++ and setarch")
        command = [compiler, "-print-file-name=libtsan.so"]
        library = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
        # The sanitizer must be loaded first, at addresses that are not random.
        preload = ["setarch", "-R", "env", f"LD_PRELOAD={library}", "TSAN_OPTIONS=exitcode=66"]
        probe = subprocess.run([*preload, sys.executable, "-c", ""], capture_output=True)
        if not Path(library).is_file() or probe.returncode != 0 or probe.stderr:
            pytest.skip("the compiler has no thread sanitizer that runs here")
        script = "from native import load; print(load('handover').hand_over(20_000))"
        done = subprocess.run(
            [*preload, sys.executable, "-c", script],
            cwd=Path(__file__).parent,
            env=os.environ | {"SPEECHRNT_BUILD": "tsan"},
            capture_output=True,
            text=True,
        )
        assert (done.returncode, done.stdout) == (0, "0\n"), done.stderr


class TestNative:
    def test_smoke(self, native, scheduler):
        batch = native.Batch(scheduler, 10_000)
        assert batch.submit() == 10_000
        assert batch.wait() == 0
        assert batch.states == [1] * 10_000

    def test_status_reaches_the_counter_once(self, native, scheduler):
        batch = native.Batch(scheduler, 10, status=7)
        batch.submit()
        assert batch.wait() == 7
        assert batch.wait() == 0

    def test_spawned_tasks_are_shared(self, native, scheduler):
        for _ in range(10):
            batch = native.Batch(scheduler, 5000, spin=100)
            batch.spawn_all()
            assert batch.states == [0] + [1] * 4999
        scheduler.drain()
        statistics = scheduler.statistics()
        assert statistics.submitted + statistics.spawned == 50_000
        assert sum(statistics.executed.values()) == 50_000

    @pytest.mark.parametrize("stealing", [True, False])
    def test_stealing_can_be_switched_off(self, native, stealing):
        with Scheduler(workers=2, stealing=stealing) as scheduler:
            batch = native.Batch(scheduler, 200, spin=2000)

            def stolen():
                batch.spawn_all()
                return scheduler.statistics().stolen

            if stealing:
                eventually(stolen)
            else:
                assert [stolen() for _ in range(3)] == [0] * 3

    def test_order_is_first_in_first_out(self, native):
        with Scheduler(workers=1) as scheduler:
            batches = [native.Batch(scheduler, 1) for _ in range(100)]
            order = []
            with Blocker(scheduler):
                waiting = [
                    scheduler.submit(order.append, i, priority=Priority.HIGH) for i in range(100)
                ]
                for batch in batches:
                    batch.submit()
            futures.wait(waiting)
            assert order == list(range(100))

    @pytest.mark.parametrize("workers", [1, 3])
    def test_fork_join(self, native, workers):
        with Scheduler(workers=workers) as scheduler:
            for number in (1, 2, 1000, 10_000):
                assert native.Batch(scheduler, 1).fork_join(number) == number

    @pytest.mark.parametrize("workers", [1, 2])
    def test_python_tasks_that_wait_for_native_ones_help(self, native, workers):
        def submit_and_wait():
            batch = native.Batch(scheduler, 100, status=7)
            batch.submit()
            return batch.wait(), batch.runs

        with Scheduler(workers=workers) as scheduler:
            waiting = [scheduler.submit(submit_and_wait) for _ in range(8)]
            assert [future.result() for future in waiting] == [(7, 100)] * 8

    def test_stampede(self, native):
        with Scheduler(workers=4) as scheduler:
            batches = [native.Batch(scheduler, 2000, priority=i % LEVELS) for i in range(8)]
            with futures.ThreadPoolExecutor(8) as pool:
                assert list(pool.map(lambda batch: batch.submit(), batches)) == [2000] * 8
            for batch in batches:
                batch.wait()
                assert batch.states == [1] * 2000

    def test_no_starvation(self, native):
        with Scheduler(workers=1) as scheduler:
            longest = native.Batch(scheduler, 8 * LEVELS + 1).saturate(20_000)
        assert max(longest) <= FAIR_PERIOD * LEVELS

    def test_no_starvation_of_python_by_native(self, native):
        with Scheduler(workers=1) as scheduler:
            batch = native.Batch(scheduler, 8 * LEVELS + 1)
            saturated = threading.Thread(target=batch.saturate, args=(2**62,))
            saturated.start()
            eventually(lambda: batch.order)
            try:
                for priority in Priority:
                    assert scheduler.submit(int, priority=priority).result(60) == 0
            finally:
                batch.end()
                saturated.join()

    def test_lost_wakeup(self, native):
        # A wake-up that is lost hangs the test.
        with Scheduler(workers=3) as scheduler:
            with futures.ThreadPoolExecutor(3) as pool:
                for i in range(3):
                    batch = native.Batch(scheduler, 1, priority=i)
                    pool.submit(batch.submit_and_wait, 5000 // SCALE, i)
            scheduler.drain()
            assert sum(scheduler.statistics().executed.values()) == 15_000 // SCALE

    def test_full_queue(self, native):
        with Scheduler(workers=1, max_queued=10) as scheduler:
            batch = native.Batch(scheduler, 30)
            with Blocker(scheduler):
                assert batch.submit() == 10
                statistics = scheduler.statistics()
                assert (statistics.rejected, statistics.queued[Priority.NORMAL]) == (20, 10)
                with pytest.raises(Overloaded, match="no room for 1 more: 10 tasks are waiting"):
                    scheduler.submit(int)
                assert not scheduler.health().ok
            batch.wait()
            assert batch.runs == 10
            assert batch.submit(10, 15) == 5

    def test_bound_of_what_waits(self, native):
        # The queues take max_queued, the ring of the only worker its capacity.
        with Scheduler(workers=1, max_queued=10) as scheduler:
            batch = native.Batch(scheduler, 2 * native.CAPACITY + 20)
            batch.spawn_all()  # until it is refused
            assert batch.runs == native.CAPACITY + 10
            assert scheduler.statistics().rejected == 1
            assert batch.submit(1, 5) == 4

    def test_shutdown_cancels(self, native):
        scheduler = Scheduler(workers=1)
        batch = native.Batch(scheduler, 100)
        with Blocker(scheduler):
            batch.submit()
            scheduler.shutdown(wait=False, cancel_futures=True)
            assert batch.wait() == -1
            assert (batch.runs, batch.cancelled) == (0, 100)
        scheduler.shutdown()
        assert batch.submit() == 0

    def test_resize_under_load(self, native):
        with Scheduler(workers=4, min_workers=1) as scheduler:
            choice = random.Random(0)
            batches = [native.Batch(scheduler, 5000, spin=20) for _ in range(8)]
            for batch in batches:
                scheduler.resize(choice.randint(1, 4))
                batch.submit()
            for batch in batches:
                scheduler.resize(choice.randint(1, 4))
                batch.wait()
                assert batch.states == [1] * 5000


class TestPython:
    def test_it_is_an_executor(self, scheduler):
        assert isinstance(scheduler, futures.Executor)
        assert scheduler.submit(divmod, 7, 2).result() == (3, 1)
        assert scheduler.submit(int, "ff", base=16).result() == 255
        done, _ = futures.wait([scheduler.submit(pow, i, 2) for i in range(100)])
        assert sorted(future.result() for future in done) == [i * i for i in range(100)]

    def test_priorities(self):
        with Scheduler(workers=1) as scheduler:
            order = []
            with Blocker(scheduler):
                for priority in [*reversed(Priority)] * 3:
                    scheduler.submit_nowait(order.append, priority, priority=priority)
            scheduler.drain()
        assert order == sorted(order)

    def test_no_starvation(self):
        limit = 5000
        with Scheduler(workers=1) as scheduler:
            order = []

            def respawn(priority):
                order.append(priority)
                if len(order) < limit:
                    scheduler.submit_nowait(respawn, priority, priority=priority)

            with Blocker(scheduler):
                for priority in [*Priority] * 3:
                    scheduler.submit_nowait(respawn, priority, priority=priority)
            scheduler.drain()
        for priority in Priority:
            served = [i for i, served in enumerate(order) if served == priority]
            gaps = [after - before for before, after in zip([0, *served], served, strict=False)]
            assert max(gaps) <= FAIR_PERIOD * LEVELS

    def test_reserved_workers_stay_free(self):
        with Scheduler(workers=2, reserved=1) as scheduler, Blocker(scheduler):
            # One of the two is blocked, perhaps the reserved one, and then the other is not.
            low = [scheduler.submit(int, priority=Priority.LOW) for _ in range(3)]
            assert scheduler.submit(int, priority=Priority.HIGH).result() == 0
            assert len(low) == 3

    @pytest.mark.parametrize(
        "error", [ValueError("x"), KeyboardInterrupt(), SystemExit(3), GeneratorExit()]
    )
    def test_exception(self, scheduler, error):
        def fail():
            raise error

        assert scheduler.submit(fail).exception() is error
        assert [scheduler.submit(int).result() for _ in range(10)] == [0] * 10

    def test_exception_without_a_future(self, scheduler, monkeypatch):
        reported = []
        monkeypatch.setattr(threading, "excepthook", lambda args: reported.append(args.exc_type))
        scheduler.submit_nowait(lambda: 1 / 0)
        scheduler.submit_nowait(sys.exit)
        scheduler.drain()
        assert sorted(reported, key=repr) == [SystemExit, ZeroDivisionError]

    def test_raising_callback(self, scheduler, caplog):
        def fail(future):
            raise RuntimeError("from the callback")

        with Blocker(scheduler, workers=2):
            future = scheduler.submit(int)
            future.add_done_callback(fail)
        assert future.result() == 0
        scheduler.drain()
        assert "from the callback" in caplog.text
        assert list(scheduler.map(abs, range(-10, 0))) == list(range(10, 0, -1))

    def test_callback_that_exits(self, monkeypatch):
        reported = []
        monkeypatch.setattr(threading, "excepthook", lambda args: reported.append(args.exc_type))
        with Scheduler(workers=1) as scheduler:
            with Blocker(scheduler):
                with held_timer(scheduler):
                    for future in (scheduler.submit(int), scheduler.submit(int, deadline=0.001)):
                        future.add_done_callback(sys.exit)
                assert isinstance(future.exception(), DeadlineExceeded)
            assert list(scheduler.map(abs, range(10))) == list(range(10))
            assert scheduler.submit(int, delay=0.001).result() == 0
        assert reported == [SystemExit, SystemExit]

    def test_submit_from_tasks_and_callbacks(self, scheduler):
        numbers = count()
        done = threading.Event()

        def again(_=None):
            if next(numbers) < 100:
                scheduler.submit(int).add_done_callback(again)
                scheduler.submit_nowait(int)
            else:
                done.set()

        scheduler.submit_nowait(again)
        done.wait()

    def test_cancel(self):
        with Scheduler(workers=1) as scheduler:
            with Blocker(scheduler) as blocker:
                future = scheduler.submit(int)
                assert not blocker.futures[0].cancel()
                assert future.cancel()
            scheduler.drain()
        with pytest.raises(futures.CancelledError):
            future.result()

    def test_cancel_race(self, scheduler):
        ran = []
        for i in range(2000):
            future = scheduler.submit(ran.append, i)
            if future.cancel():
                assert future.cancelled()
                ran.append(i)
            else:
                assert future.result() is None
        scheduler.drain()
        assert sorted(ran) == list(range(2000))

    def test_context_variables(self, scheduler):
        variable = contextvars.ContextVar("variable", default="outside")

        def replace():
            before = variable.get()
            variable.set("task")
            return before

        variable.set("caller")
        assert [scheduler.submit(replace).result() for _ in range(10)] == ["caller"] * 10
        assert variable.get() == "caller"

    def test_map(self, scheduler):
        assert list(scheduler.map(pow, range(1000), [2] * 1000)) == [i * i for i in range(1000)]
        assert list(scheduler.map(abs, [])) == []
        endless = scheduler.map(abs, count(), buffersize=3, priority=Priority.LOW)
        assert [next(endless) for _ in range(10)] == list(range(10))
        endless.close()
        with pytest.raises(ZeroDivisionError):
            list(scheduler.map(divmod, [1, 2], [1, 0]))
        with Blocker(scheduler, workers=2), pytest.raises(futures.TimeoutError):
            next(scheduler.map(abs, [1], timeout=0.01))

    def test_submit_many(self, scheduler):
        tasks = scheduler.submit_many(divmod, zip(range(1000), [7] * 1000, strict=True))
        assert [task.result() for task in tasks] == [divmod(i, 7) for i in range(1000)]
        assert scheduler.submit_many(int, [], priority=Priority.LOW) == []
        (task,) = scheduler.submit_many(int, ["x"])
        assert isinstance(task.exception(), ValueError)
        for priority in (4, "LOW", None):
            with pytest.raises(OptionError, match="priority must be"):
                scheduler.submit_many(int, [()], priority=priority)
        for arguments in (3, [3]):
            with pytest.raises(TypeError, match="not iterable"):
                scheduler.submit_many(int, arguments)
        with pytest.raises(TypeError, match="must be callable"):
            scheduler.submit_many(3, [])

    def test_submit_many_or_none(self):
        with Scheduler(workers=1, max_queued=10) as scheduler:
            with Blocker(scheduler):
                order = []
                first = scheduler.submit_many(order.append, [[i] for i in range(6)])
                with pytest.raises(Overloaded, match="no room for 5 more: 6 tasks"):
                    scheduler.submit_many(order.append, [["refused"]] * 5)
                with pytest.raises(Overloaded, match="more tasks at once than may wait"):
                    scheduler.submit_many(order.append, repeat(["refused"]))
                last = scheduler.submit_many(order.append, [[i] for i in range(6, 10)])
            futures.wait(first + last)
            assert order == list(range(10))
        with pytest.raises(SchedulerClosed):
            scheduler.submit_many(int, [()])

    def test_priority_by_number(self, scheduler):
        assert scheduler.submit(int, priority=3).result() == 0

    def test_results_are_not_kept(self, scheduler):
        class Big:
            pass

        big = Big()
        reference = weakref.ref(big)
        assert scheduler.submit(lambda x: None, big).result() is None
        scheduler.drain()
        del big
        gc.collect()
        assert reference() is None

    def test_full_queue(self):
        with Scheduler(workers=1, max_queued=3) as scheduler:
            with Blocker(scheduler):
                waiting = [scheduler.submit(int) for _ in range(3)]
                with pytest.raises(Overloaded, match="3 tasks are waiting"):
                    scheduler.submit(int)
                with pytest.raises(Overloaded):
                    list(scheduler.map(abs, range(9), buffersize=9))
                for _ in range(3):
                    scheduler.submit(int, delay=3600)
                with pytest.raises(Overloaded, match="delayed"):
                    scheduler.submit(int, delay=3600)
            assert [future.result() for future in waiting] == [0] * 3

    def test_asyncio(self, scheduler):
        async def main():
            loop = asyncio.get_running_loop()
            results = await asyncio.gather(
                *[loop.run_in_executor(scheduler, pow, i, 2) for i in range(100)]
            )
            with pytest.raises(ZeroDivisionError):
                await loop.run_in_executor(scheduler, divmod, 1, 0)
            return results

        assert asyncio.run(main()) == [i * i for i in range(100)]

    def test_many_submitters(self):
        with Scheduler(workers=3) as scheduler, futures.ThreadPoolExecutor(4) as pool:
            lists = pool.map(
                lambda start: list(scheduler.map(abs, range(start, start + 500))), range(4)
            )
            assert list(lists) == [list(range(start, start + 500)) for start in range(4)]

    def test_workers_that_block_do_not_block_others(self):
        with Scheduler(workers=3) as scheduler, Blocker(scheduler, workers=2):
            assert list(scheduler.map(abs, range(1000))) == list(range(1000))


class TestTime:
    def test_delay(self, scheduler):
        far = scheduler.submit(int, delay=3600)
        started = time.monotonic()
        delayed = scheduler.submit(time.monotonic, delay=0.02)
        assert scheduler.submit(time.monotonic, delay=0).result() >= started
        assert delayed.result() >= started + 0.02
        assert not far.done()
        assert far.cancel()
        assert scheduler.statistics().delayed == 0

    def test_cancelled_delay(self, scheduler):
        with held_timer(scheduler):
            future = scheduler.submit(int, delay=0.001)
            assert future.cancel()
        scheduler.submit(int, delay=0.01).result()
        scheduler.drain()
        assert future.cancelled()

    def test_what_ends_before_its_time_gives_up_its_place(self):
        class Argument:
            pass

        argument = Argument()
        with Scheduler(workers=1, max_queued=1) as scheduler:
            first = scheduler.submit(id, argument, delay=3600)
            with pytest.raises(Overloaded):
                scheduler.submit(int, delay=3600)
            assert first.cancel()
            argument = weakref.ref(argument)
            assert argument() is None
            second = scheduler.submit(int, delay=3600, deadline=0.001)
            with pytest.raises(DeadlineExceeded):
                second.result()
            eventually(lambda: scheduler.statistics().delayed == 0)
            third = scheduler.submit(int, delay=3600)
        assert third.cancelled()
        assert scheduler.statistics().delayed == 0

    def test_race_of_cancellation_and_delay(self):
        with Scheduler(workers=2) as scheduler:
            for _ in range(300 // SCALE):
                waiting = [
                    scheduler.submit(int, delay=0.0002 * i, deadline=0.0021) for i in range(1, 20)
                ]
                for future in reversed(waiting):
                    future.cancel()
                    del future
            scheduler.drain()
            eventually(lambda: scheduler.statistics().delayed == 0)

    def test_delayed_into_a_full_queue(self):
        with Scheduler(workers=1, max_queued=1) as scheduler, Blocker(scheduler):
            scheduler.submit(int)
            assert isinstance(scheduler.submit(int, delay=0.001).exception(), Overloaded)

    def test_deadline(self):
        with Scheduler(workers=1) as scheduler:
            with Blocker(scheduler):
                late = scheduler.submit(int, deadline=0.001)
                with pytest.raises(DeadlineExceeded):
                    late.result()
                in_time = scheduler.submit(int, deadline=3600)
            assert in_time.result() == 0
            assert not late.cancel()

    def test_deadline_of_what_a_shutdown_runs(self):
        with Scheduler(workers=1) as scheduler, Blocker(scheduler):
            late = scheduler.submit(int, deadline=0.01)
            in_time = scheduler.submit(int, deadline=3600)
            scheduler.shutdown(wait=False)
            time.sleep(0.02)
        assert isinstance(late.exception(), DeadlineExceeded)
        assert in_time.result() == 0

    def test_deadlines_of_done_tasks_are_forgotten(self, scheduler):
        list(futures.wait([scheduler.submit(int, deadline=3600) for _ in range(500)]))
        scheduler.drain()
        assert len(scheduler._core.timer._heap) <= 100

    def test_delayed_tasks_end_with_the_scheduler(self, caplog):
        with caplog.at_level(logging.WARNING, "speechrnt"):
            with Scheduler(workers=1) as scheduler:
                future = scheduler.submit(int, delay=3600)
                scheduler.submit_nowait(int, delay=3600)
            assert future.cancelled()
        assert "was cancelled" in caplog.text

    def test_timer_keeps_order(self):
        called = []
        timer = Timer("timer", lambda: None, 60)
        timer.thread.start()
        done = threading.Event()
        now = time.monotonic()
        timer.call_at(now + 0.02, done.set)
        for number in range(10):
            timer.call_at(now + 0.01, lambda number=number: called.append(number))
        timer.cancel(timer.call_at(now + 0.01, lambda: called.append("cancelled")))
        done.wait()
        timer.close()
        timer.thread.join()
        assert called == list(range(10))
        assert timer.call_at(now, done.set) is None


class TestLife:
    def test_drain(self, scheduler):
        ran = []
        for i in range(100):
            scheduler.submit_nowait(ran.append, i)
        scheduler.drain()
        assert len(ran) == 100
        with Blocker(scheduler), pytest.raises(TimeoutError):
            scheduler.drain(timeout=0.01)
        scheduler.drain(timeout=3600)
        scheduler.submit(int).result()

    def test_tasks_cannot_wait_for_themselves(self, scheduler):
        for method in (scheduler.drain, scheduler.shutdown):
            with pytest.raises(RuntimeError, match="cannot wait for its own"):
                scheduler.submit(method).result()
        scheduler.submit(int).result()

    def test_callbacks_cannot_wait_for_what_calls_them(self):
        errors = []

        def wait(future):
            for method in (scheduler.drain, scheduler.shutdown):
                try:
                    method()
                except RuntimeError as error:
                    errors.append(str(error))

        with Scheduler(workers=1) as scheduler:
            with Blocker(scheduler):
                with held_timer(scheduler):
                    late = scheduler.submit(int, deadline=0.001)
                    late.add_done_callback(wait)  # on the timer's thread
                with pytest.raises(DeadlineExceeded):
                    late.result()
                eventually(lambda: len(errors) == 2)
                scheduler.submit(int).add_done_callback(wait)
                scheduler.submit(int, delay=3600).add_done_callback(wait)
                scheduler.shutdown(wait=False, cancel_futures=True)
            scheduler.shutdown()
        assert len(errors) == 6
        assert all("cannot wait for its own scheduler" in error for error in errors)

    def test_a_thread_that_cannot_be_started(self):
        printed = run_script(
            """
            import threading
            from speechrnt import Scheduler

            start = threading.Thread.start
            def start_others(thread):
                if thread.name == "short-timer":
                    raise RuntimeError("can't start new thread")
                start(thread)

            threading.Thread.start = start_others
            try:
                Scheduler(workers=2, name="short")
            except RuntimeError as error:
                kept = error  # and with its traceback, the scheduler
            print(kept.args[0].split()[-1])
            """
        )
        assert printed == ["thread"]

    def test_shutdown_runs_what_waits(self):
        scheduler = Scheduler(workers=2)
        with Blocker(scheduler, workers=2):
            waiting = [scheduler.submit(abs, i) for i in range(100)]
            with pytest.raises(TimeoutError):
                scheduler.shutdown(timeout=0.01)
            assert scheduler.health().state == "draining"
        scheduler.shutdown()
        assert [future.result(0) for future in waiting] == list(range(100))
        assert scheduler.health().state == "stopped"
        for call in (scheduler.submit, scheduler.submit_nowait):
            with pytest.raises(SchedulerClosed):
                call(int)
        with pytest.raises(SchedulerClosed):
            scheduler.submit(int, delay=1)
        scheduler.shutdown()

    def test_shutdown_cancels(self):
        scheduler = Scheduler(workers=1)
        with Blocker(scheduler) as blocker:
            waiting = [scheduler.submit(int, priority=i % LEVELS) for i in range(100)]
            scheduler.shutdown(wait=False, cancel_futures=True)
            assert all(future.cancelled() for future in waiting)
            assert not futures.wait(waiting).not_done
        scheduler.shutdown()
        assert blocker.futures[0].result() is None
        assert scheduler.statistics().dropped == 100

    def test_shutdown_from_a_task(self):
        scheduler = Scheduler(workers=1)
        scheduler.submit(scheduler.shutdown, wait=False).result()
        scheduler.shutdown()

    def test_no_threads_are_left(self):
        before = set(threading.enumerate())
        for _ in range(3):
            with Scheduler(workers=3) as scheduler:
                scheduler.submit(int).result()
        assert not set(threading.enumerate()) - before

    def test_forgotten_scheduler_ends(self):
        ran = []
        scheduler = Scheduler(workers=2)
        threads = scheduler._core.threads
        for i in range(100):
            scheduler.submit_nowait(ran.append, i)
        del scheduler
        gc.collect()
        for thread in threads:
            thread.join()
        assert len(ran) == 100

    @pytest.mark.parametrize("at_exit", ["drain", "cancel"])
    def test_drain_on_exit(self, at_exit):
        printed = run_script(
            """
            import os, threading, time
            from speechrnt import Scheduler

            scheduler = Scheduler(workers=2, at_exit=os.environ["AT_EXIT"])
            started = threading.Semaphore(0)
            def run_into_the_end():
                started.release()
                while scheduler.health().state == "running":
                    time.sleep(0.001)
            def report(future):
                os.write(1, b"cancelled " if future.cancelled() else b"ran ")
            for task in [run_into_the_end] * 2 + [int] * 298:
                scheduler.submit(task).add_done_callback(report)
            for _ in range(2):
                started.acquire()
            """,
            AT_EXIT=at_exit,
        )
        n_ran = 300 if at_exit == "drain" else 2
        assert sorted(printed) == ["cancelled"] * (300 - n_ran) + ["ran"] * n_ran

    def test_no_scheduler_begins_after_the_end_of_all(self):
        printed = run_script(
            """
            import atexit

            def late():
                from speechrnt import Scheduler, SchedulerClosed
                try:
                    Scheduler(workers=1)
                except SchedulerClosed:
                    print("refused")

            atexit.register(late)  # and so called after what speechrnt registers
            import speechrnt
            """
        )
        assert printed == ["refused"]

    def test_exit_with_an_idle_scheduler(self):
        script = "from speechrnt import Scheduler; s = Scheduler(); s.submit(print, 'ran').result()"
        assert run_script(script) == ["ran"]

    @pytest.mark.skipif(not hasattr(os, "fork"), reason="the platform has no fork")
    def test_fork_child(self):
        printed = run_script(
            """
            import os, warnings
            warnings.simplefilter("ignore")  # forking with threads is what is tested
            from speechrnt import Scheduler, SchedulerClosed

            scheduler = Scheduler(workers=2)
            scheduler.submit(int).result()
            child = os.fork()
            if child == 0:
                for call in (lambda: scheduler.submit(int), scheduler.drain,
                             lambda: scheduler.submit(int, delay=1)):
                    try:
                        call()
                    except SchedulerClosed as error:
                        os.write(1, b"refused " if "parent" in str(error) else b"unclear ")
                scheduler.shutdown()
                with Scheduler(workers=1) as own:
                    os.write(1, b"own " if own.submit(pow, 2, 3).result() == 8 else b"wrong ")
                del scheduler
            else:
                _, status = os.waitpid(child, 0)
                os.write(1, b"status=%d " % status)
                os.write(1, b"parent " if scheduler.submit(pow, 2, 3).result() == 8 else b"lost ")
            """
        )
        assert printed == ["refused", "refused", "refused", "own", "status=0", "parent"]

    @pytest.mark.skipif(not hasattr(os, "fork"), reason="the platform has no fork")
    @pytest.mark.skipif(
        os.environ.get("SPEECHRNT_BUILD") == "tsan",
        reason="the thread sanitizer crashes when a worker ends in the child",
    )
    def test_a_task_that_forks_leaves_the_others_to_the_parent(self):
        printed = run_script(
            """
            import os, warnings
            warnings.simplefilter("ignore")  # forking with threads is what is tested
            from speechrnt import Scheduler

            parent = os.getpid()
            def report(number):
                os.write(1, b"%d " % number if os.getpid() == parent else b"child ")

            with Scheduler(workers=1) as scheduler:
                def fork():
                    for number in range(20):
                        scheduler.submit_nowait(report, number)
                    return os.fork()
                child = scheduler.submit(fork).result()
                _, status = os.waitpid(child, 0)
            os.write(1, b"status=%d" % status)
            """
        )
        assert printed == [*map(str, range(20)), "status=0"]


class TestReports:
    def test_statistics(self, native, scheduler):
        native.Batch(scheduler, 640).spawn_all()
        for _ in range(10):
            scheduler.submit(int, priority=Priority.HIGH).result()
        scheduler.drain()
        statistics = scheduler.statistics()
        assert statistics.submitted + statistics.spawned == 650
        assert statistics.executed == {0: 0, 1: 10, 2: 640, 3: 0}
        assert sum(worker.executed for worker in statistics.workers) == 650
        assert sum(worker.stolen for worker in statistics.workers) == statistics.stolen
        assert statistics.wait[Priority.HIGH].count == 10
        assert statistics.run.count >= 20
        times = statistics.wait[Priority.HIGH]
        assert 0 < times.p50_s <= times.p90_s <= times.p99_s
        assert all(0 <= worker.utilisation <= 1 for worker in statistics.workers)
        assert statistics.queued == dict.fromkeys(Priority, 0)
        with pytest.raises(AttributeError):
            statistics.submitted = 0

    def test_queue_depth(self, native):
        with Scheduler(workers=1) as scheduler, Blocker(scheduler):
            native.Batch(scheduler, 1)
            scheduler.submit(int, priority=Priority.LOW)
            scheduler.submit(int, priority=Priority.LOW)
            assert scheduler.statistics().queued == {0: 0, 1: 0, 2: 0, 3: 2}

    def test_health(self):
        with Scheduler(workers=1, max_queued=10) as scheduler:
            assert scheduler.health().ok
            with Blocker(scheduler):
                for _ in range(8):
                    scheduler.submit(int)
                health = scheduler.health()
                assert not health.ok
                assert health.queue_use == 0.8
                assert health.problems == ("The queue is 80% full.",)
            scheduler.drain()
            assert scheduler.health().ok

    def test_stalled_worker(self):
        with Scheduler(workers=2, stall_after=0.02) as scheduler:
            with Blocker(scheduler):
                eventually(lambda: not scheduler.health().ok)
                health = scheduler.health()
                assert len(health.stalled) == 1
                assert "has been at one task" in health.problems[0]
            scheduler.drain()
            eventually(lambda: scheduler.health().ok)

    def test_next_size(self):
        assert next_size(2, 1, 4, GROW_AFTER - 1, 0) == 2
        assert next_size(2, 1, 4, GROW_AFTER, 0) == 3
        assert next_size(4, 1, 4, GROW_AFTER, 0) == 4
        assert next_size(2, 1, 4, 0, SHRINK_AFTER) == 1
        assert next_size(1, 1, 4, 0, SHRINK_AFTER) == 1

    def test_watch_follows_the_load(self):
        class Core:
            size = 2
            waiting = 0
            parked = (True, True, True)

            def queued(self):
                return self.waiting

            def executed(self, index):
                return 0

            def is_parked(self, index):
                return self.parked[index]

            def resize(self, size):
                self.size = size

        core = Core()
        watch = Watch(core, 3, 0, 1, 3)
        core.waiting, core.parked = 5, (False, False, True)
        for _ in range(GROW_AFTER):
            watch.tick()
        assert core.size == 3
        core.waiting, core.parked = 0, (True, False, True)
        for _ in range(SHRINK_AFTER):
            watch.tick()
        assert core.size == 2

    def test_reserved_workers_that_sleep_do_not_hinder_growth(self):
        with (
            Scheduler(workers=2, reserved=1, max_workers=4) as scheduler,
            Blocker(scheduler, priority=Priority.NORMAL),
        ):
            assert scheduler.submit(pow, 2, 3).result() == 8
            assert scheduler.statistics().size > 2

    def test_size_grows_with_blocked_workers(self):
        with Scheduler(workers=1, max_workers=3) as scheduler, Blocker(scheduler):
            assert scheduler.submit(pow, 2, 3).result() == 8
            assert scheduler.statistics().size > 1


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="no CPU affinity here")
class TestAffinity:
    def test_workers_are_bound(self):
        allowed = sorted(os.sched_getaffinity(0))
        with Scheduler(workers=2, affinity=allowed[-1:]) as scheduler:
            assert scheduler.submit(os.sched_getaffinity, 0).result() == {allowed[-1]}
            assert [worker.core for worker in scheduler.statistics().workers] == allowed[-1:] * 2
        with Scheduler(workers=len(allowed), affinity="auto") as scheduler:
            assert [worker.core for worker in scheduler.statistics().workers] == allowed
        assert sorted(os.sched_getaffinity(0)) == allowed

    def test_a_core_that_is_not_allowed(self):
        absent = max(os.sched_getaffinity(0)) + 1
        with pytest.raises(OptionError, match=f"names CPUs \\[{absent}\\]"):
            Scheduler(affinity=[absent])

    def test_platforms_without_it(self, monkeypatch):
        monkeypatch.delattr(os, "sched_getaffinity")
        with Scheduler(workers=1, affinity="auto") as scheduler:
            assert "cannot be bound" in scheduler.statistics().affinity_note
        with Scheduler() as scheduler:
            assert scheduler.statistics().size == min(os.cpu_count(), 64)


class TestInput:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"workers": 0}, "workers must be from 1 to 64, not 0"),
            ({"workers": -1}, "workers must be from 1 to 64, not -1"),
            ({"workers": 65}, "workers must be from 1 to 64, not 65"),
            ({"workers": 10**30}, "workers must be from 1 to 64"),
            ({"workers": 1.5}, "workers must be an integer, not 1.5"),
            ({"workers": "2"}, "workers must be an integer, not '2'"),
            ({"workers": 2, "min_workers": 3}, "must not decrease, but are 3, 2 and 2"),
            ({"workers": 2, "max_workers": 1}, "must not decrease, but are 2, 2 and 1"),
            ({"min_workers": 3, "max_workers": 2}, "must not decrease"),
            ({"workers": 2, "reserved": 2}, "reserved must be from 0 to 1, not 2"),
            ({"workers": 2, "reserved": -1}, "reserved must be from 0 to 1, not -1"),
            ({"max_queued": 0}, "max_queued must be from 1"),
            ({"max_queued": 2**40}, "max_queued must be from 1"),
            ({"stall_after": 0}, "stall_after must be a positive"),
            ({"stall_after": float("nan")}, "stall_after must be a positive"),
            ({"stall_after": 1e300}, "stall_after must be a positive .* up to 1e9, not 1e[+]300"),
            ({"stall_after": 10**400}, "stall_after must be a number of seconds"),
            ({"stall_after": "long"}, "stall_after must be a number of seconds"),
            ({"stealing": None}, "stealing must be True or False, not None"),
            ({"at_exit": "hang"}, "at_exit must be 'drain' or 'cancel', not 'hang'"),
            ({"affinity": "all"}, "affinity must be None, 'auto' or CPU numbers, not 'all'"),
            ({"affinity": []}, "affinity must name at least one CPU"),
            ({"affinity": ["0"]}, "affinity must be None, 'auto' or CPU numbers"),
            ({"affinity": 3}, "affinity must be None, 'auto' or CPU numbers, not 3"),
        ],
    )
    def test_options(self, options, message):
        with pytest.raises(OptionError, match=message) as caught:
            Scheduler(**options)
        assert isinstance(caught.value, SpeechRNTError)
        assert isinstance(caught.value, ValueError)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"priority": 4}, "priority must be a Priority, not 4"),
            ({"priority": "HIGH"}, "priority must be a Priority, not 'HIGH'"),
            ({"priority": None}, "priority must be a Priority, not None"),
            ({"delay": -1}, "delay must be a positive"),
            ({"delay": float("inf")}, "delay must be a positive"),
            ({"delay": 1e10}, "delay must be a positive"),
            ({"deadline": 0}, "deadline must be a positive"),
            ({"deadline": "soon"}, "deadline must be a number of seconds, not 'soon'"),
        ],
    )
    def test_submission(self, scheduler, options, message):
        for method in (scheduler.submit, scheduler.submit_nowait):
            with pytest.raises(OptionError, match=message):
                method(int, **options)
        assert scheduler.submit(int).result() == 0

    def test_not_callable(self, scheduler):
        for method in (scheduler.submit, scheduler.submit_nowait):
            with pytest.raises(TypeError, match="must be callable, which 3 is not"):
                method(3)
        assert scheduler.submit(int).result() == 0

    def test_other_arguments(self, scheduler):
        for workers in (0, 3):
            with pytest.raises(OptionError, match="workers must be from 2 to 2"):
                scheduler.resize(workers)
        with pytest.raises(OptionError, match="timeout must be"):
            scheduler.drain(timeout=-1)
        with pytest.raises(OptionError, match="timeout must be"):
            scheduler.drain(timeout=1e300)
        scheduler.drain(timeout=1e9)
        with pytest.raises(OptionError, match="timeout must be"):
            scheduler.shutdown(timeout="soon")
        with pytest.raises(OptionError, match="buffersize must be"):
            scheduler.map(abs, [1], buffersize=0)
        assert scheduler.submit(int).result() == 0

    def test_a_foreign_object_has_no_native_scheduler(self, native):
        with pytest.raises(TypeError, match="a Scheduler is needed, not int"):
            native.Batch(3, 1)
