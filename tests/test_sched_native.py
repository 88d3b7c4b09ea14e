"""The scheduler, by tasks in C: rings, hand-over, fork and join, turns, bounds."""

import os
import random
import shutil
import subprocess
import sys
import threading
from concurrent import futures
from pathlib import Path

import pytest
from native import load
from sched_helpers import FAIR_PERIOD, LEVELS, SCALE, Blocker
from waiting import eventually

from speechrnt import (
    Overloaded,
    Priority,
    Scheduler,
)


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
