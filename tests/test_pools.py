"""The pools: against simple models, from many threads, across fork, and when misused."""

import ctypes
import gc
import itertools
import math
import os
import pickle
import random
import subprocess
import sys
import sysconfig
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from pool_helpers import in_threads, run_python

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


@pytest.fixture(scope="session")
def built(probe):
    """Where the probe is, for other processes to import it."""
    return Path(probe.__file__).parent


@pytest.fixture(scope="session")
def counter(tmp_path_factory):
    """A library to preload that counts calls of malloc and the like."""
    directory = tmp_path_factory.mktemp("count")
    (directory / "count.c").write_text(COUNTING_MALLOC)
    compiler = (sysconfig.get_config_var("CC") or "cc").split()[0]
    command = [compiler, "-shared", "-fPIC", "-O2", "-o", "count.so", "count.c"]
    subprocess.run(command, cwd=directory, check=True)
    return directory / "count.so"


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


class TestNativePool:
    @pytest.mark.parametrize(
        "arguments", [(0, 10), (2**40, 10), (8, 0), (8, 2**19 + 1), (8, 10, 11)]
    )
    def test_bad_sizes(self, probe, arguments):
        with pytest.raises(ValueError, match=str(INVALID)):
            probe.Pool(*arguments)

    def test_objects_are_zeroed_aligned_and_apart(self, probe):
        pool = probe.Pool(24, 5000)
        addresses = []
        for _ in range(5000):
            status, handle, address = pool.acquire()
            assert status == OK
            assert handle != 0
            assert address % 16 == 0
            assert ctypes.string_at(address, 24) == bytes(24)
            ctypes.memset(address, 255, 24)
            addresses.append(address)
        addresses.sort()
        assert all(b - a >= 24 for a, b in itertools.pairwise(addresses))
        assert pool.acquire()[0] == EXHAUSTED

    def test_bad_handles_change_nothing(self, probe):
        pool, other = probe.Pool(8, 100), probe.Pool(8, 100)
        _, handle, address = pool.acquire()
        foreign = other.acquire()[1]
        assert pool.release(foreign) == FOREIGN
        assert other.release(handle) == FOREIGN
        assert pool.get(foreign) == 0
        for wrong in (0, 2**64 - 1, handle + 2**32, handle - 2**32, handle + 1, handle ^ 99):
            assert pool.release(wrong) in {STALE, FOREIGN}
            assert pool.get(wrong) == 0
        assert pool.get(handle) == address
        assert pool.use()[0] == 1
        assert pool.release(handle) == OK
        assert pool.release(handle) == STALE
        assert pool.get(handle) == 0

    def test_free_refuses_while_something_is_leased(self, probe):
        pool = probe.Pool(8, 100)
        handle = pool.acquire()[1]
        assert pool.free() == IN_USE
        assert pool.release(handle) == OK
        assert pool.free() == OK

    @pytest.mark.parametrize("overflow", [False, True])
    @pytest.mark.parametrize("limit", [50, 100_000])
    def test_threads_without_the_gil(self, probe, limit, overflow):
        pool = probe.Pool(24, limit, overflow=overflow)
        stop = threading.Event()

        def trim():
            while not stop.is_set():
                pool.trim()

        trimmer = threading.Thread(target=trim)
        trimmer.start()
        try:
            errors = in_threads(6, lambda i: pool.churn(2**40 * (i + 1), 3000))
        finally:
            stop.set()
            trimmer.join()
        assert sum(errors) == 0
        assert pool.use()[0] == 0

    def test_objects_handed_between_threads(self, probe):
        pool = probe.Pool(8, 100_000)
        handles = [pool.acquire()[1] for _ in range(20_000)]
        assert sum(in_threads(4, lambda _: pool.release_all(handles))) == len(handles)
        assert pool.use()[0] == 0

    def test_a_thread_that_ends_leaves_nothing_behind(self, probe):
        pool = probe.Pool(8, 2000)
        for _ in range(200):
            thread = threading.Thread(target=pool.churn, args=(1, 10))
            thread.start()
            thread.join()
        # Magazines of 200 threads hold more than the pool. Those of the last few threads may still
        # be full: join returns a little before a thread's destructors have run.
        taken = [pool.acquire()[0] for _ in range(2000)]
        assert taken.count(OK) > 1000

    def test_trim_reaches_other_threads_at_their_next_release(self, probe):
        pool = probe.Pool(1024, 4096)
        ready, trimmed = threading.Event(), threading.Event()

        def use():
            pool.churn(1, 10)
            ready.set()
            trimmed.wait()
            pool.churn(1, 1)
            ready.set()
            trimmed.wait()

        thread = threading.Thread(target=use)
        thread.start()
        ready.wait()
        pool.trim()
        ready.clear()
        trimmed.set()
        ready.wait()
        thread.join()
        pool.trim()
        assert pool.use() == (0, 0)

    def test_many_pools_over_time(self, probe):
        for _ in range(5000):
            pool = probe.Pool(8, 4096)
            handle = pool.acquire()[1]
            assert pool.release(handle) == OK
            assert pool.free() == OK


