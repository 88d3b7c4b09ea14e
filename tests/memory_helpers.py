"""How much memory this process has taken, by exact counts."""

import ctypes
import mmap
from pathlib import Path


class HeapState(ctypes.Structure):
    """glibc's `struct mallinfo2`."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            *("arena", "ordblks", "smblks", "hblks", "hblkhd"),
            *("usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"),
        )
    ]


def allocated_bytes():
    """Return how many bytes of the C heap are allocated, over all arenas.

    With another C library than glibc: 0.
    """
    try:
        mallinfo2 = ctypes.CDLL(None).mallinfo2
    except AttributeError:
        return 0
    mallinfo2.restype = HeapState
    state = mallinfo2()
    return state.uordblks + state.hblkhd


def pages_not_in_memory(address, size):
    """Return how many pages of this mapped, private memory have none behind them; on Linux."""
    start = address - address % mmap.PAGESIZE
    n_pages = -(-(address + size - start) // mmap.PAGESIZE)
    states = (ctypes.c_ubyte * n_pages)()
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p]
    if libc.mincore(start, n_pages * mmap.PAGESIZE, states):
        raise OSError(ctypes.get_errno(), "mincore failed")
    return sum(not state & 1 for state in states)


def anonymous_bytes():
    """Return how much memory that belongs to no file is resident; on Linux.

    From the page tables: the sums of `/proc/self/statm` may be off by dozens of pages for each
    core, and pages of files come and go as the system pleases.
    """
    for line in Path("/proc/self/smaps_rollup").read_text().splitlines():
        if line.startswith("Anonymous:"):
            return int(line.split()[1]) * 1024
    raise OSError("the system does not tell")
