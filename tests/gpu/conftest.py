"""Tests that need a GPU, or the test double of its driver; see ../test_gpu.py, which runs them.

``SPEECHRNT_CUDA`` chooses: ``double``, which must be loaded before anything looks for a driver,
hence here and in a process of its own, or ``real``.
"""

import os
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent))

_double = None
if os.environ.get("SPEECHRNT_CUDA") == "double":
    from native import cuda_double

    _double = cuda_double.load()


@pytest.fixture
def double():
    """The double, with the memory of 8 GiB free and nothing held back or failing."""
    if _double is None:
        pytest.skip("needs the test double of the driver")
    _double.configure()
    return _double
