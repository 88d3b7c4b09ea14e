"""The pool of C objects: from many threads, when misused, and against a simple model."""

import ctypes
import itertools
import threading

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
from pool_helpers import in_threads

OK, EXHAUSTED, STALE, FOREIGN, IN_USE, INVALID = 0, 1, 3, 4, 5, 6


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
    run = settings(max_examples=60, stateful_step_count=60)
    run_state_machine_as_test(NativePoolModel, settings=run)
