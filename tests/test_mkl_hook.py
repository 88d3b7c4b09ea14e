"""Which libraries the inference memory is put under, each in a process of its own."""

import types

import pytest
from inference_helpers import build_library, run, served_here

from speechrnt import _inference_memory

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
