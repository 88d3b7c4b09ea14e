"""Memory on the GPU.

`available` tells whether there is any, and `why_unavailable` why not. Importing this module never
fails; asking it for a class of the pool raises `GpuUnavailable` where there is no GPU.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re

from .system import why_no_cuda

__all__ = ["available", "why_unavailable"]

_EXTRA = "pip install 'speechrnt[gpu]'"


def available() -> bool:
    """Whether GPU memory can be used here."""
    return why_unavailable() is None


def why_unavailable() -> str | None:
    """Return in one sentence why GPU memory cannot be used here; None if it can."""
    return why_no_cuda() or _why_not_built() or _why_no_bindings()


def _why_not_built() -> str | None:
    if importlib.util.find_spec(f"{__package__}._gpu") is None:
        return "this build of speechrnt has no GPU modules (it was built without cuda-bindings)"
    return None


def _why_no_bindings() -> str | None:
    try:
        version = importlib.metadata.version("cuda-bindings")
    except importlib.metadata.PackageNotFoundError:
        return f"cuda-bindings is not installed ({_EXTRA})"
    if not _is_supported(version):
        return f"cuda-bindings {version} does not fit ({_EXTRA})"
    return None


def _is_supported(version: str) -> bool:
    """Whether a version of cuda-bindings is in the range of the extra ``gpu`` in pyproject.toml."""
    parts = tuple(int(digits) for digits in re.findall(r"\d+", version)[:3])
    return (12, 9, 3) <= parts < (14,) and not (13, 0, 0) <= parts < (13, 0, 2)
