"""cuBLAS, which CTranslate2 needs on GPUs and does not bring along.

CTranslate2's wheels open ``libcublas.so.12`` by this name when they first use a GPU. The dynamic
loader does not look where pip puts it, in the wheel ``nvidia-cublas-cu12``; but it takes a library
that is already loaded under that name. So `preload` loads it from there, before CTranslate2 does.
cuDNN is not needed.
"""

from __future__ import annotations

import ctypes
import importlib.util
import mmap
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from .errors import GpuUnavailable

__all__ = ["preload", "status"]

_CUBLAS = "libcublas.so.12"
_CUBLAS_LT = "libcublasLt.so.12"  # which it needs, and would look for as CTranslate2 does
_INSTALL = "pip install 'speechrnt[gpu]' (or nvidia-cublas-cu12; cuBLAS 13 does not fit)"
_MAPS = Path("/proc/self/maps")


def preload() -> None:
    """Load the cuBLAS that CTranslate2 will use, unless it is loaded, or not needed.

    That of the wheel goes first, then what the dynamic loader finds (``LD_LIBRARY_PATH``,
    ``ldconfig``). It stays loaded for the life of the process. To be called before a model is
    loaded on a GPU; any thread may do so, at any time.

    Raises
    ------
    GpuUnavailable
        If there is none that can be loaded; the message says what to install.
    """
    if not _is_needed() or _is_loaded():
        return
    obstacles = []
    for directory in _wheel_directories():
        try:
            ctypes.CDLL(str(directory / _CUBLAS_LT))
            ctypes.CDLL(str(directory / _CUBLAS))
        except OSError as error:
            obstacles.append(str(error))
        else:
            return
    try:
        ctypes.CDLL(_CUBLAS)
    except OSError as error:
        found = f"{'; '.join(obstacles)}" or str(error)
        raise GpuUnavailable(
            f"CTranslate2 needs cuBLAS 12 on a GPU, and {_CUBLAS} cannot be loaded ({found}): "
            f"{_INSTALL}"
        ) from error


def status() -> str:
    """Tell in one line which cuBLAS there is for CTranslate2, without loading one from a wheel."""
    if sys.platform != "linux" or not _is_needed():
        return "not used by this build of CTranslate2"
    if _is_loaded():
        return f"{_CUBLAS}, loaded"
    for directory in _wheel_directories():
        return str(directory / _CUBLAS)
    try:
        ctypes.CDLL(_CUBLAS)
    except OSError:
        return f"{_CUBLAS} was not found; on a GPU, CTranslate2 needs it: {_INSTALL}"
    return f"{_CUBLAS}, found by the dynamic loader"


def _is_needed() -> bool:
    """Whether CTranslate2's library contains the name: builds without CUDA do not."""
    try:
        lines = os.fsdecode(_MAPS.read_bytes()).splitlines()
    except OSError:
        return True
    paths = {line.split(maxsplit=5)[5] for line in lines if "/libctranslate2" in line}
    return any(_contains(Path(path), _CUBLAS.encode()) for path in paths)


def _contains(path: Path, name: bytes) -> bool:
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return data.find(name) >= 0
    except (OSError, ValueError):
        return True


def _is_loaded() -> bool:
    try:
        ctypes.CDLL(_CUBLAS, mode=os.RTLD_NOLOAD | os.RTLD_NOW)
    except OSError:
        return False
    return True


def _wheel_directories() -> Iterator[Path]:
    """Find the library in NVIDIA's wheels, which share the namespace package ``nvidia``."""
    try:
        specification = importlib.util.find_spec("nvidia")
    except (ImportError, ValueError):
        specification = None
    if specification is not None:
        for place in specification.submodule_search_locations or ():
            directory = Path(place) / "cublas" / "lib"
            if (directory / _CUBLAS).is_file():
                yield directory
