"""Random traces against an oracle too simple to be wrong, and a long one at full speed."""

import random
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from native import load

from speechrnt.errors import GpuOutOfMemory
from speechrnt.gpu import GpuMemoryPool

ROOT = Path(__file__).parent.parent.parent
MIB = 2**20
CHUNK = 2 * MIB
LIMIT = 24 * MIB


@pytest.fixture(scope="module")
def audit():
    return load("gpu_probe").audit


class Oracle:
    """Live blocks by address, with what was last written to each."""

    def __init__(self):
        self.live = {}
        self.counts = Counter()

    def lend(self, block, mark):
        start, end = block.address, block.address + block.nbytes
        for other in self.live.values():
            assert end <= other[0].address or other[0].address + other[0].nbytes <= start
        self.live[start] = (block, mark)
        self.counts["allocations"] += 1

    def take_back(self, address):
        block, mark = self.live.pop(address)
        self.counts["frees"] += 1
        ends = block.view("u1").reshape(-1)
        assert set(np.unique(ends.copy_to())) == {mark}
        ends.free()
        return block

    def check(self, statistics):
        assert statistics.allocations == self.counts["allocations"]
        assert statistics.frees == self.counts["frees"]
        assert statistics.ooms == self.counts["ooms"]
        assert statistics.live == len(self.live)
        assert statistics.requested == sum(block.nbytes for block, _ in self.live.values())


@pytest.mark.parametrize("backing", ["vmm", "segments"])
@pytest.mark.parametrize("seed", range(6))
def test_random_traces_agree_with_the_oracle(audit, backing, seed):
    rng = random.Random(seed)
    alignment = rng.choice([256, 512, 4096])
    pool = GpuMemoryPool(
        limit=LIMIT,
        chunk=CHUNK,
        backing=backing,
        alignment=alignment,
        defragment=seed % 3 != 0,
        initial=rng.choice([0, MIB]),
    )
    streams = [pool.stream() for _ in range(2)]
    oracle = Oracle()
    for step in range(300):
        action = rng.random()
        if action < 0.5 or not oracle.live:
            size = rng.choice([rng.randrange(1, 5000), rng.randrange(1, MIB), 3 * MIB])
            stream = rng.choice([None, *streams])
            try:
                block = pool.allocate(size, stream=stream)
            except GpuOutOfMemory:
                oracle.counts["ooms"] += 1
                continue
            assert block.address % alignment == 0
            mark = rng.randrange(256)
            block.copy_from(np.full(size, mark, "u1"))
            oracle.lend(block, mark)
        elif action < 0.9:
            block = oracle.take_back(rng.choice(list(oracle.live)))
            stream = rng.choice([None, *streams])
            if stream is None:
                block.free()
            else:
                block.free_on(stream)
        elif action < 0.93:
            pool.trim(rng.randrange(LIMIT))
        elif action < 0.96:
            pool.defragment()
        else:
            pool.maintain()
        assert audit(pool) is None, step
        oracle.check(pool.statistics())
    for address in list(oracle.live):
        oracle.take_back(address).free()
    pool.close()
    assert audit(pool) is None
    now = pool.statistics()
    assert (now.reserved, now.in_use, now.pending) == (0, 0, 0)


def test_the_long_trace_of_a_speech_server(audit):
    sys.path.insert(0, str(ROOT / "perf"))
    try:
        from gpu_traces import speech_trace
    finally:
        sys.path.pop(0)
    trace = speech_trace(64, 200_000)
    pool = GpuMemoryPool(limit=1024 * MIB, chunk=32 * MIB)
    _, failures = load("gpu_index", ROOT / "perf").replay_pool(pool, trace)
    assert failures == 0
    assert audit(pool) is None
    now = pool.statistics()
    allocations = int((trace > 0).sum())
    assert (now.allocations, now.live) == (allocations, 2 * allocations - len(trace))
    assert now.peak_reserved <= 1.10 * now.peak + 32 * MIB
    assert now.splits <= now.allocations
