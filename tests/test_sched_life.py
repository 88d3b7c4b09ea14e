"""The scheduler: delays and deadlines, the end of a scheduler, of its process, and forks."""

import gc
import logging
import os
import threading
import time
import weakref
from concurrent import futures

import pytest
from sched_helpers import LEVELS, SCALE, Blocker, held_timer, run_script
from waiting import eventually

from speechrnt import (
    DeadlineExceeded,
    Overloaded,
    Scheduler,
    SchedulerClosed,
)
from speechrnt._sched_timer import Timer


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
