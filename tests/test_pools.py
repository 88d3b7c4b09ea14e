"""The pools: against simple models, from many threads, across fork, and when misused."""

import gc
import itertools
import math
import pickle
import random
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
from pool_helpers import in_threads

from speechrnt.errors import HandleError, OptionError, PoolClosedError, PoolExhausted
from speechrnt.pools import (
    AudioBuffer,
    AudioBufferPool,
    Lease,
    ObjectPool,
    PoolLimits,
    TranscriptionResult,
    TranscriptionResultPool,
)

OK, EXHAUSTED, STALE, FOREIGN, IN_USE, INVALID = 0, 1, 3, 4, 5, 6

EVERY_POOL = {
    "objects": lambda **limits: ObjectPool(bytearray, PoolLimits(**limits)),
    "audio": lambda **limits: ShortAudioPool(PoolLimits(**limits), initial_samples=1),
    "results": lambda **limits: TranscriptionResultPool(PoolLimits(**limits)),
}
every_pool = pytest.mark.parametrize("make", EVERY_POOL.values(), ids=EVERY_POOL.keys())


class ShortAudioPool:
    """An AudioBufferPool whose buffers are all of one length."""

    def __init__(self, *args, **kwargs):
        self.pool = AudioBufferPool(*args, **kwargs)

    def acquire(self):
        return self.pool.acquire(1)

    def __getattr__(self, name):
        return getattr(self.pool, name)


