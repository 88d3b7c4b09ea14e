"""The pool under CTranslate2's tensors: by itself, behind MKL's functions, and with real models.

What concerns the process runs in processes of its own, as the pool stays for the life of one.
"""

import ctypes
import itertools
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from speechrnt import _inference_memory, inference_memory, system
from speechrnt.errors import GpuUnavailable, OptionError

ROOT = Path(__file__).parent.parent
NATIVE = Path(__file__).parent / "native"
GRANULE = 64 << 10
KIB, MIB = 1 << 10, 1 << 20
SMALLEST = 512 * KIB

CAN_BE_SERVED = sys.platform == "linux" and platform.machine() == "x86_64"
served_here = pytest.mark.skipif(not CAN_BE_SERVED, reason="only on x86-64 Linux")


def test_this_machine_is_served_or_the_reason_is_told():
    if CAN_BE_SERVED:
        assert _inference_memory.why_not() is None
    else:
        assert "only its x86-64 build for Linux is known" in inference_memory.status()


def build(source, output, *options):
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        pytest.skip("needs a C++ compiler")
    command = [compiler, "-std=c++17", "-O1", "-g", "-Wall", "-Wextra", "-Werror", "-pthread"]
    command += ["-I", ROOT / "speechrnt", NATIVE / source, "-o", output, *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.returncode, done.stderr


def build_library(source, output, *options):
    code, errors = build(source, output, "-shared", "-fPIC", *options)
    assert code == 0, errors


def run(code, *arguments, **environment):
    """Run `code` in a process of its own and return what it prints as JSON in the last line."""
    done = start(code, *arguments, **environment)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return json.loads(done.stdout.splitlines()[-1])


def start(code, *arguments, **environment):
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])} | environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


class CCounters(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in ("limit", "in_use", "peak", "reserved")]
    _fields_ += [
        (name, ctypes.c_uint64) for name in ("blocks", "hits", "misses", "overflows", "trims")
    ]


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    """The headers, compiled apart from the package: a pool of its own."""
    path = tmp_path_factory.mktemp("native") / "pool.so"
    build_library("pool.cpp", path)
    return load_pool(path)


def load_pool(path):
    library = ctypes.CDLL(str(path))
    pointer, size, seconds = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_uint32
    for name, result, *arguments in [
        ("prepare", None, size),
        ("test_malloc", pointer, size),
        ("test_calloc", pointer, size, size),
        ("test_realloc", pointer, pointer, size),
        ("test_free", None, pointer),
        ("test_owns", ctypes.c_bool, pointer),
        ("test_trim", size),
        ("test_counters", None, pointer),
        ("new_pool", pointer, size, size),
        ("allocate", pointer, pointer, size, seconds),
        ("deallocate", None, pointer, pointer, seconds),
        ("trim_pool", size, pointer, seconds, seconds),
        ("set_pool_limit", None, pointer, size),
        ("pool_counters", None, pointer, pointer),
    ]:
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library


class Pool:
    """A pool of 1 GiB of addresses, at times that the test sets."""

    def __init__(self, library, limit):
        self.library = library
        self.pool = library.new_pool(1 << 30, limit)
        self.now = 100

    def allocate(self, size):
        return self.library.allocate(self.pool, size, self.now)

    def free(self, block):
        self.library.deallocate(self.pool, block, self.now)

    def trim(self, seconds=0):
        return self.library.trim_pool(self.pool, seconds, self.now)

    def set_limit(self, limit):
        self.library.set_pool_limit(self.pool, limit)

    def __getattr__(self, name):
        counters = CCounters()
        self.library.pool_counters(self.pool, ctypes.byref(counters))
        return getattr(counters, name)


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
import test_inference_memory as t
pool = t.Pool(t.load_pool(sys.argv[2]), 2**28)
pool.free(pool.allocate(2**20) + int(sys.argv[3]))
"""
        done = start(code, NATIVE.parent, library._name, offset)
        assert done.returncode == -signal.SIGABRT

    def test_a_block_is_returned_once(self, library):
        code = """
import sys
sys.path.insert(0, sys.argv[1])
import test_inference_memory as t
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
            max_examples=60, stateful_step_count=40, deadline=None, print_blob=False
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

    @pytest.mark.parametrize(("sanitizer", "steps"), [("address,undefined", 500), ("thread", 60)])
    def test_threads_under_sanitizers(self, tmp_path, sanitizer, steps):
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


