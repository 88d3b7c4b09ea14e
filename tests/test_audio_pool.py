"""The pool of audio buffers: memory, arrays, aliasing, and a model of it."""

import gc
import os
import queue
import random
import sys
import threading
from pathlib import Path

import numpy as np
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
    PoolLimits,
)

HERE = Path(__file__).parent
STALE, FOREIGN = 3, 4
KIB, MIB = 2**10, 2**20
THIRTY_SECONDS = 480_000
WINDOW = 15 * MIB // 8  # the class of that length in float32


class TestAudioBufferPool:
    @pytest.mark.parametrize("n_samples", [0, -1, -(10**30), 2**29 + 1, 10**30])
    def test_bad_length(self, n_samples):
        pool = AudioBufferPool()
        for function in (pool.acquire, lambda n: pool.reserve(n, 1)):
            with pytest.raises(OptionError, match="n_samples must be from 1 to"):
                function(n_samples)
        assert pool.statistics().in_use == 0

    @pytest.mark.parametrize("n_samples", [1.5, "1", None])
    def test_length_of_the_wrong_type(self, n_samples):
        with pytest.raises(TypeError):
            AudioBufferPool().acquire(n_samples)

    @pytest.mark.parametrize(
        "dtype", ["float64", ">f4", "(1e,)f4", np.complex64, "sound", None, 7, np.zeros(2)]
    )
    def test_bad_dtype(self, dtype):
        with pytest.raises(OptionError, match="dtype must be float32 or int16"):
            AudioBufferPool().acquire(1, dtype)

    @pytest.mark.parametrize("count", [0, -1, 10**9, 1.0])
    def test_bad_count(self, count):
        with pytest.raises(OptionError, match="count must be from 1"):
            AudioBufferPool().reserve(1, count)

    @pytest.mark.parametrize("dtype", ["float32", "int16", np.float32, np.int16, np.dtype("i2")])
    def test_array(self, dtype):
        with AudioBufferPool().acquire(1000, dtype) as buffer:
            array = buffer.array
            assert array is buffer.array
            assert array.shape == (1000,)
            assert array.dtype == np.dtype(dtype)
            assert array.flags.writeable
            array[:] = 7
            view = memoryview(buffer)
            assert view.shape == (1000,)
            assert view[999] == 7
            assert not view.readonly

    @pytest.mark.parametrize(
        ("n_samples", "size"),
        [
            (1, 64 * KIB),
            (16 * KIB, 64 * KIB),
            (16 * KIB + 1, 256 * KIB),
            (64 * KIB + 1, MIB),
            (256 * KIB + 1, WINDOW),
            (THIRTY_SECONDS, WINDOW),
            (WINDOW // 4, WINDOW),
            (WINDOW // 4 + 1, 2 * WINDOW),
            (5 * MIB, 11 * WINDOW),
        ],
    )
    def test_size_classes_and_alignment(self, n_samples, size):
        pool = AudioBufferPool()
        buffer = pool.acquire(n_samples)
        assert pool.statistics().reserved_bytes == size
        assert buffer.array.ctypes.data % (64 * KIB) == 0

    def test_zero(self):
        pool = AudioBufferPool()
        with pool.acquire(1000) as buffer:
            buffer.array[:] = 1
        with pool.acquire(1000) as buffer:
            assert buffer.array.all()
        with pool.acquire(1000, zero=True) as buffer:
            assert not buffer.array.any()

    def test_the_buffer_used_last_comes_first(self):
        pool = AudioBufferPool()
        first, second = pool.acquire(10), pool.acquire(10)
        address = first.array.ctypes.data
        second.release()
        first.release()
        assert pool.acquire(10).array.ctypes.data == address

    def test_lengths_and_types_share_a_buffer(self):
        pool = AudioBufferPool()
        for n_samples, dtype in [(10, "float32"), (16000, "float32"), (30000, "int16"), (3, "i2")]:
            with pool.acquire(n_samples, dtype) as buffer:
                assert buffer.array.shape == (n_samples,)
                assert buffer.array.dtype == dtype
                buffer.array[:] = 1
        assert pool.statistics().misses == 1

    @pytest.mark.parametrize(
        "refer",
        [
            lambda buffer: buffer.array,
            lambda buffer: buffer.array[100:200],
            lambda buffer: buffer.array[::-2].reshape(5, -1).T,
            lambda buffer: buffer.array.view(np.int32).view(np.float32),
            lambda buffer: np.asarray(buffer),
            lambda buffer: np.frombuffer(buffer, np.float32, 50),
            lambda buffer: np.frombuffer(memoryview(buffer)[10:90], np.float32),
            lambda buffer: np.frombuffer(memoryview(buffer.array.base.base), np.float32, 100),
            lambda buffer: np.asarray(memoryview(memoryview(buffer.array.base))),
        ],
    )
    @pytest.mark.parametrize(
        "release", [AudioBuffer.release, lambda buffer: buffer.__exit__(None, None, None)]
    )
    def test_memory_that_is_referred_to_is_not_lent(self, refer, release):
        pool = AudioBufferPool()
        buffer = pool.acquire(1000)
        buffer.array[:] = 1
        reference = refer(buffer)
        release(buffer)
        assert (pool.statistics().kept, pool.statistics().in_use) == (1, 1)
        for _ in range(3):
            with pool.acquire(1000) as other:
                other.array[:] = 2
        assert (reference[:1000] == 1).all()
        del reference
        assert pool.statistics().in_use == 0
        assert pool.statistics().idle == 2

    # NumPy 2.5 would rather not, but lets them.
    @pytest.mark.filterwarnings("ignore:Setting the shape:DeprecationWarning")
    def test_what_a_user_does_to_the_array_ends_with_it(self):
        pool = AudioBufferPool()
        buffer = pool.acquire(1000)
        buffer.array.flags.writeable = False
        buffer.array.shape = (10, 100)
        buffer.release()
        with pool.acquire(1000) as buffer:
            assert buffer.array.shape == (1000,)
            buffer.array[:] = 1
        assert pool.statistics().misses == 1

    def test_arrays_outlive_lease_and_pool(self):
        array = AudioBufferPool().acquire(1000).array
        gc.collect()
        array[:] = 5
        assert array.sum() == 5000

    def test_array_after_release(self):
        buffer = AudioBufferPool().acquire(10)
        buffer.release()
        with pytest.raises(HandleError):
            buffer.array  # noqa: B018
        with pytest.raises(HandleError):
            memoryview(buffer)

    def test_at_the_limit_in_bytes_idle_buffers_of_other_sizes_make_room(self):
        pool = AudioBufferPool(PoolLimits(max_bytes=4 * MIB))
        for _ in range(2):
            leases = [pool.acquire(16 * KIB) for _ in range(64)]
            with pytest.raises(PoolExhausted, match=f"{4 * MIB} bytes"):
                pool.acquire(1)
            del leases
            leases = [pool.acquire(THIRTY_SECONDS) for _ in range(2)]
            assert pool.statistics().reserved_bytes == 4 * MIB
            del leases
        with pytest.raises(PoolExhausted):
            pool.acquire(2 * MIB)
        assert pool.statistics().idle_bytes == 4 * MIB

    def test_idle_memory_goes_in_two_stages(self):
        pool = AudioBufferPool(PoolLimits(soft_size=0))
        pool.maintain(0.0)
        with pool.acquire(THIRTY_SECONDS) as buffer:
            buffer.array[:] = 1
        pool.maintain(0.5)
        assert pool.statistics().purges == 0
        pool.maintain(1.0)
        pool.maintain(2.0)
        assert (pool.statistics().purges, pool.statistics().idle_bytes) == (1, WINDOW)
        with pool.acquire(THIRTY_SECONDS) as buffer:
            buffer.array[:] = 2
            assert buffer.array.all()
        pool.maintain(12.0)
        assert (pool.statistics().purges, pool.statistics().idle_bytes) == (2, 0)

    def test_soft_bytes_is_what_clean_up_leaves_at_most(self):
        pool = AudioBufferPool(PoolLimits(soft_bytes=3 * MIB))
        for n_samples in (THIRTY_SECONDS, 1):
            leases = [pool.acquire(n_samples) for _ in range(10)]
            del leases
        pool.maintain(0.0)
        pool.maintain(10.0)
        statistics = pool.statistics()
        assert statistics.idle_bytes == 10 * 64 * KIB + WINDOW

    def test_reserve(self):
        pool = AudioBufferPool(PoolLimits(max_bytes=10 * MIB))
        pool.reserve(THIRTY_SECONDS, 3)
        pool.reserve(THIRTY_SECONDS, 2)
        pool.trim()
        assert pool.statistics().idle_bytes == 3 * WINDOW
        with pytest.raises(PoolExhausted):
            pool.reserve(THIRTY_SECONDS, 6)
        pool.trim()
        assert pool.statistics().idle_bytes == 3 * WINDOW

    def test_close_frees_what_is_idle_or_reserved_and_then_what_is_released(self, probe):
        pool = AudioBufferPool(PoolLimits(initial_size=3))
        leases = [pool.acquire(THIRTY_SECONDS), pool.acquire(100)]
        array = leases[0].array
        pool.close()
        assert pool.statistics().idle == 0
        with pytest.raises(PoolClosedError):
            pool.reserve(1, 1)
        del leases
        assert (pool.statistics().in_use, pool.statistics().idle_bytes) == (1, 0)
        array[:] = 1
        del array
        assert pool.statistics().reserved_bytes == 0
        assert probe.audio_churn(pool, 1, 1) == 0  # its acquires fail, too
        assert pool.statistics().misses == 1

    @pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
    def test_reserved_buffers_are_in_memory(self):
        out = run_python(
            """
            from memory_helpers import pages_not_in_memory
            from speechrnt.pools import AudioBufferPool, PoolLimits

            def missing(pool):
                buffers = [pool.acquire(480_000) for _ in range(8)]
                arrays = [buffer.array for buffer in buffers]
                return sum(pages_not_in_memory(each.ctypes.data, each.nbytes) for each in arrays)

            print(missing(AudioBufferPool(PoolLimits(initial_size=8))), missing(AudioBufferPool()))
            """,
            path=[HERE],
        )
        missing, missing_if_not_reserved = map(int, out.split())
        assert missing == 0
        assert missing_if_not_reserved > 0

    @pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
    @pytest.mark.skipif("SPEECHRNT_BUILD" in os.environ, reason="sanitizers add memory of theirs")
    def test_what_is_cleaned_up_is_the_systems_again(self):
        out = run_python(
            """
            from memory_helpers import anonymous_bytes
            from speechrnt.pools import AudioBufferPool

            pool = AudioBufferPool()
            before = anonymous_bytes()
            buffers = [pool.acquire(480_000) for _ in range(40)]
            for buffer in buffers:
                buffer.array.fill(1)
            full = anonymous_bytes() - before
            del buffers[10:], buffer
            pool.trim()
            assert all((buffer.array == 1).all() for buffer in buffers)
            print(full, anonymous_bytes() - before)
            """,
            path=[HERE],
        )
        full, left = (int(size) / MIB for size in out.split())
        assert 40 * 1.83 <= full < 40 * 1.9 + 4
        assert 10 * 1.83 <= left < 10 * 1.9 + 4

    @pytest.mark.skipif(sys.platform != "linux", reason="not all systems heed the limit")
    def test_where_addresses_are_limited(self):
        run_python(
            """
            import resource
            import numpy as np
            from speechrnt.pools import AudioBufferPool, PoolLimits
            with open("/proc/self/statm") as file:
                size = int(file.read().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (size + 2**28, size + 2**28))
            pool = AudioBufferPool(PoolLimits(max_bytes=2**40))
            leases = [pool.acquire(480_000) for _ in range(16)]
            for lease in leases:
                lease.array.fill(1)
            """
        )

    @pytest.mark.skipif(sys.platform != "linux", reason="not all systems heed the limit")
    def test_where_addresses_end(self):
        run_python(
            """
            import resource
            from speechrnt.errors import PoolExhausted
            from speechrnt.pools import AudioBufferPool
            pool = AudioBufferPool()
            with open("/proc/self/statm") as file:
                size = int(file.read().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (size + 2**25, size + 2**25))
            try:
                AudioBufferPool()
            except PoolExhausted as error:
                assert "no memory left" in str(error)
            else:
                raise AssertionError
            pool.acquire(480_000).array.fill(1)
            """
        )

    def test_raw_handles(self, probe):
        pool = AudioBufferPool()
        for handle in (0, 1, 2**64 - 1, 1 << 32, 3 << 32 | 1):
            assert probe.audio_release(pool, handle) in {STALE, FOREIGN}
        assert pool.statistics().in_use == 0

    def test_threads_without_the_gil(self, probe):
        pool = AudioBufferPool(PoolLimits(max_size=20, max_bytes=32 * MIB, overflow="allocate"))
        stop = threading.Event()

        def clean():
            now = 0.0
            while not stop.is_set():
                pool.maintain(now)
                pool.trim()
                now += 3

        cleaner = threading.Thread(target=clean)
        cleaner.start()
        try:
            errors = in_threads(4, lambda i: probe.audio_churn(pool, 2**40 * (i + 1), 500))
        finally:
            stop.set()
            cleaner.join()
        assert sum(errors) == 0
        assert pool.statistics().in_use == 0

    def test_streams_do_not_see_each_other(self):
        pool = AudioBufferPool()
        received = queue.SimpleQueue()

        def stream(i):
            chance = random.Random(i)
            mine = []
            for _ in range(300):
                buffer = pool.acquire(chance.choice([100, 40_000]))
                buffer.array[:] = i
                if chance.random() < 0.3:
                    mine.append(buffer.array[10:20])
                if chance.random() < 0.3:
                    received.put((i, buffer))
                else:
                    buffer.release()
                if chance.random() < 0.3 and not received.empty():
                    owner, other = received.get()
                    assert (other.array == owner).all()
                    other.release()
                del mine[:-3]
                assert all((array == i).all() for array in mine)

        in_threads(4, stream)
        while not received.empty():
            received.get()
        gc.collect()
        assert pool.statistics().in_use == 0


class TestMemoryFromElsewhere:
    @pytest.fixture
    def memory(self, probe):
        """A capsule, and a function that returns the calls and bytes since the test began."""
        before = probe.memory_counts()

        def since():
            now = probe.memory_counts()
            return tuple(now[i] - before[i] for i in range(3))

        yield probe.counted_memory(), since
        probe.refuse_memory(False)

    def test_all_of_it_is_taken_and_given_back_there(self, memory):
        capsule, since = memory
        pool = AudioBufferPool(PoolLimits(initial_size=2), memory=capsule)
        leases = [pool.acquire(THIRTY_SECONDS) for _ in range(3)]
        for lease in leases:
            lease.array.fill(1)
        assert since()[:2] == (3, 0)
        del lease, leases
        pool.trim()
        assert since()[:2] == (3, 1)
        del pool
        assert since() == (3, 3, 0)

    def test_overflow_too(self, memory):
        capsule, since = memory
        pool = AudioBufferPool(PoolLimits(max_size=1, overflow="allocate"), memory=capsule)
        leases = [pool.acquire(100), pool.acquire(100)]
        assert since()[:2] == (2, 0)
        leases.pop().release()
        assert since()[:2] == (2, 1)

    def test_arrays_hold_on_to_it(self, memory):
        capsule, since = memory
        pool = AudioBufferPool(memory=capsule)
        del capsule
        array = pool.acquire(100).array
        del pool
        gc.collect()
        array[:] = 1
        assert since()[1] == 0
        del array
        assert since() == (1, 1, 0)

    def test_its_pages_are_not_advised_upon(self, memory):
        pool = AudioBufferPool(PoolLimits(soft_size=0), memory=memory[0])
        pool.maintain(0.0)
        pool.acquire(THIRTY_SECONDS).release()
        pool.maintain(5.0)
        assert (pool.statistics().purges, pool.statistics().idle) == (0, 1)
        pool.maintain(10.0)
        assert (pool.statistics().purges, pool.statistics().idle) == (1, 0)

    def test_when_there_is_none_left_the_pool_stays_usable(self, probe, memory):
        capsule, since = memory
        pool = AudioBufferPool(memory=capsule)
        pool.acquire(100).release()
        probe.refuse_memory(True)
        with pytest.raises(PoolExhausted, match="no memory left"):
            pool.acquire(THIRTY_SECONDS)
        with pytest.raises(PoolExhausted, match="no memory left"):
            pool.reserve(THIRTY_SECONDS, 1)
        with pytest.raises(PoolExhausted, match="no memory left"):
            AudioBufferPool(PoolLimits(initial_size=2), memory=capsule)
        pool.acquire(100).release()
        statistics = pool.statistics()
        assert (statistics.in_use, statistics.idle, statistics.misses) == (0, 1, 1)
        probe.refuse_memory(False)
        pool.acquire(THIRTY_SECONDS).release()
        del pool
        assert since()[2] == 0

    def test_threads_without_the_gil(self, probe, memory):
        capsule, since = memory
        pool = AudioBufferPool(PoolLimits(max_size=12, overflow="allocate"), memory=capsule)
        errors = in_threads(4, lambda i: probe.audio_churn(pool, 2**40 * (i + 1), 300))
        assert sum(errors) == 0
        assert pool.statistics().in_use == 0
        pool.trim()
        assert since()[2] == 0

    @pytest.mark.parametrize("wrong", [5, "pinned", object()])
    def test_something_else(self, wrong):
        with pytest.raises(OptionError, match=r"must be a capsule named 'speechrnt\.sr_memory'"):
            AudioBufferPool(memory=wrong)

    def test_another_capsule(self, probe):
        with pytest.raises(OptionError, match="must be a capsule named"):
            AudioBufferPool(memory=probe.counted_memory(b"speechrnt.other"))

    def test_a_missing_function(self, probe):
        with pytest.raises(OptionError, match="must have both of its functions"):
            AudioBufferPool(memory=probe.counted_memory(whole=False))


class AudioPoolModel(RuleBasedStateMachine):
    """A pool of audio buffers against lists of what the buffers and arrays should hold."""

    LIMIT = 3 * MIB

    def __init__(self):
        super().__init__()
        self.pool = AudioBufferPool(PoolLimits(max_bytes=self.LIMIT, max_size=12))
        self.leases = []  # (buffer, value)
        self.arrays = []  # (array, value), of buffers that are released
        self.count = 0
        self.now = 0.0

    @rule(n_samples=st.sampled_from([1, 16 * KIB, 16 * KIB + 1, 200 * KIB]), dtype=st.booleans())
    def acquire(self, n_samples, dtype):
        try:
            buffer = self.pool.acquire(n_samples, "int16" if dtype else "float32")
        except PoolExhausted:
            assert self.pool.statistics().in_use > 0
            return
        self.count = (self.count + 1) % 1000
        buffer.array[:] = self.count
        self.leases.append((buffer, self.count))

    @precondition(lambda self: self.leases)
    @rule(data=st.data(), keep=st.booleans())
    def release(self, data, keep):
        index = data.draw(st.integers(0, len(self.leases) - 1))
        buffer, value = self.leases.pop(index)
        if keep:
            self.arrays.append((buffer.array[-1:], value))
        buffer.release()

    @precondition(lambda self: self.arrays)
    @rule()
    def drop_array(self):
        self.arrays.pop()

    @rule()
    def trim(self):
        self.pool.trim()
        assert self.pool.statistics().idle == 0

    @rule(seconds=st.floats(0, 15))
    def maintain(self, seconds):
        self.now += seconds
        self.pool.maintain(self.now)

    @invariant()
    def memory_is_nobody_elses(self):
        for buffer, value in self.leases:
            assert (buffer.array == value).all()
        for array, value in self.arrays:
            assert (array == value).all()
        statistics = self.pool.statistics()
        assert statistics.in_use == len(self.leases) + len(self.arrays)
        assert statistics.reserved_bytes <= self.LIMIT
        assert statistics.in_use + statistics.idle <= 12


def test_audio_pool_model():
    run = settings(max_examples=40, stateful_step_count=40)
    run_state_machine_as_test(AudioPoolModel, settings=run)
