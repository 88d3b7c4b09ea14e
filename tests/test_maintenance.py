"""Maintenance of pools by a scheduler: that it happens, what ends it, and what does not."""

import gc
import threading
import time
import weakref

import pytest
from pool_helpers import run_python
from waiting import eventually

from speechrnt import Priority, Scheduler, inference_memory
from speechrnt.errors import OptionError, SchedulerClosed
from speechrnt.pools import (
    AudioBufferPool,
    ObjectPool,
    PoolLimits,
    TranscriptionResultPool,
    maintain_on,
)

INTERVAL = 0.005


@pytest.fixture
def scheduler():
    with Scheduler(workers=1) as scheduler:
        yield scheduler


class Pool:
    """What maintenance knows of a pool; counts its calls."""

    def __init__(self, error=None):
        self.calls = 0
        self.closed = False
        self.error = error

    def maintain(self):
        self.calls += 1
        if self.error is not None:
            raise self.error


def test_idle_memory_of_every_pool_goes(scheduler):
    limits = PoolLimits(epoch_s=0.001, purge_after_s=0, free_after_s=0.01)
    pools = [AudioBufferPool(limits), TranscriptionResultPool(limits), ObjectPool(list, limits)]
    with maintain_on(scheduler, [*pools, inference_memory], INTERVAL) as maintenance:
        # On the worker, since the cache of another thread is emptied by that thread only.
        scheduler.submit(lambda: pools[0].acquire(1000).release()).result()
        for pool in pools[1:]:
            scheduler.submit(lambda pool=pool: pool.acquire().release()).result()
        assert all(pool.statistics().misses == 1 for pool in pools)
        eventually(lambda: all(pool.statistics().idle == 0 for pool in pools))
        assert maintenance.rounds > 0
        assert not maintenance.closed


def test_rounds_are_tasks_of_low_priority(scheduler):
    pool = Pool()
    maintain_on(scheduler, [pool], INTERVAL)
    eventually(lambda: pool.calls >= 3)
    executed = scheduler.statistics().executed
    assert executed[Priority.LOW] >= 3
    assert sum(executed.values()) == executed[Priority.LOW]


def test_close_ends_it(scheduler):
    pool = Pool()
    maintenance = maintain_on(scheduler, [pool], INTERVAL)
    eventually(lambda: pool.calls)
    maintenance.close()
    maintenance.close()
    assert maintenance.closed
    scheduler.drain()
    calls = pool.calls
    time.sleep(10 * INTERVAL)
    assert pool.calls == calls


def test_the_end_of_the_scheduler_ends_it():
    pool = Pool()
    with Scheduler(workers=1) as scheduler:
        maintenance = maintain_on(scheduler, [pool], INTERVAL)
        eventually(lambda: pool.calls)
    assert maintenance.closed
    calls = pool.calls
    time.sleep(10 * INTERVAL)
    assert pool.calls == calls


def test_a_closed_pool_is_left_alone_and_the_last_one_ends_it(scheduler):
    pools = [Pool(), Pool()]
    maintenance = maintain_on(scheduler, pools, INTERVAL)
    eventually(lambda: all(pool.calls for pool in pools))
    pools[0].closed = True
    scheduler.drain()
    calls = pools[0].calls
    more = pools[1].calls + 3
    eventually(lambda: pools[1].calls >= more)
    assert pools[0].calls == calls
    assert not maintenance.closed
    pools[1].closed = True
    assert maintenance.closed
    rounds = maintenance.rounds + 1  # one may be on its way
    time.sleep(10 * INTERVAL)
    assert maintenance.rounds <= rounds


@pytest.mark.parametrize(
    "make", [AudioBufferPool, TranscriptionResultPool, lambda: ObjectPool(list)]
)
def test_it_keeps_no_pool_alive(scheduler, make):
    pool = make()
    reference = weakref.ref(pool)
    maintenance = maintain_on(scheduler, [pool], INTERVAL)
    eventually(lambda: maintenance.rounds)
    del pool
    eventually(lambda: reference() is None)
    assert maintenance.closed


def test_it_keeps_no_scheduler_alive():
    pool = Pool()
    scheduler = Scheduler(workers=1)
    threads = list(scheduler._core.threads)
    reference = weakref.ref(scheduler)
    maintenance = maintain_on(scheduler, [pool], INTERVAL)
    eventually(lambda: pool.calls >= 3)
    del scheduler
    eventually(lambda: gc.collect() is not None and reference() is None)
    assert maintenance.closed
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive()


