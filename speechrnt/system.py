"""What this process can use of the machine it runs on."""

from __future__ import annotations

import ctypes
import math
import os
import platform
import sys
from pathlib import Path

import ctranslate2

__all__ = ["cpu_name", "usable_cores", "why_no_gpu"]

_CPUINFO = Path("/proc/cpuinfo")
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
    quota = _cgroup_quota()
    return cores if quota is None else max(1, min(cores, math.ceil(quota)))


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
    if sys.platform != "linux":
        return f"CUDA is not supported on {platform.system()}"
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return "no NVIDIA driver is installed (libcuda.so.1 was not found)"
    code = driver.cuInit(0)
    if code:
        return f"the NVIDIA driver cannot be used here (cuInit returned error {code})"
    return "the NVIDIA driver sees a device, but this build of CTranslate2 does not"


def _cgroup_quota() -> float | None:
    """Return the CPU quota of this process's control groups in cores; None without one."""
    try:
        memberships = os.fsdecode(_CGROUP_MEMBERSHIPS.read_bytes()).splitlines()
    except OSError:
        return None
    quotas = []
    for membership in memberships:
        _, controllers, path = membership.split(":", 2)
        if not controllers:
            root, read = _CGROUP_ROOT, _read_quota_v2
        elif "cpu" in controllers.split(","):
            # Where it is mounted with others, the controller alone is a link to them.
            root, read = _CGROUP_ROOT / "cpu", _read_quota_v1
        else:
            continue
        # The strictest of the group and its parents holds. Inside a container the path may not
        # exist, as it is the host's; the container's own group is then at the root.
        group = root / path.lstrip("/")
        for directory in (group, *group.parents):
            quotas.append(read(directory))
            if directory == root:
                break
    return min((quota for quota in quotas if quota is not None), default=None)


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
