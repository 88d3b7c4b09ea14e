"""The public C interface, from a module of another package."""

from pathlib import Path

import pytest
from native import load

from speechrnt.gpu import GpuMemoryPool

MIB = 2**20
DOWNSTREAM = Path(__file__).parent.parent / "downstream" / "sr_downstream"
ROUNDS = 1_000_000


@pytest.fixture(scope="module")
def blocks():
    return load("gpu_blocks", DOWNSTREAM)


def test_a_package_takes_and_frees_blocks(blocks):
    pool = GpuMemoryPool(limit=64 * MIB)
    assert blocks.rounds(pool, 480_000, ROUNDS) == 0
    now = pool.statistics()
    assert (now.allocations, now.frees, now.grows, now.live) == (ROUNDS, ROUNDS, 1, 0)
    with pytest.raises(TypeError):
        blocks.rounds("not a pool", 1, 1)


def test_a_package_frees_blocks_on_a_stream(blocks):
    pool = GpuMemoryPool(limit=64 * MIB)
    stream = pool.stream()
    assert blocks.rounds_on(pool, int(stream), 480_000, ROUNDS // 10) == 0
    pool.close()
    now = pool.statistics()
    assert (now.frees, now.pending, now.reserved) == (ROUNDS // 10, 0, 0)


def test_a_package_learns_that_the_pool_is_full(blocks):
    pool = GpuMemoryPool(limit=16 * MIB, chunk=2 * MIB)
    assert blocks.fill(pool, 3 * MIB) == (5, True, 15 * MIB, 16 * MIB, 16 * MIB)
    assert pool.statistics().live == 0
