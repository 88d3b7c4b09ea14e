"""What the tests of the inference memory share: compiled doubles and other processes."""

import ctypes
import json
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
NATIVE = Path(__file__).parent / "native"
KIB, MIB = 1 << 10, 1 << 20

CAN_BE_SERVED = sys.platform == "linux" and platform.machine() == "x86_64"
served_here = pytest.mark.skipif(not CAN_BE_SERVED, reason="only on x86-64 Linux")


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
        timeout=300,
    )


class CCounters(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in ("limit", "in_use", "peak", "reserved")]
    _fields_ += [
        (name, ctypes.c_uint64) for name in ("blocks", "hits", "misses", "overflows", "trims")
    ]


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