@pytest.mark.skipif(sys.platform != "linux", reason="replaces functions of glibc")
@pytest.mark.skipif("SPEECHRNT_BUILD" in os.environ, reason="as sanitizers do")
class TestAllocations:
    """A warm acquire and release takes no memory from the system, over a million rounds."""

    def test_in_c(self, built, counter):
        out = run_python(
            """
            import ctypes
            import pool_probe
            from speechrnt.pools import AudioBufferPool
            count = ctypes.CDLL(None).allocations
            count.restype = ctypes.c_long
            address = ctypes.cast(count, ctypes.c_void_p).value
            large, small = pool_probe.Pool(64, 4096), pool_probe.Pool(64, 10)
            pools = [AudioBufferPool(), large, small, pool_probe.Results()]
            assert sum(pool_probe.calls_during(address, pool, 1) for pool in pools) > 0
            print(*(pool_probe.calls_during(address, pool, 1_000_000) for pool in pools))
            """,
            path=[built],
            LD_PRELOAD=str(counter),
        )
        assert out.split() == ["0"] * 4

    def test_in_python(self, counter):
        out = run_python(
            """
            import ctypes
            from speechrnt.pools import AudioBufferPool, ObjectPool, TranscriptionResultPool
            count = ctypes.CDLL(None).allocations
            count.restype = ctypes.c_long
            audio, objects, results = AudioBufferPool(), ObjectPool(set), TranscriptionResultPool()

            def go(rounds):
                before = count()
                for _ in range(rounds):
                    audio.acquire(480_000).release()
                yield count() - before
                before = count()
                for _ in range(rounds):
                    objects.acquire().release()
                yield count() - before
                before = count()
                for _ in range(rounds):
                    results.acquire().release()
                yield count() - before
                before = count()
                for _ in range(rounds // 10):
                    with objects.acquire(), audio.acquire(1) as buffer, results.acquire() as result:
                        buffer.array
                        result.tokens = (1, 2, 3)
                yield count() - before

            assert sum(go(1000)) > 0
            print(*go(1_000_000))
            """,
            LD_PRELOAD=str(counter),
        )
        # Leases and views come from free lists of Python.
        assert out.split() == ["0"] * 4


COUNTING_MALLOC = """
#define _GNU_SOURCE
#include <errno.h>
#include <stdatomic.h>
#include <stddef.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>
void *__libc_malloc(size_t); void *__libc_calloc(size_t, size_t);
void *__libc_realloc(void *, size_t); void *__libc_memalign(size_t, size_t);
static atomic_long calls;
static void count(void) { atomic_fetch_add(&calls, 1); }
long allocations(void) { return atomic_load(&calls); }
void *malloc(size_t n) { count(); return __libc_malloc(n); }
void *calloc(size_t n, size_t m) { count(); return __libc_calloc(n, m); }
void *realloc(void *p, size_t n) { count(); return __libc_realloc(p, n); }
void *memalign(size_t a, size_t n) { count(); return __libc_memalign(a, n); }
void *aligned_alloc(size_t a, size_t n) { count(); return __libc_memalign(a, n); }
int posix_memalign(void **p, size_t a, size_t n) {
    count(); *p = __libc_memalign(a, n); return *p ? 0 : ENOMEM;
}
void *mmap(void *at, size_t n, int prot, int flags, int fd, off_t offset) {
    count(); return (void *)syscall(SYS_mmap, at, n, prot, flags, fd, offset);
}
void *mmap64(void *at, size_t n, int prot, int flags, int fd, off_t offset) {
    return mmap(at, n, prot, flags, fd, offset);
}
"""