DOUBLE_SCRIPT = """
import ctypes, json, sys
from speechrnt import _inference_memory as memory

NAMES = ["i_malloc", "i_calloc", "i_realloc", "i_free"]
path, name, used = sys.argv[1:]
library = ctypes.CDLL(path)
library.MKL_malloc.restype = ctypes.c_void_p
library.MKL_malloc.argtypes = [ctypes.c_size_t, ctypes.c_int]
library.MKL_free.argtypes = [ctypes.c_void_p]

def pointers():
    return [ctypes.c_void_p.in_dll(library, name).value for name in NAMES if hasattr(library, name)]

if used == "used":
    library.MKL_free(library.MKL_malloc(2**20, 64))
before = pointers()
probed = memory.why_not(name)
assert pointers() == before
reason = memory.install(2**26, name)
block = library.MKL_malloc(2**20, 64)
owned = memory.owns(block)
library.MKL_free(block)
print(json.dumps({"probed": probed, "reason": reason, "untouched": pointers() == before,
                  "owned": owned, "limit": memory.counters()["limit"]}))
"""


@served_here
class TestLibraries:
    """Which libraries the pool is put under; one that looks like MKL's stands in for them."""

    def outcome(self, path, name="libdouble", used=""):
        return types.SimpleNamespace(**run(DOUBLE_SCRIPT, path, name, used))

    def assert_left_alone(self, outcome, reason):
        assert reason in outcome.reason
        assert (outcome.untouched, outcome.owned, outcome.limit) == (True, False, 0)

    def test_one_that_has_what_mkl_has(self, tmp_path):
        path = tmp_path / "libdouble-1a2b.so.4"
        build_library("mkl_double.cpp", path)
        outcome = self.outcome(path)
        assert (outcome.probed, outcome.reason) == (None, None)
        assert (outcome.untouched, outcome.owned, outcome.limit) == (False, True, 2**26)

    @pytest.mark.parametrize(
        ("macro", "reason"),
        [
            ("READ_ONLY", "has no MKL of its own"),
            ("INCOMPLETE", "has no MKL of its own"),
            ("REPLACED", "have already been replaced"),
        ],
    )
    def test_one_that_differs(self, tmp_path, macro, reason):
        path = tmp_path / "libdouble.so"
        build_library("mkl_double.cpp", path, f"-D{macro}")
        outcome = self.outcome(path)
        self.assert_left_alone(outcome, reason)
        assert outcome.probed == outcome.reason

    def test_one_whose_mkl_is_another_librarys(self, tmp_path):
        shared, path = tmp_path / "libshared.so", tmp_path / "libdouble.so"
        build_library("mkl_double.cpp", shared)
        build_library("mkl_double.cpp", path, "-DELSEWHERE", shared)
        outcome = self.outcome(path)
        self.assert_left_alone(outcome, "has no MKL of its own")
        assert outcome.probed == outcome.reason

    def test_one_that_has_allocated_before(self, tmp_path):
        path = tmp_path / "libdouble.so"
        build_library("mkl_double.cpp", path)
        outcome = self.outcome(path, used="used")
        self.assert_left_alone(outcome, "had allocated before")

    @pytest.mark.parametrize("name", ["libdoubl", "libdouble.so.9", "double", "nothing"])
    def test_one_of_another_name(self, tmp_path, name):
        path = tmp_path / "libdouble.so"
        build_library("mkl_double.cpp", path)
        self.assert_left_alone(self.outcome(path, name), "is not loaded")

    def test_two_of_one_name(self, tmp_path):
        path, other = tmp_path / "libdouble-1.so", tmp_path / "libdouble-2.so"
        build_library("mkl_double.cpp", path)
        build_library("mkl_double.cpp", other)
        code = f"import ctypes; ctypes.CDLL({str(other)!r})\n" + DOUBLE_SCRIPT
        outcome = types.SimpleNamespace(**run(code, path, "libdouble", ""))
        self.assert_left_alone(outcome, "loaded more than once")

    def test_one_without_anything_of_mkl(self):
        assert "has no MKL of its own" in _inference_memory.why_not("libstdc++")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A model with the encoder of Whisper tiny and random weights."""
    directory = tmp_path_factory.mktemp("tiny")
    script = ROOT / "perf" / "random_whisper.py"
    subprocess.run(
        [sys.executable, script, "tiny", directory],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])},
        check=True,
    )
    return directory


COMMON = """
import ctypes, gc, hashlib, json, os, resource, sys, threading
import numpy as np
from speechrnt import _inference_memory, inference_memory, load_model

def encode(model, batch=1, frames=3000):
    rng = np.random.default_rng(batch)
    return model.encode(rng.standard_normal((batch, model.n_mels, frames), dtype=np.float32))

