"""The pool: what it lends, how it grows, shrinks and defragments, and what it says of itself."""

import gc
import itertools
import os
import random
import subprocess
import sys
import threading
import time
import weakref
from pathlib import Path

import pytest

from speechrnt import Scheduler
from speechrnt.errors import (
    GpuError,
    GpuOutOfMemory,
    GpuUnavailable,
    HandleError,
    OptionError,
    PoolClosedError,
)
from speechrnt.gpu import GpuMemoryPool, device_count, device_memory, device_name, pinned_memory
from speechrnt.maintenance import maintain_on

MIB = 2**20
CHUNK = 2 * MIB


@pytest.fixture(params=["vmm", "segments"])
def backing(request):
    return request.param


def make(limit=16 * MIB, **options):
    return GpuMemoryPool(limit=limit, chunk=CHUNK, **options)


def check(pool):
    """What holds between the numbers at any time; returns them."""
    now = pool.statistics()
    assert now.in_use + now.pending + now.free == now.reserved <= now.limit
    assert now.requested <= now.in_use <= now.peak
    assert now.reserved <= now.peak_reserved
    assert now.largest_free <= now.free
    assert (now.free_blocks == 0) == (now.free == 0)
    assert now.allocations - now.frees == now.live
    assert sum(now.by_size.values()) == now.allocations
    assert now.pinned_free <= now.free
    return now


def test_devices_can_be_asked_for():
    assert device_count() >= 1
    assert device_name(0)
    available, total = device_memory(0)
    assert 0 < available <= total
    with pytest.raises(OptionError, match="device must be from 0 to"):
        device_memory(device_count())
    for ask in (device_memory, device_name, pinned_memory, GpuMemoryPool):
        for device, text in ((2**40, "from 0 to"), (-1, "from 0 to"), (None, "number of a GPU")):
            with pytest.raises(OptionError, match=text):
                ask(device)


# Lending


def test_blocks_are_apart_aligned_and_counted(backing):
    pool = make(backing=backing, alignment=4096)
    blocks = [pool.allocate(size) for size in (1, 4096, 4097, 100_000)]
    spans = sorted((b.address, b.address + b.nbytes) for b in blocks)
    assert all(end <= start for (_, end), (start, _) in itertools.pairwise(spans))
    assert all(b.address % 4096 == 0 for b in blocks)
    now = check(pool)
    assert now.requested == 1 + 4096 + 4097 + 100_000
    assert now.in_use == (1 + 1 + 2 + 25) * 4096
    assert now.internal_waste == 1 - now.requested / now.in_use
    assert now.by_size == {1: 1, 4096: 2, 65536: 1}
    assert (now.live, now.grows, now.backing) == (4, 1, backing)
    for block in blocks:
        block.free()
    now = check(pool)
    assert (now.in_use, now.live, now.free_blocks) == (0, 0, 1)
    assert now.utilisation == 0
    assert now.fragmentation == 0
    pool.close()
    assert check(pool).utilisation == 1


def test_the_best_fit_is_taken_and_its_rest_stays_free():
    pool = make()
    holes = {}
    keep = []
    for size in (64, 24, 40):  # in granules, each hole between blocks in use
        holes[size] = pool.allocate(size * 512)
        keep.append(pool.allocate(512))
    places = {size: block.address for size, block in holes.items()}
    for block in holes.values():
        block.free()
    assert pool.allocate(24 * 512).address == places[24]
    block = pool.allocate(30 * 512)
    assert block.address == places[40]
    assert pool.allocate(10 * 512).address == places[40] + 30 * 512
    assert check(pool).free_blocks == 4  # two of them by now what was 24 and 40


def test_neighbours_are_merged_in_whatever_order_they_come(backing):
    for order in ([0, 1, 2], [2, 1, 0], [0, 2, 1], [1, 0, 2]):
        pool = make(backing=backing)
        blocks = [pool.allocate(1000) for _ in range(4)]
        for i in order:
            blocks[i].free()
        assert check(pool).free_blocks == 2
        blocks[3].free()
        assert check(pool).free_blocks == 1


