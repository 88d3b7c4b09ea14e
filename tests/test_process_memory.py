"""The memory that benchmarks show is that of their processes, not of who has started them."""

import json
import mmap
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

PERF = Path(__file__).parent.parent / "perf"
MIB = 1 << 20

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="/proc is Linux's")

PROGRAM = """
import json
from process_memory import peak_bytes, resident_bytes

before = peak_bytes()
memory = bytearray(64 << 20)
during = peak_bytes(), resident_bytes()
del memory
print(json.dumps([before, during, peak_bytes(), resident_bytes()]))
"""


def test_memory_of_a_large_parents_child():
    with mmap.mmap(-1, 256 * MIB) as memory:
        np.frombuffer(memory, np.uint8)[:: mmap.PAGESIZE] = 1
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM],
            env={"PYTHONPATH": str(PERF)},
            stdout=subprocess.PIPE,
            check=True,
            timeout=60,
        )
    before, (peak, resident), peak_after, resident_after = json.loads(done.stdout)
    assert before < 64 * MIB < resident
    # Sums of pages may be off by some for each thread.
    assert peak == pytest.approx(before + 64 * MIB, abs=8 * MIB)
    assert peak_after == pytest.approx(peak, abs=MIB)
    assert resident_after < 64 * MIB
