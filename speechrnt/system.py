"""What this process can use of the machine it runs on."""

from __future__ import annotations

import ctypes
import math
import os
import platform
import resource
import sys
from collections.abc import Callable
from pathlib import Path

import ctranslate2

__all__ = [
    "cpu_name",
    "resident_memory",
    "usable_cores",
    "usable_memory",
    "why_no_cuda",
    "why_no_gpu",
]

_CUDA_ERROR_NO_DEVICE = 100
_OLDEST_CUDA = 12000  # as the driver writes 12.0
_CPUINFO = Path("/proc/cpuinfo")
_STATM = Path("/proc/self/statm")
_CGROUP_MEMBERSHIPS = Path("/proc/self/cgroup")
_CGROUP_ROOT = Path("/sys/fs/cgroup")


def usable_cores() -> int:
    """Return how many cores this process may keep busy.

    The cores of its affinity mask, or fewer where the CPU quota of a container allows less (rounded
    up to whole cores).
    """
    if sys.platform == "linux":
        cores = len(os.sched_getaffinity(0))
    else:
        cores = os.cpu_count() or 1
    quota = min(_cgroup_limits("cpu", _read_quota_v2, _read_quota_v1), default=None)
    return cores if quota is None else max(1, min(cores, math.ceil(quota)))


def usable_memory() -> int:
    """Return how much memory this process may use, in bytes.

    That of the machine, or less where a container allows less.
    """
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limits = _cgroup_limits("memory", _read_memory_v2, _read_memory_v1)
    return min([memory, *map(int, limits)])


def resident_memory() -> int:
    """Return how much memory this process has resident, in bytes.

    Where the system does not tell, the most that it has had so far.
    """
    try:
        pages = int(_STATM.read_text(encoding="ascii").split()[1])
    except (OSError, ValueError, IndexError):
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return pages * os.sysconf("SC_PAGE_SIZE")


def cpu_name() -> str:
    """Return the name of the processor, as the operating system gives it."""
    try:
        for line in _CPUINFO.read_text(encoding="utf-8", errors="replace").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                return value.strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def why_no_gpu() -> str | None:
    """Return in one sentence why CTranslate2 has no GPU to use; None if it has one."""
    if ctranslate2.get_cuda_device_count():
        return None
    return (
        why_no_cuda() or "the NVIDIA driver sees a device, but this build of CTranslate2 does not"
    )


def why_no_cuda() -> str | None:
    """Return in one sentence why no program can use an NVIDIA GPU here; None if one can."""
    if sys.platform != "linux":
        return f"CUDA is not supported on {platform.system()}"
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return "no NVIDIA driver is installed (libcuda.so.1 was not found)"
    code = driver.cuInit(0)
    if code == _CUDA_ERROR_NO_DEVICE:
        return "the NVIDIA driver sees no GPU"
    if code:
        return f"the NVIDIA driver cannot be used here (cuInit returned error {code})"
    version = ctypes.c_int()
    driver.cuDriverGetVersion(ctypes.byref(version))
    if version.value < _OLDEST_CUDA:
        supported = f"{version.value // 1000}.{version.value // 10 % 100}"
        return f"the NVIDIA driver is too old: it supports CUDA {supported}, and 12.0 is needed"
    return None


def _cgroup_limits(
    controller: str,
    read_v2: Callable[[Path], float | None],
    read_v1: Callable[[Path], float | None],
) -> list[float]:
    """Return what limits this process's control groups and their parents, where anything does."""
    try:
        memberships = os.fsdecode(_CGROUP_MEMBERSHIPS.read_bytes()).splitlines()
    except OSError:
        return []
    limits = []
    for membership in memberships:
        _, controllers, path = membership.split(":", 2)
        if not controllers:
            root, read = _CGROUP_ROOT, read_v2
        elif controller in controllers.split(","):
            # Where it is mounted with others, the controller alone is a link to them.
            root, read = _CGROUP_ROOT / controller, read_v1
        else:
            continue
        # The strictest of the group and its parents holds. Inside a container the path may not
        # exist, as it is the host's; the container's own group is then at the root.
        group = root / path.lstrip("/")
        for directory in (group, *group.parents):
            limits.append(read(directory))
            if directory == root:
                break
    return [limit for limit in limits if limit is not None]


def _read_quota_v2(directory: Path) -> float | None:
    try:
        quota, period = (directory / "cpu.max").read_text().split()
        return None if quota == "max" else int(quota) / int(period)
    except (OSError, ValueError):
        return None


def _read_quota_v1(directory: Path) -> float | None:
    try:
        quota = int((directory / "cpu.cfs_quota_us").read_text())
        return None if quota < 0 else quota / int((directory / "cpu.cfs_period_us").read_text())
    except (OSError, ValueError):
        return None


def _read_memory_v2(directory: Path) -> float | None:
    try:
        limit = (directory / "memory.max").read_text().strip()
        return None if limit == "max" else int(limit)
    except (OSError, ValueError):
        return None


def _read_memory_v1(directory: Path) -> float | None:
    try:
        # Without a limit this is the largest multiple of a page, more than any machine has.
        return int((directory / "memory.limit_in_bytes").read_text())
    except (OSError, ValueError):
        return None
