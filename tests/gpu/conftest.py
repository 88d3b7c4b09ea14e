"""Tests that need a GPU, or the test double of its driver; see ../test_gpu.py, which runs them.

``SPEECHRNT_CUDA`` chooses: ``double``, which must be loaded before anything looks for a driver,
hence here and in a process of its own, or ``real``.
"""

import gc
import os
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent))

_double = None
if os.environ.get("SPEECHRNT_CUDA") == "double":
    from native import cuda_double

    _double = cuda_double.load()


@pytest.fixture(autouse=True)
def _fresh_double():
    """With each test, the double has 8 GiB again, and what the last one left is collected."""
    gc.collect()
    if _double is not None:
        _double.configure()


@pytest.fixture
def double():
    """The test double of the driver."""
    if _double is None:
        pytest.skip("needs the test double of the driver")
    return _double