class TestEveryPool:
    @every_pool
    def test_what_was_released_is_lent_again(self, make):
        pool = make()
        pool.acquire().release()
        pool.acquire().release()
        statistics = pool.statistics()
        assert (statistics.hits, statistics.misses, statistics.in_use) == (1, 1, 0)
        assert statistics.hit_rate == 0.5

    @every_pool
    def test_hit_rate_before_the_first_acquire_is_zero(self, make):
        assert make().statistics().hit_rate == 0.0

    @every_pool
    def test_release_twice_is_an_error(self, make):
        pool = make()
        lease = pool.acquire()
        lease.release()
        with pytest.raises(HandleError, match="released already"):
            lease.release()
        other = pool.acquire()
        with pytest.raises(HandleError, match="released already"):
            lease.release()
        assert pool.statistics().in_use == 1
        other.release()

    @every_pool
    def test_with_releases_even_after_an_error_or_a_release(self, make):
        pool = make()
        with pytest.raises(KeyError), pool.acquire():
            raise KeyError
        lease = pool.acquire()
        with lease:
            lease.release()
        assert pool.statistics().in_use == 0

    @every_pool
    def test_collection_releases(self, make):
        pool = make()
        pool.acquire()
        gc.collect()
        assert pool.statistics().in_use == 0

    @every_pool
    def test_another_thread_may_release(self, make):
        pool = make()
        leases = [pool.acquire() for _ in range(100)]
        with ThreadPoolExecutor(1) as executor:
            list(executor.map(lambda lease: lease.release(), leases))
        assert pool.statistics().in_use == 0
        with pool.acquire():
            assert pool.statistics().in_use == 1

    @every_pool
    def test_of_two_threads_that_release_one_succeeds(self, make):
        pool = make()

        def try_release(lease):
            try:
                lease.release()
            except HandleError:
                return 0
            return 1

        for _ in range(50):
            lease = pool.acquire()
            assert sum(in_threads(3, lambda _, lease=lease: try_release(lease))) == 1
        assert pool.statistics().in_use == 0

    @every_pool
    def test_at_the_limit_it_raises_and_stays_usable(self, make):
        pool = make(max_size=2)
        first, second = pool.acquire(), pool.acquire()
        assert pool.health().state == "full"
        for error in (PoolExhausted, MemoryError):
            with pytest.raises(error, match="limit of 2"):
                pool.acquire()
        first.release()
        pool.acquire().release()
        second.release()
        statistics = pool.statistics()
        assert (statistics.in_use, statistics.idle, statistics.overflows) == (0, 2, 0)

    @every_pool
    def test_overflow_is_counted_dropped_and_bounded(self, make):
        pool = make(max_size=2, overflow="allocate")
        leases = [pool.acquire() for _ in range(4)]
        with pytest.raises(PoolExhausted):
            pool.acquire()
        statistics = pool.statistics()
        assert (statistics.overflows, statistics.in_use, statistics.peak) == (2, 4, 4)
        assert pool.health().utilisation == 2.0
        for lease in leases:
            lease.release()
        statistics = pool.statistics()
        assert (statistics.in_use, statistics.idle) == (0, 2)
        pool.acquire().release()
        assert pool.statistics().hits > statistics.hits

    @every_pool
    def test_health_is_use_against_the_limit(self, make):
        pool = make(max_size=10)
        states = []
        leases = []
        for _ in range(11):
            states.append((pool.health().state, round(pool.health().utilisation, 3)))
            if len(leases) < 10:
                leases.append(pool.acquire())
        assert states == [*(("ok", i / 10) for i in range(9)), ("high", 0.9), ("full", 1.0)]

    @every_pool
    def test_trim_frees_what_is_idle(self, make):
        pool = make()
        leases = [pool.acquire() for _ in range(5)]
        for lease in leases:
            lease.release()
        pool.trim()
        statistics = pool.statistics()
        assert (statistics.idle, statistics.idle_bytes, statistics.reserved_bytes) == (0, 0, 0)
        assert statistics.purges > 0
        pool.acquire().release()

    @every_pool
    def test_initial_size_is_there_from_the_start_and_stays(self, make):
        pool = make(initial_size=3, max_size=8)
        leases = [pool.acquire() for _ in range(3)]
        assert pool.statistics().misses == 0
        for lease in leases:
            lease.release()
        pool.trim()
        for now in range(100):
            pool.maintain(now)
        assert pool.statistics().idle >= 3

    @every_pool
    def test_maintenance_keeps_what_demand_explains_and_then_lets_go(self, make):
        pool = make(max_size=1000)
        now = 100.0
        for _ in range(20):
            leases = [pool.acquire() for _ in range(40)]
            for lease in leases:
                lease.release()
            pool.maintain(now)
            now += 1
        misses = pool.statistics().misses
        leases = [pool.acquire() for _ in range(40)]
        assert pool.statistics().misses == misses
        del lease, leases
        for _ in range(30):
            pool.maintain(now)
            now += 1
        statistics = pool.statistics()
        assert (statistics.idle, statistics.reserved_bytes, statistics.in_use) == (0, 0, 0)

    @every_pool
    def test_soft_size_is_what_clean_up_leaves_at_most(self, make):
        pool = make(max_size=4096, soft_size=8)
        leases = [pool.acquire() for _ in range(4000)]
        del leases
        pool.maintain(100.0)
        pool.maintain(111.0)
        assert pool.statistics().idle <= 512  # the chunk of small objects that these 8 are in

    @every_pool
    def test_nothing_is_cleaned_up_before_its_time(self, make):
        pool = make(soft_size=0, free_after_s=10.0)
        pool.maintain(100.0)
        pool.acquire().release()
        pool.maintain(100.5)
        pool.maintain(109.9)
        assert pool.statistics().idle >= 1
        pool.maintain(110.5)
        assert pool.statistics().idle == 0

    @every_pool
    @pytest.mark.parametrize("now", [math.nan, math.inf, -1, "soon", 10**400])
    def test_bad_time_of_maintenance_changes_nothing(self, make, now):
        pool = make(soft_size=0)
        pool.maintain(100.0)
        pool.acquire().release()
        with pytest.raises(OptionError, match="now must be a number of seconds"):
            pool.maintain(now)
        pool.maintain(105.0)
        assert pool.statistics().idle > 0
        pool.trim()
        assert pool.statistics().idle == 0

    @every_pool
    def test_time_that_goes_back_stands_still(self, make):
        pool = make(soft_size=0, free_after_s=10.0)
        pool.maintain(100.0)
        pool.acquire().release()
        pool.maintain(50.0)
        pool.maintain(109.0)
        assert pool.statistics().idle > 0
        pool.maintain(110.5)
        assert pool.statistics().idle == 0

    @every_pool
    def test_close_refuses_acquires_and_honours_leases(self, make):
        pool = make()
        assert not pool.closed
        lease, other = pool.acquire(), pool.acquire()
        other.release()
        pool.close()
        pool.close()
        with pytest.raises(PoolClosedError):
            pool.acquire()
        assert pool.health().state == "closed"
        lease.release()
        with pytest.raises(HandleError):
            lease.release()
        pool.trim()
        pool.maintain()
        assert pool.closed
        statistics = pool.statistics()
        assert (statistics.in_use, statistics.idle, statistics.reserved_bytes) == (0, 0, 0)

    @every_pool
    def test_leases_outlive_the_pool_object(self, make):
        pool = make()
        lease = pool.acquire()
        del pool
        gc.collect()
        lease.release()

    @every_pool
    def test_threads(self, make):
        pool = make(max_size=64, overflow="allocate")

        def churn(i):
            chance = random.Random(i)
            leases = []
            for _ in range(2000):
                if leases and chance.random() < 0.5:
                    leases.pop(chance.randrange(len(leases))).release()
                elif len(leases) < 8:
                    leases.append(pool.acquire())
                if chance.random() < 0.01:
                    pool.trim()
                    pool.maintain()
                    pool.statistics()

        in_threads(6, churn)
        gc.collect()
        assert pool.statistics().in_use == 0

    @every_pool
    def test_leases_are_not_pickled(self, make):
        lease = make().acquire()
        with pytest.raises(TypeError):
            pickle.dumps(lease)

    @pytest.mark.parametrize("lease", [Lease, AudioBuffer, TranscriptionResult])
    def test_leases_come_from_pools_only(self, lease):
        with pytest.raises(TypeError, match=r"come from .*\.acquire"):
            lease()


