"""Memory on the GPU: a pool of it, and memory of the host that the GPU copies fast.

`available` tells whether there is a GPU to use, and `why_unavailable` why not. Importing this
module never fails, and loads neither the driver nor cuda-bindings; asking it for what needs them
raises `GpuUnavailable` where they cannot be used.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import re
from typing import TYPE_CHECKING, Any

from ._gpu_types import Defragmentation, GpuMemoryHealth, GpuMemoryStatistics
from .errors import GpuUnavailable
from .system import why_no_cuda

if TYPE_CHECKING:
    from ._gpu import GpuMemoryHandle, GpuMemoryPool, GpuStream
    from ._gpu_driver import device_count, device_memory, device_name
    from ._gpu_pinned import pinned_memory

__all__ = [
    "Defragmentation",
    "GpuMemoryHandle",
    "GpuMemoryHealth",
    "GpuMemoryPool",
    "GpuMemoryStatistics",
    "GpuStream",
    "available",
    "device_count",
    "device_memory",
    "device_name",
    "pinned_memory",
    "why_unavailable",
]

_MODULES = {
    "GpuMemoryHandle": "_gpu",
    "GpuMemoryPool": "_gpu",
    "GpuStream": "_gpu",
    "device_count": "_gpu_driver",
    "device_memory": "_gpu_driver",
    "device_name": "_gpu_driver",
    "pinned_memory": "_gpu_pinned",
}
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


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    reason = why_unavailable()
    if reason is not None:
        raise GpuUnavailable(f"GPU memory cannot be used: {reason}")
    value = getattr(importlib.import_module(f".{_MODULES[name]}", __package__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES})
