"""A fault at every call of the driver: nothing leaks, nothing breaks, and the pool goes on."""

import gc
import random

import pytest

from speechrnt.errors import GpuError, GpuOutOfMemory, SpeechRNTError
from speechrnt.gpu import GpuMemoryPool

MIB = 2**20
CHUNK = 2 * MIB


class Trace:
    """A fixed series of operations that brings a pool to all that it can do."""

    def __init__(self, backing):
        self.backing = backing
        self.errors = []
        self.pool = None

    def attempt(self, function, *arguments, **options):
        try:
            return function(*arguments, **options)
        except SpeechRNTError as error:
            self.errors.append(type(error))  # not the error, which refers to everything
            return None

    def run(self):
        pool = self.pool = self.attempt(
            GpuMemoryPool, limit=24 * MIB, chunk=CHUNK, backing=self.backing, initial=3 * MIB
        )
        if pool is None:
            return
        streams = [self.attempt(pool.stream) for _ in range(2)]
        rng = random.Random(5)
        blocks = []
        for step in range(60):
            if blocks and rng.random() < 0.45:
                block = blocks.pop(rng.randrange(len(blocks)))
                stream = rng.choice([None, *streams])
                if stream is None:
                    block.free()
                else:
                    block.free_on(stream)
            else:
                size = rng.choice([1000, 300_000, CHUNK, 3 * CHUNK])
                block = self.attempt(pool.allocate, size, stream=rng.choice([None, *streams]))
                if block is not None:
                    blocks.append(block)
            if step % 30 == 20 and blocks:
                small = min(blocks, key=lambda block: block.nbytes)
                self.attempt(small.copy_from, bytes(small.nbytes))
                del small
            if step % 30 == 25:
                self.attempt(pool.trim, 4 * MIB)
            if step % 30 == 28:
                self.attempt(pool.defragment)
        # Every other chunk free, and a request for more than any of them.
        while blocks:
            blocks.pop().free()
        held = [self.attempt(pool.allocate, CHUNK) for _ in range(10)]
        del held[::2]
        self.attempt(pool.allocate, 3 * CHUNK)
        self.attempt(pool.flush, 0)

    def end(self):
        """Close and drop the pool; what one refusal of the driver prevents is tried again."""
        if self.pool is not None:
            self.attempt(self.pool.close)
            self.attempt(self.pool.close)
        self.pool = None


def run_with_fault(double, backing, n, code):
    """The trace with its n-th call failing; whether there were that many."""
    trace = Trace(backing)
    with double.failing(n=n, code=code):
        trace.run()
        if trace.pool is not None:
            # A pool that could be made lends again, and its numbers add up.
            now = trace.pool.statistics()
            assert now.in_use + now.pending + now.free <= now.reserved <= now.limit
        hit = not double.fault_pending()
        trace.end()
    return hit


@pytest.mark.parametrize("backing", ["vmm", "segments"])
@pytest.mark.parametrize("code", [2, 304])
def test_a_fault_at_every_call_leaks_nothing(double, backing, code):
    clean = Trace(backing)
    since = double.calls()
    clean.run()
    clean.end()
    calls = double.calls() - since
    assert calls > 100
    assert set(clean.errors) <= {GpuOutOfMemory}
    before = double.everything()
    hazards = double.hazards()
    for n in range(1, calls + 1):
        hit = run_with_fault(double, backing, n, code)
        assert double.everything() == before, f"fault at call {n} of {calls}"
        assert hit or n > 0.5 * calls
    assert double.hazards() == hazards


@pytest.mark.parametrize("n", range(1, 200, 7))
def test_a_context_that_dies_at_any_call_is_left_alone(double, n):
    trace = Trace("vmm")
    calls = double.calls()
    try:
        with double.failing(n=n, code=719):
            trace.run()
            fatal = not double.fault_pending()
            since = double.calls()
            if fatal and trace.pool is not None and trace.pool.statistics().error:
                with pytest.raises(GpuError, match="719"):
                    trace.pool.allocate(1)
                trace.end()
                # Only the reference to the context is given back.
                allowed = {"cuGetErrorName", "cuDevicePrimaryCtxRelease"}
                assert set(double.log(since)) <= allowed
    finally:
        trace.end()
    assert "cuDevicePrimaryCtxReset" not in double.log(calls)


def test_what_cannot_be_given_back_is_tried_again(double):
    before = double.everything()
    pool = GpuMemoryPool(limit=8 * MIB, chunk=CHUNK)
    blocks = [pool.allocate(CHUNK) for _ in range(4)]
    blocks[0].free()
    blocks[2].free()
    for call in ("cuMemUnmap", "cuMemRelease"):
        with double.failing(call, code=304, times=2), pytest.raises(GpuError, match="304"):
            pool.trim(0)
        assert pool.statistics().reserved == 8 * MIB
    assert all(block.copy_to().nbytes == CHUNK for block in (blocks[1], blocks[3]))
    blocks.clear()
    pool.close()
    assert pool.statistics().reserved == 0
    del pool
    gc.collect()
    assert double.everything() == before