class TestLimits:
    @pytest.mark.parametrize(
        ("limits", "message"),
        [
            ({"max_size": 0}, "max_size must be from 1"),
            ({"max_size": -1}, "max_size must be from 1"),
            ({"max_size": 10**9}, "max_size must be from 1"),
            ({"max_size": 1.5}, "max_size must be an integer"),
            ({"max_size": "many"}, "max_size must be an integer"),
            ({"max_size": True}, "max_size must be an integer"),
            ({"initial_size": -1}, "initial_size must be from 0"),
            ({"initial_size": 5, "max_size": 4}, "initial_size must be from 0 to 4, not 5"),
            ({"initial_size": 3, "soft_size": 2}, "soft_size must be from 3"),
            ({"soft_size": 5, "max_size": 4}, "soft_size must be from 0 to 4, not 5"),
            ({"max_bytes": 0}, "max_bytes must be from 1"),
            ({"max_bytes": -5}, "max_bytes must be from 1"),
            ({"soft_bytes": 9, "max_bytes": 8}, "soft_bytes must be from 0 to 8, not 9"),
            ({"overflow": "block"}, "overflow must be 'raise' or 'allocate', not 'block'"),
            ({"epoch_s": -1}, "epoch_s must be seconds"),
            ({"epoch_s": math.nan}, "epoch_s must be seconds"),
            ({"free_after_s": math.inf}, "free_after_s must be seconds"),
            ({"free_after_s": 10**400}, "free_after_s must be seconds"),
            ({"free_after_s": "soon"}, "free_after_s must be seconds"),
            ({"purge_after_s": 20}, "free_after_s must be at least purge_after_s"),
        ],
    )
    def test_out_of_range(self, limits, message):
        with pytest.raises(OptionError, match=message):
            PoolLimits(**limits)

    @pytest.mark.parametrize(
        "make",
        [
            EVERY_POOL["audio"],
            EVERY_POOL["results"],
            lambda **limits: ObjectPool(bytearray, PoolLimits(**limits), object_size=100),
        ],
    )
    def test_too_few_bytes_for_the_initial_size(self, make):
        with pytest.raises(OptionError, match="max_bytes must"):
            make(initial_size=100, max_bytes=1000)

    def test_bytes_bound_the_number_of_objects(self):
        pool = ObjectPool(bytearray, PoolLimits(max_bytes=3500), object_size=1000)
        leases = [pool.acquire() for _ in range(3)]
        with pytest.raises(PoolExhausted):
            pool.acquire()
        assert pool.statistics().reserved_bytes == 3000
        assert len(leases) == 3

    @pytest.mark.parametrize(
        "make", [lambda x: ObjectPool(list, x), AudioBufferPool, TranscriptionResultPool]
    )
    def test_they_are_pool_limits(self, make):
        with pytest.raises(TypeError, match="limits must be PoolLimits, not dict"):
            make({"max_size": 4})