def test_a_pool_that_raises_is_reported_and_stops_nothing(scheduler, monkeypatch):
    reported = []
    monkeypatch.setattr(threading, "excepthook", lambda details: reported.append(details[1]))
    pools = [Pool(ZeroDivisionError("first")), Pool(SystemExit("second")), Pool()]
    maintain_on(scheduler, pools, INTERVAL)
    eventually(lambda: pools[2].calls >= 3)
    assert {str(error) for error in reported} == {"first", "second"}


def test_a_full_queue_skips_rounds_and_no_more():
    pool = Pool()
    busy = threading.Event()
    started = threading.Event()
    with Scheduler(workers=1, max_queued=1) as scheduler:
        scheduler.submit_nowait(lambda: started.set() or busy.wait())
        started.wait()
        scheduler.submit_nowait(int)
        maintenance = maintain_on(scheduler, [pool], INTERVAL)
        eventually(lambda: maintenance.skipped >= 3)
        assert pool.calls == 0
        busy.set()
        eventually(lambda: pool.calls >= 3)


def test_a_pool_may_close_its_maintenance(scheduler):
    class Closing(Pool):
        def maintain(self):
            super().maintain()
            maintenance.close()

    pool = Closing()
    ready = threading.Event()
    scheduler.submit_nowait(ready.wait)
    maintenance = maintain_on(scheduler, [pool], INTERVAL)
    ready.set()
    eventually(lambda: pool.calls)
    scheduler.drain()
    time.sleep(10 * INTERVAL)
    assert pool.calls == 1


def test_a_child_of_a_fork_closes_it_and_begins_again():
    out = run_python(
        """
        import os, signal, time, warnings
        from speechrnt import Scheduler
        from speechrnt.errors import SchedulerClosed
        from speechrnt.pools import ObjectPool, maintain_on
        warnings.simplefilter("ignore", DeprecationWarning)
        pool = ObjectPool(list)
        scheduler = Scheduler(workers=2)
        maintenance = maintain_on(scheduler, [pool], 1e-4)
        codes = []
        for _ in range(30):
            child = os.fork()
            if child == 0:
                signal.alarm(120)
                assert maintenance.closed
                maintenance.close()
                try:
                    maintain_on(scheduler, [pool])
                except SchedulerClosed:
                    own = Scheduler(workers=1)
                    again = maintain_on(own, [pool], 1e-4)
                    while again.rounds < 3:
                        time.sleep(0.001)
                    own.shutdown()
                    os._exit(0)
                os._exit(1)
            codes.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
        print(codes == [0] * 30, maintenance.closed)
        """
    )
    assert out == "True False\n"


def test_the_interpreter_exits_with_it_running():
    run_python(
        """
        from speechrnt import Scheduler
        from speechrnt.pools import AudioBufferPool, maintain_on
        scheduler, pool = Scheduler(workers=1), AudioBufferPool()
        maintenance = maintain_on(scheduler, [pool], 1e-4)
        while maintenance.rounds < 3:
            pass
        """
    )


@pytest.mark.parametrize("interval", [0, -1, float("nan"), float("inf"), "1", None, True])
def test_bad_interval(scheduler, interval):
    with pytest.raises(OptionError, match="interval_s must be"):
        maintain_on(scheduler, [Pool()], interval)


def test_no_pools(scheduler):
    with pytest.raises(OptionError, match="at least one pool"):
        maintain_on(scheduler, [])


@pytest.mark.parametrize("wrong", [None, "pool", object(), type("X", (), {"maintain": 5})()])
def test_something_that_is_no_pool(scheduler, wrong):
    with pytest.raises(TypeError, match="must have a method maintain"):
        maintain_on(scheduler, [wrong])


def test_something_that_is_no_scheduler():
    with pytest.raises(TypeError, match="a Scheduler is needed, not int"):
        maintain_on(5, [Pool()])


def test_a_scheduler_that_is_shut_down():
    scheduler = Scheduler(workers=1)
    scheduler.shutdown()
    with pytest.raises(SchedulerClosed):
        maintain_on(scheduler, [Pool()])
