"""The memory of this process, for benchmarks that measure each side in a process of its own."""

import os
import re
from pathlib import Path


def resident_bytes():
    """Return the memory that this process has resident now."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGESIZE")


def peak_bytes():
    """Return the most memory that this process had resident."""
    # Not `getrusage`, which counts what the parent had before this program began.
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) << 10