class TestObjectPool:
    @pytest.mark.parametrize("name", ["factory", "reset", "validator", "deleter"])
    def test_not_callable(self, name):
        arguments = {"factory": list, name: 5}
        with pytest.raises(TypeError, match=f"{name} must be callable, not int"):
            ObjectPool(arguments.pop("factory"), **arguments)

    @pytest.mark.parametrize("size", [-1, 0.5, "big"])
    def test_bad_object_size(self, size):
        with pytest.raises(OptionError, match="object_size"):
            ObjectPool(list, object_size=size)

    def test_the_callables_are_called(self):
        calls = []
        pool = ObjectPool(
            lambda: calls.append("factory") or bytearray(),
            reset=lambda _: calls.append("reset"),
            validator=lambda _: calls.append("validator") or True,
            deleter=lambda _: calls.append("deleter"),
        )
        pool.acquire().release()
        pool.acquire().release()
        pool.trim()
        assert calls == ["factory", "reset", "validator", "reset", "deleter"]

    def test_invalid_objects_are_dropped(self):
        dropped = []
        pool = ObjectPool(list, validator=lambda _: False, deleter=dropped.append)
        first = pool.acquire()
        value = first.value
        first.release()
        assert pool.acquire().value is not value
        assert dropped == [value]
        assert pool.statistics().misses == 2

    def test_the_object_used_last_comes_first(self):
        pool = ObjectPool(object)
        first, second = pool.acquire(), pool.acquire()
        value = first.value
        second.release()
        first.release()
        assert pool.acquire().value is value

    @pytest.mark.parametrize("broken", ["factory", "reset", "validator", "deleter"])
    def test_errors_of_callables_are_passed_on_and_leave_it_usable(self, broken):
        fail = False

        def function(name, answer=None):
            def call(*_):
                if fail and name == broken:
                    raise ZeroDivisionError(name)
                return answer() if answer else True

            return call

        pool = ObjectPool(
            function("factory", bytearray),
            reset=function("reset"),
            validator=function("validator"),
            deleter=function("deleter"),
        )
        pool.acquire().release()
        if broken == "factory":
            pool.trim()
        fail = True

        def use():
            pool.acquire().release()
            pool.trim()

        with pytest.raises(ZeroDivisionError, match=broken):
            use()
        fail = False
        assert pool.statistics().in_use == 0
        pool.acquire().release()
        assert pool.statistics().in_use == 0

    @pytest.mark.parametrize("clean", [ObjectPool.trim, ObjectPool.close])
    def test_a_deleter_that_raises_is_called_with_all_objects(self, clean, monkeypatch):
        called = []
        reported = []
        monkeypatch.setattr(sys, "unraisablehook", lambda info: reported.append(info.exc_value))

        def delete(value):
            called.append(value)
            raise ZeroDivisionError(value)

        pool = ObjectPool(itertools.count().__next__, PoolLimits(max_size=4), deleter=delete)
        leases = [pool.acquire() for _ in range(3)]
        for lease in leases:
            lease.release()
        with pytest.raises(ZeroDivisionError, match="0"):
            clean(pool)
        assert called == [0, 1, 2]
        assert [error.args for error in reported] == [(1,), (2,)]
        assert (pool.statistics().idle, pool.statistics().purges) == (0, 3)

    def test_what_was_made_before_the_factory_failed_is_deleted(self):
        deleted = []
        numbers = iter([1, 2])
        with pytest.raises(StopIteration):
            ObjectPool(numbers.__next__, PoolLimits(initial_size=3), deleter=deleted.append)
        gc.collect()
        assert deleted == [1, 2]

    def test_factory_that_returns_none(self):
        with pytest.raises(TypeError, match="factory must return an object"):
            ObjectPool(lambda: None).acquire()

    def test_callables_may_use_the_pool(self):
        pool = ObjectPool(list, reset=lambda _: pool.statistics(), deleter=lambda _: pool.trim())
        pool.acquire().release()
        pool.trim()
        assert pool.statistics().in_use == 0

    def test_value_after_release(self):
        pool = ObjectPool(list)
        lease = pool.acquire()
        lease.release()
        with pytest.raises(HandleError, match="released already"):
            lease.value  # noqa: B018

    def test_close_deletes_idle_objects_at_once_and_others_when_they_return(self):
        dropped = []
        pool = ObjectPool(list, deleter=dropped.append)
        lease, other = pool.acquire(), pool.acquire()
        other.release()
        pool.close()
        assert len(dropped) == 1
        lease.release()
        assert len(dropped) == 2

    def test_collection_of_the_pool_deletes_idle_objects(self):
        dropped = []
        pool = ObjectPool(list, deleter=dropped.append)
        pool.acquire().release()
        del pool
        gc.collect()
        assert len(dropped) == 1

    def test_cycles_through_the_pool_are_collected(self):
        dropped = []

        class Thing:
            pass

        pool = ObjectPool(Thing, deleter=lambda _: dropped.append(True))
        with pool.acquire() as thing:
            thing.pool = pool
        thing.lease = pool.acquire()
        del pool, thing
        gc.collect()
        assert dropped
