"""The pool under CTranslate2's tensors by itself, and behind the functions that MKL calls."""

import ctypes
import itertools
import os
import shutil
import signal
import subprocess

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from inference_helpers import (
    KIB,
    MIB,
    NATIVE,
    CCounters,
    Pool,
    build,
    build_library,
    load_pool,
    served_here,
    start,
)

GRANULE = 64 << 10
SMALLEST = 512 * KIB


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    """The headers, compiled apart from the package: a pool of its own."""
    path = tmp_path_factory.mktemp("native") / "pool.so"
    build_library("pool.cpp", path)
    return load_pool(path)


@served_here
class TestSpanPool:
    def test_the_same_calls_get_the_same_addresses_and_no_new_pages(self, library):
        pool = Pool(library, 512 * MIB)
        sizes = [54 * MIB, 3 * MIB + 1, 9 * MIB, 700 * KIB]

        def use():
            blocks = [pool.allocate(size) for size in sizes]
            for block in [blocks[1], blocks[3], blocks[0], blocks[2]]:
                pool.free(block)
            return blocks

        first = use()
        misses, reserved = pool.misses, pool.reserved
        for _ in range(5):
            assert use() == first
        assert (pool.misses, pool.reserved) == (misses, reserved)
        assert reserved <= pool.peak + 2 * MIB
        assert pool.hits == 5 * len(sizes) + (len(sizes) - misses)

    def test_neighbours_become_one(self, library):
        pool = Pool(library, 512 * MIB)
        blocks = [pool.allocate(6 * MIB) for _ in range(5)]
        for index in (1, 3, 2):
            pool.free(blocks[index])
        assert pool.allocate(18 * MIB) == blocks[1]

    def test_the_smallest_hole_that_fits_is_taken(self, library):
        pool = Pool(library, 512 * MIB)
        sizes = [8, 1, 4, 1, 6, 1]
        blocks = [pool.allocate(size * MIB) for size in sizes]
        for index in (0, 2, 4):
            pool.free(blocks[index])
        assert pool.allocate(5 * MIB) == blocks[4]
        assert pool.allocate(4 * MIB) == blocks[2]
        assert pool.allocate(5 * MIB) == blocks[0]

    def test_what_is_not_used_for_ten_seconds_goes_back_when_the_pool_is_used(self, library):
        pool = Pool(library, 512 * MIB)
        pool.free(pool.allocate(64 * MIB))
        for pool.now in range(101, 110):
            pool.free(pool.allocate(4 * MIB))
        assert (pool.reserved, pool.trims) == (64 * MIB, 0)
        pool.now = 110
        pool.free(pool.allocate(4 * MIB))
        assert (pool.reserved, pool.trims) == (4 * MIB, 1)

    def test_trim_gives_back_what_is_idle(self, library):
        pool = Pool(library, 512 * MIB)
        old, held, new = (pool.allocate(16 * MIB) for _ in range(3))
        pool.free(old)
        pool.now = 103
        pool.free(new)
        assert pool.trim(3) == 16 * MIB
        assert pool.reserved == 32 * MIB
        assert pool.trim() == 16 * MIB
        assert pool.trim() == 0
        assert (pool.in_use, pool.reserved) == (16 * MIB, 16 * MIB)
        pool.free(held)

    def test_pages_that_are_given_back_are_zero_and_those_in_use_stay(self, library):
        pool = Pool(library, 512 * MIB)
        # Two blocks in one page of 2 MiB, which must not go while one of them is held.
        idle, held = pool.allocate(SMALLEST), pool.allocate(5 * MIB)
        ctypes.memset(idle, 1, SMALLEST)
        ctypes.memset(held, 2, 5 * MIB)
        pool.free(idle)
        assert pool.trim() == 0
        assert ctypes.string_at(held, 5 * MIB) == b"\2" * (5 * MIB)
        pool.free(held)
        assert pool.trim() == 6 * MIB
        assert ctypes.string_at(pool.allocate(SMALLEST), SMALLEST) == bytes(SMALLEST)

    def test_the_limit_leaves_blocks_to_others(self, library):
        pool = Pool(library, 16 * MIB)
        held = pool.allocate(10 * MIB)
        assert pool.allocate(7 * MIB) is None
        assert (pool.overflows, pool.in_use, pool.reserved) == (1, 10 * MIB, 10 * MIB)
        pool.free(held)
        assert pool.allocate(16 * MIB) == held

    def test_idle_memory_makes_room_before_the_limit_counts(self, library):
        pool = Pool(library, 18 * MIB)
        idle, held = pool.allocate(8 * MIB), pool.allocate(2 * MIB)
        pool.free(idle)
        assert pool.allocate(10 * MIB) == held + 2 * MIB
        assert (pool.reserved, pool.trims, pool.overflows) == (12 * MIB, 1, 0)

    def test_a_lower_limit_holds_at_once_for_what_is_idle(self, library):
        pool = Pool(library, 64 * MIB)
        held, idle = pool.allocate(10 * MIB), pool.allocate(20 * MIB)
        pool.free(idle)
        pool.set_limit(8 * MIB)
        assert (pool.limit, pool.reserved) == (8 * MIB, 10 * MIB)
        assert pool.allocate(SMALLEST) is None
        pool.free(held)
        assert pool.allocate(8 * MIB) is not None

    def test_limit_0_leaves_everything_to_others_and_counts_nothing(self, library):
        pool = Pool(library, 0)
        assert pool.allocate(MIB) is None
        assert pool.overflows == 0

    @pytest.mark.parametrize("size", [2**30 + 1, 2**62, 2**64 - 1])
    def test_more_than_the_range_is_left_to_others(self, library, size):
        pool = Pool(library, 2**63)
        assert pool.limit == 2**30
        assert pool.allocate(size) is None
        assert pool.overflows == 1

    @pytest.mark.parametrize("offset", [64, 64 * KIB, 2 * MIB])
    def test_what_is_no_block_aborts_the_process_as_in_libc(self, library, offset):
        code = """
import sys
sys.path.insert(0, sys.argv[1])
import inference_helpers as t
pool = t.Pool(t.load_pool(sys.argv[2]), 2**28)
pool.free(pool.allocate(2**20) + int(sys.argv[3]))
"""
        done = start(code, NATIVE.parent, library._name, offset)
        assert done.returncode == -signal.SIGABRT

    def test_a_block_is_returned_once(self, library):
        code = """
import sys
sys.path.insert(0, sys.argv[1])
import inference_helpers as t
pool = t.Pool(t.load_pool(sys.argv[2]), 2**28)
block = pool.allocate(2**20)
pool.free(block)
print("1", flush=True)
pool.free(block)
"""
        done = start(code, NATIVE.parent, library._name)
        assert (done.stdout, done.returncode) == ("1\n", -signal.SIGABRT)