def digest(encoding):
    return hashlib.sha256(np.asarray(encoding).tobytes()).hexdigest()

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()

def load(path, **options):
    return load_model(path, "cpu", cpu_threads=1, **options)

def hooks():
    "What MKL calls to take and to return memory."
    with open("/proc/self/maps") as file:
        [path] = {line.split()[-1] for line in file if "libctranslate2" in line}
    library = ctypes.CDLL(path)
    take = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_size_t)
    give = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
    at = lambda name: ctypes.c_void_p.in_dll(library, name).value
    return take(at("i_malloc")), give(at("i_free"))

"""

OUTPUTS_SCRIPT = """
from pathlib import Path
from speechrnt import WhisperModel

tiny = load(sys.argv[1])
outputs = [digest(encode(tiny, batch)) for batch in (1, 3)]
pico = WhisperModel("pico", cpu_threads=1)
for path in sorted(Path(sys.argv[2]).glob("*.wav")):
    segments, _ = pico.transcribe(path)
    outputs.append([(s.start, s.end, s.text, s.avg_logprob) for s in segments])
print(json.dumps([inference_memory.statistics().hits > 0, outputs]))
"""


@served_here
class TestModels:
    def test_outputs_are_the_same_with_and_without(self, tiny, samples):
        code = COMMON + OUTPUTS_SCRIPT
        used, outputs = run(code, tiny, samples)
        unused, expected = run(code, tiny, samples, SPEECHRNT_INFERENCE_MEMORY="off")
        assert (used, unused) == (True, False)
        assert outputs == expected

    def test_encoding_30_s_again_faults_in_no_pages(self, tiny):
        faults = run(
            COMMON
            + """
def faults(model):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    encode(model)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

model = load(sys.argv[1])
for _ in range(3):
    encode(model)
print(json.dumps([faults(model) for _ in range(5)]))
""",
            tiny,
        )
        # 77 000 without the pool. What is left is not memory of tensors.
        assert sorted(faults)[2] < 1000

    def test_memory_of_others_is_not_touched(self, tiny):
        found = run(
            COMMON
            + """
libc = ctypes.CDLL(None)
def functions():
    return [ctypes.cast(libc[name], ctypes.c_void_p).value
            for name in ("malloc", "calloc", "realloc", "free")]
before = functions()
model = load(sys.argv[1])
libc.malloc.restype = ctypes.c_void_p
owned = [_inference_memory.owns(np.empty(size, np.uint8).ctypes.data)
         for size in (1, 2**20, 2**26, 2**28)]
owned += [_inference_memory.owns(libc.malloc(2**26))]
encoding = encode(model)
view = np.asarray(encoding)
print(json.dumps([functions() == before, owned, _inference_memory.owns(view.ctypes.data)]))
""",
            tiny,
        )
        assert found == [True, [False] * 5, True]

    def test_unloading_returns_everything_and_trim_gives_it_back(self, tiny):
        weights, after, reserved, released, fallen, end = run(
            COMMON
            + """
model = load(sys.argv[1])
weights = inference_memory.statistics().in_use
encode(model, 2)
gc.collect()
after = inference_memory.statistics().in_use
model.whisper.unload_model()
del model
reserved = inference_memory.statistics().reserved
before = resident()
released = inference_memory.trim()
fallen = before - resident()
end = inference_memory.statistics()
print(json.dumps([weights, after, reserved, released, fallen, [end.in_use, end.blocks,
                  end.reserved]]))
""",
            tiny,
        )
        assert weights > 8 * MIB
        assert weights == after
        assert released == reserved > 100 * MIB
        assert fallen > 0.9 * released
        assert end == [0, 0, 0]

    def test_beyond_the_limit_libc_serves_the_same_results(self, tiny):
        code = (
            COMMON
            + """
if sys.argv[2] != "none":
    inference_memory.configure(limit=int(sys.argv[2]))
model = load(sys.argv[1])
result = digest(encode(model))
end = inference_memory.statistics()
print(json.dumps([result, end.overflows, end.limit, end.reserved]))
"""
        )
        expected, overflows, *_ = run(code, tiny, "none")
        assert overflows == 0
        result, overflows, limit, reserved = run(code, tiny, 32 * MIB)
        assert result == expected
        assert overflows > 0
        assert reserved <= limit == 32 * MIB

    def test_workers_at_once(self, tiny):
        results, expected, in_use = run(
            COMMON
            + """
