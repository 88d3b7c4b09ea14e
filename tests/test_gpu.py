"""Why there is no GPU; and all of tests/gpu, on a test double of the driver and on a real GPU."""

import importlib.metadata
import importlib.util
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
from native import cuda_double

from speechrnt import gpu, system

HERE = Path(__file__).parent / "gpu"
FILES = sorted(path.name for path in HERE.glob("test_*.py"))

built = importlib.util.find_spec("speechrnt._gpu") is not None
no_gpu = gpu.why_unavailable()


def run(file, cuda):
    """Run a file of tests/gpu in a process of its own, where the driver is `cuda`."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", str(HERE / file)],
        cwd=HERE.parent.parent,
        env={**os.environ, "SPEECHRNT_CUDA": cuda},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout


@pytest.mark.skipif(
    not (built and cuda_double.compiler()), reason="needs the GPU modules and a C compiler"
)
@pytest.mark.parametrize("file", FILES)
def test_on_the_double(file):
    run(file, "double")


@pytest.mark.gpu
@pytest.mark.skipif(no_gpu is not None, reason=f"needs a GPU: {no_gpu}")
@pytest.mark.parametrize("file", FILES)
def test_on_a_real_gpu(file):
    run(file, "real")


# Why there is none. What system.why_no_cuda says of the driver is in test_system.py.


@pytest.fixture
def driver(monkeypatch):
    monkeypatch.setattr(gpu, "why_no_cuda", lambda: None)


def with_bindings(monkeypatch, version):
    def found(name):
        if name == "cuda-bindings" and version is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return version

    monkeypatch.setattr(importlib.metadata, "version", found)


def without_module(monkeypatch, missing):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == missing else find(name)
    )


def test_on_macos_there_is_no_cuda(monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(platform, "system", lambda: "Darwin")
    assert not gpu.available()
    assert gpu.why_unavailable() == system.why_no_cuda() == "CUDA is not supported on Darwin"


def test_a_build_without_the_modules_is_said(monkeypatch, driver):
    without_module(monkeypatch, "speechrnt._gpu")
    assert gpu.why_unavailable() == (
        "this build of speechrnt has no GPU modules (it was built without cuda-bindings)"
    )


@pytest.mark.skipif(not built, reason="needs the GPU modules")
@pytest.mark.parametrize(
    ("version", "sentence"),
    [
        (None, "cuda-bindings is not installed (pip install 'speechrnt[gpu]')"),
        ("12.8.0", "cuda-bindings 12.8.0 does not fit (pip install 'speechrnt[gpu]')"),
        ("12.9.2", "cuda-bindings 12.9.2 does not fit (pip install 'speechrnt[gpu]')"),
        ("12.9.3", None),
        ("12.9.10", None),
        ("13.0.1", "cuda-bindings 13.0.1 does not fit (pip install 'speechrnt[gpu]')"),
        ("13.0.2", None),
        ("13.5.0", None),
        ("14.0.0", "cuda-bindings 14.0.0 does not fit (pip install 'speechrnt[gpu]')"),
    ],
)
def test_cuda_bindings_must_be_there_and_fit(monkeypatch, driver, version, sentence):
    with_bindings(monkeypatch, version)
    assert gpu.why_unavailable() == sentence
    assert gpu.available() == (sentence is None)


def test_importing_needs_neither_driver_nor_cuda_bindings():
    script = """
import sys
for name in ("cuda", "cuda.bindings", "cuda.bindings.cydriver", "speechrnt._gpu"):
    sys.modules[name] = None
import speechrnt, speechrnt.gpu
assert not speechrnt.gpu.available()
"""
    subprocess.run([sys.executable, "-c", script], check=True)
