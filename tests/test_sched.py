"""The scheduler as an executor of Python. Nothing here depends on how long things take."""

import asyncio
import contextvars
import gc
import os
import sys
import threading
import weakref
from concurrent import futures
from itertools import count, repeat

import pytest
from sched_helpers import FAIR_PERIOD, LEVELS, Blocker, held_timer
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
from speechrnt._sched_timer import GROW_AFTER, SHRINK_AFTER, Watch, next_size


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