def view(block, size):
    return np.ctypeslib.as_array(ctypes.cast(block, ctypes.POINTER(ctypes.c_uint8)), (size,))


class MemoryMachine(RuleBasedStateMachine):
    """What MKL may call, in any order, against a list of blocks and what is in them."""

    library = None
    limit = 24 * MIB

    sizes = st.one_of(
        st.integers(1, 4 * MIB),
        st.sampled_from([SMALLEST - 1, SMALLEST, SMALLEST + 1, 64 * KIB, MIB, 8 * MIB, 30 * MIB]),
    )
    picks = st.integers(0, 10**6)

    def __init__(self):
        super().__init__()
        self.library.prepare(self.limit)
        self.blocks = []  # address, size, the byte it is full of
        self.fills = 0

    def counters(self):
        counters = CCounters()
        self.library.test_counters(ctypes.byref(counters))
        return counters

    def fill(self, block, size):
        assert block is not None
        self.fills = self.fills % 255 + 1
        view(block, size)[:] = self.fills
        self.blocks.append((block, size, self.fills))

    def take(self, pick):
        block, size, value = self.blocks.pop(pick % len(self.blocks))
        assert (view(block, size) == value).all()
        return block, size, value

    @precondition(lambda self: len(self.blocks) < 12)
    @rule(size=sizes)
    def malloc(self, size):
        self.fill(self.library.test_malloc(size), size)

    @precondition(lambda self: len(self.blocks) < 12)
    @rule(size=sizes, count=st.integers(1, 3))
    def calloc(self, size, count):
        block = self.library.test_calloc(count, size)
        assert not view(block, count * size).any()
        self.fill(block, count * size)

    @precondition(lambda self: self.blocks)
    @rule(size=sizes, pick=picks)
    def realloc(self, size, pick):
        block, old_size, value = self.take(pick)
        block = self.library.test_realloc(block, size)
        assert (view(block, min(size, old_size)) == value).all()
        self.fill(block, size)

    @precondition(lambda self: self.blocks)
    @rule(pick=picks)
    def free(self, pick):
        self.library.test_free(self.take(pick)[0])

    @rule()
    def trim(self):
        self.library.test_trim()

    @rule(limit=st.sampled_from([0, 8 * MIB, 24 * MIB]))
    def set_limit(self, limit):
        self.library.prepare(limit)

    @invariant()
    def blocks_are_whole_and_apart(self):
        ranges = sorted((block, block + size) for block, size, _ in self.blocks)
        assert all(end <= start for (_, end), (start, _) in itertools.pairwise(ranges))

    @invariant()
    def blocks_of_the_pool_are_aligned_and_counted(self):
        ours = [(block, size) for block, size, _ in self.blocks if self.library.test_owns(block)]
        assert all(block % GRANULE == 0 for block, _ in ours)
        counters = self.counters()
        assert counters.blocks == len(ours)
        assert counters.in_use == sum(-(-size // GRANULE) * GRANULE for _, size in ours)
        assert counters.reserved % (2 * MIB) == 0

    def teardown(self):
        while self.blocks:
            self.library.test_free(self.take(0)[0])
        self.library.prepare(self.limit)
        self.library.test_trim()
        counters = self.counters()
        assert (counters.in_use, counters.blocks, counters.reserved) == (0, 0, 0)


@served_here
class TestMemoryFunctions:
    def test_any_sequence(self, library):
        machine = type("Machine", (MemoryMachine,), {"library": library})
        machine.TestCase.settings = settings(
            max_examples=60, stateful_step_count=40, print_blob=False
        )
        machine.TestCase("runTest").runTest()

    def test_small_blocks_are_libcs(self, library):
        library.prepare(64 * MIB)
        small, large = library.test_malloc(SMALLEST - 1), library.test_malloc(SMALLEST)
        assert (library.test_owns(small), library.test_owns(large)) == (False, True)
        library.test_free(small)
        library.test_free(large)

    def test_blocks_of_others_are_passed_on(self, library):
        libc = ctypes.CDLL(None)
        libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
        library.prepare(64 * MIB)
        library.test_free(libc.malloc(8 * MIB))
        grown = library.test_realloc(libc.malloc(100), 8 * MIB)
        assert not library.test_owns(grown)
        library.test_free(grown)
        library.test_free(None)

    def test_realloc_of_nothing_to_nothing_and_in_place(self, library):
        library.prepare(64 * MIB)
        block = library.test_realloc(None, MIB)
        assert library.test_owns(block)
        assert library.test_realloc(block, MIB - GRANULE + 1) == block
        assert library.test_realloc(block, 0) is None
        counters = CCounters()
        library.test_counters(ctypes.byref(counters))
        assert counters.blocks == 0

    def test_realloc_that_fails_leaves_the_block(self, library):
        library.prepare(64 * MIB)
        block = library.test_malloc(MIB)
        view(block, MIB)[:] = 7
        assert library.test_realloc(block, 2**62) is None
        assert (view(block, MIB) == 7).all()
        library.test_free(block)

    def test_sizes_that_overflow_are_refused(self, library):
        library.prepare(64 * MIB)
        assert library.test_calloc(2**32 + 1, 2**32) is None
        assert library.test_calloc(2**63, 2) is None
        assert library.test_malloc(2**64 - 1) is None

    @pytest.mark.parametrize(
        ("build_name", "sanitizer", "steps"),
        [("asan", "address,undefined", 500), ("tsan", "thread", 60)],
    )
    def test_threads_under_sanitizers(self, tmp_path, build_name, sanitizer, steps):
        if os.environ.get("SPEECHRNT_BUILD", build_name) != build_name:
            pytest.skip("two sanitizers do not mix")
        program = tmp_path / "pool"
        code, errors = build("pool.cpp", program, f"-fsanitize={sanitizer}")
        if code:
            pytest.skip(f"cannot link with -fsanitize={sanitizer}: {errors.splitlines()[-1]}")
        # Sanitizers of this age want their addresses where they were without randomization.
        wrapper = [setarch, "-R"] if (setarch := shutil.which("setarch")) else []
        done = subprocess.run(
            [*wrapper, program, str(steps)], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout == "in_use 0 blocks 0 overflows 1 hits 1 trims 1\n"
        assert done.stderr == ""