def test_sizes_that_make_no_sense_are_refused():
    pool = make()
    for shape in (0, -1, (3, 0), (1,) * 9, "x", 1.5, None, 2**63, (2**40, 2**40)):
        with pytest.raises(OptionError, match="shape"):
            pool.allocate(shape)
    for dtype in ("object", "U5", ">f4", "nonsense", [("a", "f4")], "datetime64[s]"):
        with pytest.raises(OptionError, match="dtype"):
            pool.allocate(4, dtype)
    for stream in ("x", 1.5, object()):
        with pytest.raises(OptionError, match="stream"):
            pool.allocate(4, stream=stream)
    assert check(pool).allocations == 0


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"device": 99}, "device"),
        ({"device": -1}, "device"),
        ({"device": "gpu"}, "device"),
        ({"limit": 0}, "limit"),
        ({"limit": CHUNK - 1}, "limit"),
        ({"limit": 2**60}, "limit"),
        ({"limit": "much"}, "limit"),
        ({"initial": -1}, "initial"),
        ({"initial": 17 * MIB}, "initial"),
        ({"alignment": 128}, "alignment"),
        ({"alignment": 768}, "alignment"),
        ({"alignment": 2**22}, "alignment"),
        ({"chunk": 100}, "chunk"),
        ({"backing": "malloc"}, "backing"),
    ],
)
def test_options_out_of_range_are_refused(options, name):
    with pytest.raises(OptionError, match=name):
        GpuMemoryPool(**{"limit": 16 * MIB, "chunk": CHUNK, **options})


# Growing and shrinking


def test_it_grows_by_whole_chunks_next_to_what_is_free(double):
    pool = make(limit=64 * MIB)
    first = pool.allocate(3 * MIB)
    assert check(pool).reserved == 4 * MIB
    second = pool.allocate(5 * MIB)  # 1 MiB is free at the end: 4 more make it
    assert second.address == first.address + 3 * MIB
    now = check(pool)
    assert (now.reserved, now.free, now.grows, now.chunks) == (8 * MIB, 0, 2, 4)


def test_the_limit_holds_and_the_pool_goes_on(backing):
    pool = make(backing=backing)
    blocks = [pool.allocate(2 * MIB) for _ in range(8)]
    with pytest.raises(GpuOutOfMemory, match=r"limit of 16.0 MiB leaves no room for 0.0") as error:
        pool.allocate(1)
    assert error.value.statistics.ooms == 1
    assert isinstance(error.value, MemoryError)
    blocks[3].free()
    assert pool.allocate(2 * MIB).address
    now = check(pool)
    assert (now.reserved, now.ooms, now.peak_reserved) == (16 * MIB, 1, 16 * MIB)


def test_initial_memory_is_there_and_stays(backing):
    pool = make(backing=backing, initial=5 * MIB)
    assert check(pool).reserved == 6 * MIB
    blocks = [pool.allocate(2 * MIB) for _ in range(6)]
    del blocks
    assert check(pool).reserved == 12 * MIB
    assert pool.trim() == 6 * MIB
    assert check(pool).reserved == 6 * MIB
    assert pool.trim(keep=0) == 6 * MIB
    assert check(pool).reserved == 0
    with pytest.raises(OptionError, match="keep"):
        pool.trim(keep=-1)


def test_trim_leaves_what_is_in_use(backing):
    pool = make(backing=backing)
    blocks = [pool.allocate(2 * MIB) for _ in range(6)]
    for i in (0, 2, 5):
        blocks[i].free()
    assert pool.trim(0) == 6 * MIB
    now = check(pool)
    assert (now.reserved, now.free, now.trims) == (6 * MIB, 0, 1)
    assert pool.allocate(2 * MIB).address  # and it grows again


