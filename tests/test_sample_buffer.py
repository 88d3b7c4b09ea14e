"""The latest samples of a stream: like a plain array, in as much memory as they need."""

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from speechrnt.pools import AudioBufferPool
from speechrnt.sample_buffer import SampleBuffer

HALF_SECOND = 8192


class Comparison(RuleBasedStateMachine):
    """The buffer does what an array of all samples does."""

    def __init__(self):
        super().__init__()
        self.pool = AudioBufferPool()
        self.buffer = SampleBuffer(self.pool)
        self.all = np.empty(0, np.float32)
        self.start = 0
        self.is_compact = False

    @rule(size=st.one_of(st.integers(0, 1000), st.integers(0, 50_000)))
    def append(self, size):
        samples = np.arange(len(self.all), len(self.all) + size, dtype=np.float32)
        self.buffer.append(samples)
        self.all = np.concatenate([self.all, samples])
        self.is_compact = False

    @rule(data=st.data())
    def discard(self, data):
        before = data.draw(st.integers(0, len(self.all) + 10))
        self.buffer.discard(before)
        self.start = max(self.start, min(before, len(self.all)))

    @rule(data=st.data())
    def view(self, data):
        start = data.draw(st.integers(self.start, len(self.all)))
        end = data.draw(st.integers(start, len(self.all)))
        assert np.array_equal(self.buffer.view(start, end), self.all[start:end])

    @rule()
    def compact(self):
        self.buffer.compact()
        assert self.buffer.nbytes == 4 * (len(self.all) - self.start)

    @rule()
    def release(self):
        self.buffer.release()
        self.start = len(self.all)
        assert self.buffer.nbytes == 0

    @invariant()
    def holds_what_it_should(self):
        kept = len(self.all) - self.start
        assert (self.buffer.start, self.buffer.end) == (self.start, len(self.all))
        assert np.array_equal(self.buffer.view(self.start, len(self.all)), self.all[self.start :])
        assert self.buffer.nbytes <= 4 * 4 * max(kept, HALF_SECOND)
        assert self.pool.statistics().in_use == (len(self.buffer._array) > HALF_SECOND)

    def teardown(self):
        self.buffer.release()
        assert self.pool.statistics().in_use == 0
        self.pool.close()


TestComparison = Comparison.TestCase
TestComparison.settings = settings(max_examples=30, stateful_step_count=30)


@pytest.fixture
def buffer():
    return SampleBuffer(AudioBufferPool())


class TestSampleBuffer:
    def test_samples_outside_are_an_error(self, buffer):
        buffer.append(np.zeros(100, np.float32))
        buffer.discard(50)
        for start, end in ((49, 60), (60, 101), (80, 70)):
            with pytest.raises(IndexError, match="50 to 100"):
                buffer.view(start, end)

    def test_an_endless_silence_takes_constant_memory(self, buffer):
        sizes = set()
        for end in range(1600, 1_600_000, 1600):
            buffer.append(np.zeros(1600, np.float32))
            buffer.discard(end - 4800)
            sizes.add(buffer.nbytes)
        assert sizes == {4 * HALF_SECOND}

    def test_a_pool_without_memory_changes_nothing(self, buffer):
        buffer.append(np.ones(100, np.float32))
        buffer._pool.close()
        with pytest.raises(Exception, match="closed"):
            buffer.append(np.ones(100_000, np.float32))
        assert np.array_equal(buffer.view(0, 100), np.ones(100, np.float32))
        buffer.append(np.ones(100, np.float32))
        assert buffer.end == 200