from concurrent.futures import ThreadPoolExecutor
model = load(sys.argv[1], num_workers=2)
expected = [digest(encode(model, batch)) for batch in (1, 2)]
before = inference_memory.statistics().in_use
with ThreadPoolExecutor(4) as pool:
    results = list(pool.map(lambda batch: digest(encode(model, batch)), [1, 2] * 4))
print(json.dumps([results, expected, inference_memory.statistics().in_use - before]))
""",
            tiny,
        )
        assert results == expected * 4
        assert in_use == 0

    def test_a_child_of_a_busy_process_can_allocate(self, tiny):
        code = """
import signal, warnings
warnings.simplefilter("ignore", DeprecationWarning)  # forking with threads is the point
model = load(sys.argv[1])
take, give = hooks()
stop = threading.Event()
def work():
    while not stop.is_set():
        for _ in range(100):
            give(take(2**20))
threads = [threading.Thread(target=work) for _ in range(2)]
for thread in threads:
    thread.start()
codes = []
for _ in range(100):
    child = os.fork()
    if child == 0:
        signal.alarm(20)
        block = take(2**22)
        ctypes.memset(block, 1, 2**22)
        os._exit(0 if _inference_memory.owns(block) else 1)
    codes.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
stop.set()
for thread in threads:
    thread.join()
print(json.dumps(codes))
"""
        assert run(COMMON + code, tiny) == [0] * 100

    def test_the_process_ends_with_models_and_outputs_alive(self, tiny):
        code = """
model = load(sys.argv[1])
outputs = [encode(model) for _ in range(2)]
kept_by_nobody = load(sys.argv[1])
print(json.dumps(inference_memory.statistics().blocks > 0))
"""
        assert run(COMMON + code, tiny)

    def test_after_a_model_loaded_by_other_means_it_is_too_late(self, tiny):
        status, limit, hits = run(
            """
import ctranslate2
other = ctranslate2.models.Whisper(__import__("sys").argv[1], intra_threads=1)
"""
            + COMMON
            + """
model = load(sys.argv[1])
encode(model)
end = inference_memory.statistics()
print(json.dumps([inference_memory.status(), end.limit, end.hits + end.misses]))
""",
            tiny,
        )
        assert status.startswith("off: CTranslate2's library: it had allocated before")
        assert (limit, hits) == (0, 0)


@served_here
class TestSwitches:
    def test_it_is_on_for_a_model_on_the_cpu(self):
        before, after, limit = run(
            COMMON
            + """
from speechrnt.system import usable_memory
before = inference_memory.status()
load("pico")
print(json.dumps([before, inference_memory.status(),
                  inference_memory.statistics().limit / usable_memory()]))
"""
        )
        assert before == "pool"
        assert after.startswith("pool, up to ")
        assert limit == pytest.approx(0.5, abs=0.01)

    def test_the_environment_turns_it_off(self):
        found = run(
            COMMON
            + """
before = inference_memory.status()
encode(load("pico"))
end = inference_memory.statistics()
print(json.dumps([before, inference_memory.status(), end.limit, end.peak, end.overflows]))
""",
            SPEECHRNT_INFERENCE_MEMORY="off",
        )
        assert found == ["off", "off, as configured", 0, 0, 0]

    def test_configure_goes_before_the_environment(self):
        code = "inference_memory.configure('pool', 2**27); load('pico')\n"
        code += "print(json.dumps(inference_memory.status()))"
        assert run(COMMON + code, SPEECHRNT_INFERENCE_MEMORY="off") == "pool, up to 128 MiB"

    def test_it_can_be_turned_off_and_on_while_a_model_is_loaded(self, tiny):
        blocks, again, same = run(
            COMMON
            + """
model = load(sys.argv[1])
first = digest(encode(model))
held = inference_memory.statistics()
inference_memory.configure("off")
second = digest(encode(model))
off = inference_memory.statistics()
inference_memory.configure("pool")
third = digest(encode(model))
on = inference_memory.statistics()
print(json.dumps([[held.blocks, off.blocks, off.hits + off.misses - held.hits - held.misses],
                  on.hits > off.hits, first == second == third]))
""",
            tiny,
        )
        assert blocks[0] == blocks[1] > 0
        assert blocks[2] == 0
        assert (again, same) == (True, True)

    def test_mallopt_is_the_other_way(self, tiny):
        status, faults, limit = run(
            COMMON
            + """
inference_memory.configure("mallopt")
model = load(sys.argv[1])
for _ in range(3):
    encode(model)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(3):
    encode(model)
faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(json.dumps([inference_memory.status(), faults, inference_memory.statistics().limit]))
""",
            tiny,
        )
        assert status == "kept by glibc (mallopt)"
        assert faults < 3000
        assert limit == 0

    def test_the_environment_is_checked(self):
        code = COMMON + "load('pico')"
        done = start(code, SPEECHRNT_INFERENCE_MEMORY="yes")
        assert "OptionError: SPEECHRNT_INFERENCE_MEMORY='yes' is unknown; use one of pool, " in (
            done.stderr
        )


def test_arguments_are_checked():
    with pytest.raises(OptionError, match="'on' is unknown; use one of pool, mallopt, off"):
        inference_memory.configure("on")
    with pytest.raises(OptionError, match="at least 2 MiB, not 1000 bytes"):
        inference_memory.configure(limit=1000)


def test_info_shows_it():
    done = subprocess.run(
        [sys.executable, "-m", "speechrnt", "info"],
        env=os.environ | {"PYTHONPATH": str(ROOT), "SPEECHRNT_INFERENCE_MEMORY": "off"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "inference memory    off" in done.stdout.splitlines()


class TestUsableMemory:
    """What the default limit is half of."""

    @pytest.fixture
    def limited(self, tmp_path, monkeypatch):
        """A function that puts this process in a control group, and limits into files."""

        def limit(membership, **limits):
            (tmp_path / "cgroup").write_text(membership)
            for directory, limit in limits.items():
                file = tmp_path / "fs" / directory.replace("_", "/")
                file.mkdir(parents=True, exist_ok=True)
                (file / "memory.max").write_text(limit)
                (file / "memory.limit_in_bytes").write_text(limit)

        monkeypatch.setattr(system, "_CGROUP_MEMBERSHIPS", tmp_path / "cgroup")
        monkeypatch.setattr(system, "_CGROUP_ROOT", tmp_path / "fs")
        return limit

    def physical(self):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")

    def test_without_a_container_the_machine_counts(self, limited):
        assert system.usable_memory() == self.physical()

    def test_the_strictest_group_of_cgroup_v2_counts(self, limited):
        limited("0::/a/b\n", a="1000000\n", a_b="max\n")
        assert system.usable_memory() == 1000000

    def test_a_group_of_cgroup_v1_counts(self, limited):
        limited("4:cpu:/x\n3:memory:/a\n", memory_a="2000000\n", cpu_x="1\n")
        assert system.usable_memory() == 2000000

    @pytest.mark.parametrize("limit", ["max\n", "9223372036854771712\n", "nonsense"])
    def test_a_group_without_a_limit_does_not_count(self, limited, limit):
        limited("0::/a\n", a=limit)
        assert system.usable_memory() == self.physical()


# GPUs, where there is none; see tests/gpu for the rest


@pytest.fixture
def no_gpu():
    if system.why_no_cuda() is None:
        pytest.skip("there is a GPU")
    yield system.why_no_cuda()
    inference_memory._gpus.clear()


def test_without_a_gpu_its_memory_is_off_and_that_is_no_error(no_gpu):
    assert inference_memory.status("cuda") == f"off: {no_gpu}"
    inference_memory.prepare("cuda:1")
    inference_memory.configure("pool", 2**30, "cuda")
    for device in ("cuda", "cuda:0", "cuda:1"):
        assert inference_memory.status(device) == f"off: {no_gpu}"
        with pytest.raises(GpuUnavailable, match=re.escape(no_gpu)):
            inference_memory.statistics(device)
        with pytest.raises(GpuUnavailable, match=re.escape(no_gpu)):
            inference_memory.trim(device=device)
        inference_memory.configure("off", device=device)


@pytest.mark.parametrize("device", ["gpu", "cuda:", "cuda:-1", "cuda:x", "CPU", "", None, 0])
def test_an_unknown_device_is_an_option_error(device):
    for function in (
        lambda: inference_memory.configure("pool", device=device),
        lambda: inference_memory.prepare(device),
        lambda: inference_memory.statistics(device),
        lambda: inference_memory.status(device),
        lambda: inference_memory.trim(device=device),
    ):
        with pytest.raises(OptionError, match="use 'cpu', 'cuda' or 'cuda:<number>'"):
            function()


def test_what_only_the_cpu_has_is_refused_for_a_gpu():
    with pytest.raises(OptionError, match="'mallopt' is for the CPU"):
        inference_memory.configure("mallopt", device="cuda")
    with pytest.raises(OptionError, match="'heap' is unknown"):
        inference_memory.configure("heap", device="cuda")
    with pytest.raises(OptionError, match="idle_s: a GPU's memory pool does not know"):
        inference_memory.trim(10, device="cuda")