def test_a_full_gpu_is_told_from_a_full_pool(double, backing):
    double.leave(8 * MIB)
    pool = make(backing=backing)
    blocks = [pool.allocate(2 * MIB) for _ in range(4)]
    with pytest.raises(GpuOutOfMemory, match=r"GPU 0 has no memory for 2.0 MiB \(0.0 MiB of"):
        pool.allocate(2 * MIB)
    del blocks
    assert pool.trim(0) == 8 * MIB


def test_segments_that_are_too_small_are_exchanged_for_a_larger_one():
    pool = make(backing="segments")
    blocks = [pool.allocate(2 * MIB) for _ in range(8)]
    for block in blocks:
        block.free()
    assert pool.allocate(15 * MIB).address
    assert check(pool).reserved == 16 * MIB


def test_segments_are_exchanged_also_where_that_leaves_less_than_before():
    pool = make(limit=10 * MIB, backing="segments")
    blocks = [pool.allocate(size * MIB) for size in (4, 4, 2)]
    blocks[0].free()
    blocks[1].free()
    assert pool.allocate(5 * MIB).address
    assert check(pool).reserved <= 8 * MIB


def test_segments_are_kept_where_giving_them_back_would_not_do():
    pool = make(limit=10 * MIB, backing="segments")
    blocks = [pool.allocate(size * MIB) for size in (4, 6)]
    blocks[0].free()
    with pytest.raises(GpuOutOfMemory):
        pool.allocate(5 * MIB)
    now = check(pool)
    assert (now.reserved, now.trims) == (10 * MIB, 0)


# Defragmentation


def scatter(pool, used=(0, 2, 4, 6)):
    """Have only every other of eight chunks in use; the last is free and next to unmapped ones."""
    blocks = [pool.allocate(CHUNK) for _ in range(8)]
    for i in range(8):
        if i not in used:
            blocks[i].free()
    return [blocks[i] for i in used]


def test_free_chunks_are_moved_together_before_the_pool_fails():
    pool = make()
    kept = scatter(pool)
    for i, block in enumerate(kept):
        block.copy_from(bytes([i]) * CHUNK)
    addresses = [block.address for block in kept]
    large = pool.allocate(4 * CHUNK)
    now = check(pool)
    assert (now.reserved, now.remapped_chunks, now.defragmentations) == (16 * MIB, 3, 1)
    large.copy_from(b"x" * 4 * CHUNK)
    assert [block.address for block in kept] == addresses
    for i, block in enumerate(kept):
        assert set(block.copy_to()) == {i}
    assert set(large.copy_to()) == {ord("x")}


def test_it_moves_what_it_has_before_it_grows():
    pool = make(limit=64 * MIB)
    kept = scatter(pool)
    pool.allocate(5 * CHUNK)
    now = check(pool)
    assert (now.remapped_chunks, now.reserved) == (3, 16 * MIB + CHUNK)
    assert len(kept) == 4


def test_switched_off_it_grows_or_fails_instead():
    pool = make(defragment=False)
    kept = scatter(pool)
    with pytest.raises(GpuOutOfMemory, match="defragmentation is off"):
        pool.allocate(2 * CHUNK)
    now = check(pool)
    assert (now.remapped_chunks, now.fragmented_ooms) == (0, 1)
    assert not pool.health().healthy
    assert pool.maintain() is None
    done = pool.defragment()  # by hand, it works
    assert done.largest_free_before == CHUNK
    assert done.largest_free_after == 4 * CHUNK
    assert pool.allocate(4 * CHUNK).address
    assert len(kept) == 4