def test_the_interpreter_exits_with_leases_and_arrays_alive():
    run_python(
        """
        import threading, time
        from speechrnt.pools import AudioBufferPool, ObjectPool, TranscriptionResultPool
        audio, results = AudioBufferPool(), TranscriptionResultPool()
        objects = ObjectPool(bytearray, deleter=bytearray.clear)
        leases = [audio.acquire(480_000), results.acquire(), objects.acquire()]
        array = audio.acquire(100).array
        cycle = [leases, array]
        cycle.append(cycle)

        def use():
            while True:
                audio.acquire(100).array[:] = 1
                results.acquire().text = "text"
                objects.acquire().release()

        for _ in range(2):
            threading.Thread(target=use, daemon=True).start()
        time.sleep(0.1)
        """
    )


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
class TestFork:
    def test_the_child_goes_on(self, built):
        run_python(
            """
            import os, threading, warnings
            import pool_probe
            from speechrnt.pools import AudioBufferPool, ObjectPool, TranscriptionResultPool
            warnings.simplefilter("ignore", DeprecationWarning)  # that threads are running: yes
            native = pool_probe.Pool(64, 2000)
            pools = [ObjectPool(bytearray), TranscriptionResultPool()]
            audio = AudioBufferPool()
            stop = threading.Event()

            def churn(i):
                while not stop.is_set():
                    native.churn(i, 10)
                    audio.acquire(100).release()
                    for pool in pools:
                        pool.acquire().release()

            threads = [threading.Thread(target=churn, args=(i,)) for i in range(4)]
            for thread in threads:
                thread.start()
            with audio.acquire(1000, zero=True) as buffer:
                for _ in range(20):
                    child = os.fork()
                    if child == 0:
                        buffer.array[:] = 1
                        native.trim()
                        audio.trim()
                        assert native.churn(9, 100) == 0
                        for pool in (*pools,):
                            pool.acquire().release()
                            pool.trim()
                        audio.acquire(1000).release()
                        os._exit(0)
                    _, status = os.waitpid(child, 0)
                    assert status == 0, status
                assert not buffer.array.any()
            stop.set()
            for thread in threads:
                thread.join()
            assert native.churn(1, 10) == 0
            """,
            path=[built],
        )

    def test_the_child_takes_back_what_idle_threads_had_cached(self, built):
        run_python(
            """
            import os, threading, warnings
            import pool_probe
            warnings.simplefilter("ignore", DeprecationWarning)
            pool = pool_probe.Pool(8, 1024)
            ready, stop = threading.Barrier(5), threading.Event()

            def use():
                pool.churn(1, 10)
                ready.wait()
                stop.wait()

            threads = [threading.Thread(target=use) for _ in range(4)]
            for thread in threads:
                thread.start()
            ready.wait()
            child = os.fork()
            if child == 0:
                os._exit([pool.acquire()[0] for _ in range(1024)] != [0] * 1024)
            _, status = os.waitpid(child, 0)
            stop.set()
            assert status == 0
            """,
            path=[built],
        )


class NativePoolModel(RuleBasedStateMachine):
    """A pool of C objects against a dict of what each handle's object should hold."""

    LIMIT = 40

    def __init__(self):
        super().__init__()
        self.pool = self.probe.Pool(8, self.LIMIT, overflow=True)
        self.live = {}
        self.dead = []
        self.count = 0

    @rule()
    def acquire(self):
        status, handle, address = self.pool.acquire()
        assert status == (OK if len(self.live) < 2 * self.LIMIT else EXHAUSTED)
        if status == OK:
            assert handle not in self.live
            assert handle not in self.dead
            self.count += 1
            ctypes.c_uint64.from_address(address).value = self.count
            self.live[handle] = self.count

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def release(self, data):
        handle = data.draw(st.sampled_from(list(self.live)))
        assert self.pool.release(handle) == OK
        del self.live[handle]
        self.dead.append(handle)

    @precondition(lambda self: self.dead)
    @rule(data=st.data())
    def release_again(self, data):
        assert self.pool.release(data.draw(st.sampled_from(self.dead))) == STALE

    @rule()
    def trim(self):
        self.pool.trim()

    @rule(n=st.integers(2, 30))
    def acquire_many(self, n):
        for _ in range(n):
            self.acquire()

    @invariant()
    def objects_hold_what_was_written(self):
        for handle, value in self.live.items():
            assert ctypes.c_uint64.from_address(self.pool.get(handle)).value == value
        assert all(self.pool.get(handle) == 0 for handle in self.dead)
        assert self.pool.use()[0] == len(self.live)

    def teardown(self):
        for handle in self.live:
            assert self.pool.release(handle) == OK


def test_native_pool_model(probe):
    NativePoolModel.probe = probe
    run = settings(max_examples=60, stateful_step_count=60, deadline=None)
    run_state_machine_as_test(NativePoolModel, settings=run)