def test_a_chunk_with_a_byte_in_use_stays(double):
    pool = make()
    small = [pool.allocate(CHUNK // 2) for _ in range(16)]
    kept = small[::2]
    del small
    gc.collect()
    now = check(pool)
    assert now.pinned_free == now.free == 8 * MIB
    assert pool.defragment().remapped_chunks == 0
    assert pool.trim(0) == 0
    with pytest.raises(GpuOutOfMemory):
        pool.allocate(CHUNK)
    assert check(pool).fragmented_ooms == 1
    assert len(kept) == 8
    assert double.hazards() == 0


def test_defragmenting_gives_the_largest_block_possible():
    pool = make(limit=32 * MIB)
    blocks = [pool.allocate(CHUNK) for _ in range(16)]
    free = (1, 2, 5, 9, 10, 11, 14)
    for i in free:
        blocks[i].free()
    done = pool.defragment()
    assert done.largest_free_before == 3 * CHUNK
    assert done.largest_free_after == 7 * CHUNK
    assert done.remapped_chunks <= 7
    assert check(pool).free_blocks == 1
    assert pool.defragment().remapped_chunks == 0  # it cannot be better


def test_segments_cannot_be_joined():
    pool = make(backing="segments")
    kept = scatter(pool)
    done = pool.defragment()
    assert done.remapped_chunks == 0
    assert done.largest_free_after == done.largest_free_before == CHUNK
    assert len(kept) == 4


def test_maintenance_defragments_where_it_is_worthwhile():
    pool = make()
    assert pool.maintain() is None
    kept = scatter(pool)
    assert check(pool).fragmentation == 0.75
    assert pool.maintain().remapped_chunks == 3
    assert check(pool).fragmentation == 0
    assert pool.maintain() is None
    assert len(kept) == 4


def test_a_scheduler_does_the_maintenance():
    pool = make()
    kept = scatter(pool)
    with Scheduler(workers=1) as scheduler:
        maintenance = maintain_on(scheduler, [pool], interval_s=0.001)
        while pool.statistics().fragmentation:
            time.sleep(0.001)
        pool.close()
        while not maintenance.closed:
            time.sleep(0.001)
    assert len(kept) == 4


# Health


def test_health_is_about_use_and_about_fragmentation_that_matters():
    pool = make()
    assert pool.health().healthy
    blocks = [pool.allocate(CHUNK) for _ in range(7)]
    assert pool.health().healthy
    blocks.append(pool.allocate(CHUNK))
    health = pool.health()
    assert health.problems == ("100% of the limit of 16.0 MiB is in use",)
    assert health.utilisation == 1
    del blocks
    kept = scatter(pool)
    (problem,) = pool.health().problems
    assert problem == "75% of the free 8.0 MiB is outside the largest free block"
    pool.close()
    assert "the pool is closed" in pool.health().problems
    assert len(kept) == 4


def test_a_few_holes_in_a_full_pool_are_no_problem():
    pool = make(limit=64 * MIB)
    blocks = [pool.allocate(64 * 1024) for _ in range(512)]  # 32 MiB, half of the limit
    for i in range(0, 30, 3):
        blocks[i].free()
    assert check(pool).fragmentation > 0.25
    assert pool.health().healthy


# The end of it


def test_a_closed_pool_lends_no_more_and_takes_back(backing):
    pool = make(backing=backing)
    kept = pool.allocate(100)
    pool.allocate(3 * MIB).free()
    pool.close()
    assert pool.closed
    assert check(pool).reserved == CHUNK
    with pytest.raises(PoolClosedError):
        pool.allocate(1)
    kept.copy_from(b"a" * 100)
    kept.free()
    pool.close()
    assert check(pool).reserved == 0


def test_a_pool_gives_everything_back_when_it_is_collected(double, backing):
    before = double.everything()
    pool = make(backing=backing, initial=MIB)
    block = pool.allocate(MIB)
    stream = pool.stream()
    block.copy_from(bytes(MIB))
    block.free_on(stream)
    reference = weakref.ref(pool)
    del pool
    assert reference() is not None  # the stream has it
    stream.close()
    del stream, block
    gc.collect()
    assert reference() is None
    assert double.everything() == before


def test_a_block_keeps_its_pool(double):
    before = double.everything()
    block = make().allocate(1000)
    gc.collect()
    block.copy_from(b"z" * 1000)
    assert block.pool.statistics().live == 1
    del block
    gc.collect()
    assert double.everything() == before


def test_whose_context_is_current_does_not_matter(double):
    from cuda.bindings import driver

    before = int(driver.cuCtxGetCurrent()[1])
    make().allocate(10).free()
    assert int(driver.cuCtxGetCurrent()[1]) == before


def test_handles_of_another_pool_and_freed_ones_are_told_apart():
    pool = make()
    block = pool.allocate(10)
    block.free()
    with pytest.raises(HandleError, match="freed already"):
        block.free()
    with pytest.raises(HandleError):
        _ = block.address
    assert check(pool).frees == 1


# Errors


def test_a_dead_context_poisons_the_pool(double):
    pool = make()
    kept = pool.allocate(100)
    gone = pool.allocate(100)
    stream = pool.stream()
    dead = pytest.raises(GpuError, match=r"CUDA_ERROR_ILLEGAL_ADDRESS \(700\)")
    with double.broken(700), dead:
        pool.allocate(4 * MIB)
    calls = double.calls()
    for _ in range(2):
        with pytest.raises(GpuError, match="only a new process"):
            pool.allocate(1)
        with pytest.raises(GpuError, match="only a new process"):
            pool.trim()
        with pytest.raises(GpuError, match="only a new process"):
            kept.copy_from(b"x" * 100)
        with pytest.raises(GpuError, match="only a new process"):
            stream.synchronize()
    gone.free()
    kept.free_on(stream)
    stream.close()
    now = check(pool)
    assert (now.error, now.live) == (700, 0)
    assert not pool.health().healthy
    pool.close()
    del pool, kept, gone, stream
    gc.collect()
    assert "cuDevicePrimaryCtxReset" not in double.log(calls)
    assert set(double.log(calls)) <= {"cuGetErrorName", "cuDevicePrimaryCtxRelease"}


def test_other_errors_pass(double):
    pool = make()
    refused = pytest.raises(GpuError, match=r"\(create\).*304")
    with double.failing("cuMemCreate", code=304), refused:
        pool.allocate(10)
    assert pool.allocate(10).address
    assert check(pool).error == 0


def test_a_driver_that_has_shut_down_is_no_surprise(double):
    before = double.everything()
    pool = make()
    block = pool.allocate(10)
    other = make()
    with double.deinitialised():
        shut_down = pytest.raises(GpuError, match="shut down")
        with shut_down:
            pool.allocate(4 * MIB)
        block.free()
        del pool, block
        gc.collect()
    other.close()
    del other
    gc.collect()
    # What the first pool had is the driver's; only that is left.
    after = double.everything()
    assert {kind: after[kind] - before[kind] for kind in ("mapped", "reserved", "retained")} == {
        "mapped": 1,
        "reserved": 1,
        "retained": 1,
    }


@pytest.fixture
def idle_mempool(double):
    """32 MiB that the device's mempool keeps and nobody uses, as CTranslate2 may leave it."""
    from cuda.bindings import driver

    pool = make()
    stream = pool.stream()
    driver.cuCtxPushCurrent(driver.cuDevicePrimaryCtxRetain(0)[1])
    mempool = driver.cuDeviceGetMemPool(0)[1]
    threshold = driver.CUmemPool_attribute.CU_MEMPOOL_ATTR_RELEASE_THRESHOLD
    driver.cuMemPoolSetAttribute(mempool, threshold, driver.cuuint64_t(2**40))
    _, idle = driver.cuMemAllocAsync(20 * MIB, int(stream))
    driver.cuMemFreeAsync(idle, int(stream))
    stream.close()
    yield 32 * MIB
    driver.cuMemPoolSetAttribute(mempool, threshold, driver.cuuint64_t(0))
    driver.cuMemPoolTrimTo(mempool, 0)
    driver.cuCtxPopCurrent()
    driver.cuDevicePrimaryCtxRelease(0)


def test_the_ladder_ends_with_the_memory_of_others(double, idle_mempool):
    double.leave(32 * MIB)
    pool = make(limit=64 * MIB)
    stream = pool.stream()
    pool.allocate(100).free_on(stream)
    since = double.calls()
    with double.held(stream):
        block = pool.allocate(40 * MIB)
    names = ("cuMemCreate", "cuEventSynchronize", "cuMemPoolTrimTo")
    steps = [name for name in double.log(since) if name in names]
    assert [name for i, name in enumerate(steps) if i == 0 or name != steps[i - 1]] == [
        "cuMemCreate",  # until the GPU is full
        "cuEventSynchronize",  # what was pending does not help,
        "cuMemCreate",
        "cuMemPoolTrimTo",  # but the memory of others does
        "cuMemCreate",
    ]
    assert check(pool).retries == 2
    assert block.address


def test_without_the_last_step_others_keep_their_memory(double, idle_mempool):
    double.leave(8 * MIB)
    pool = make(trim_mempool=False)
    used = double.used()
    with pytest.raises(GpuOutOfMemory, match="has no memory"):
        pool.allocate(10 * MIB)
    assert double.used() == used


# Processes and threads


def test_a_forked_child_is_refused_and_leaves_the_parent_alone():
    pool = make()
    block = pool.allocate(100)
    block.copy_from(b"p" * 100)
    child = os.fork()
    if child == 0:
        refused = 0
        for use in (lambda: pool.allocate(1), pool.statistics, pool.trim, pool.defragment):
            try:
                use()
            except GpuError as error:
                refused += "forked child" in str(error)
        try:
            GpuMemoryPool(limit=16 * MIB)
        except (GpuError, GpuUnavailable):
            refused += 1
        block.free()
        pool.close()
        del pool, block
        gc.collect()
        os._exit(refused)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 5
    assert bytes(block.copy_to()) == b"p" * 100
    assert check(pool).live == 1


EXIT = """
import sys
sys.path.insert(0, {tests!r})
if {double}:
    from native import cuda_double
    double = cuda_double.load()
    double.configure()
from speechrnt.gpu import GpuMemoryPool
pool = GpuMemoryPool(limit=2**25)
stream = pool.stream()
block = pool.allocate(2**20)
other = pool.allocate(2**20, stream=stream)
cycle = [pool, block]
cycle.append(cycle)
{ending}
"""


@pytest.mark.parametrize(
    "ending",
    [
        "",
        "del pool",
        "pool.close()",
        "other.free_on(stream)",
        "import atexit; atexit.register(block.free)",
        "import os, threading; threading.Thread(target=lambda: [pool.allocate(1000) "
        "for _ in range(10**5)], daemon=True).start()",
        "raise SystemExit(0)",
    ],
)
def test_exiting_is_quiet_whatever_is_left(ending):
    double = os.environ["SPEECHRNT_CUDA"] == "double"
    script = EXIT.format(tests=str(Path(__file__).parent.parent), double=double, ending=ending)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_threads_share_a_pool(backing):
    pool = make(limit=64 * MIB, backing=backing)
    failures = []

    def work(seed):
        rng = random.Random(seed)
        mine = []
        try:
            for i in range(1500):
                if mine and rng.random() < 0.5:
                    block, mark = mine.pop(rng.randrange(len(mine)))
                    assert block.copy_to()[0] == mark
                    block.free()
                else:
                    try:
                        block = pool.allocate(rng.randrange(1, 300_000))
                    except GpuOutOfMemory:
                        continue
                    block.copy_from(bytes([seed]) * block.nbytes)
                    mine.append((block, seed))
                if len(mine) > 20:
                    mine.pop(0)[0].free()
                if i % 100 == seed:
                    pool.trim(0)
                if i % 150 == seed:
                    pool.defragment()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    now = check(pool)
    assert (now.live, now.in_use) == (0, 0)
    pool.close()
    assert check(pool).reserved == 0


def test_threads_that_grow_a_pool_at_once_all_get_memory():
    # Growing counts on free neighbours, which others may take while the driver works.
    pool = make(limit=1024 * MIB)
    failures = []

    def work(seed):
        rng = random.Random(seed)
        try:
            for i in range(300):
                pool.allocate(rng.choice([300_000, 3 * MIB, 5 * MIB, 7 * MIB])).free()
                if i % 3 == 0:
                    pool.trim(0)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert check(pool).ooms == 0
