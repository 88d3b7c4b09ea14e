"""Where CTranslate2 keeps its tensors on the CPU.

A Whisper encoder allocates the attention scores of a 30 s window anew in every layer, 54 MB for the
shape of tiny, and returns them. glibc gives blocks that large back to the system at once, which
makes the next layer fault in every page again: a quarter to a half of the encoder's time. So the
first model that is loaded on the CPU puts a pool under CTranslate2 that keeps this memory.

There is one pool for the whole process. It serves CTranslate2 and nothing else, and blocks of
512 KiB and more: temporaries, outputs that are still referenced, and weights. Every function here
may be called from any thread at any time.

The environment variable ``SPEECHRNT_INFERENCE_MEMORY`` chooses the mode of `configure` for programs
that do not call it.
"""

from __future__ import annotations

import os
import threading
from dataclasses import dataclass

from . import _inference_memory
from .errors import OptionError
from .system import usable_memory

__all__ = [
    "MODES",
    "InferenceMemory",
    "configure",
    "maintain",
    "prepare",
    "statistics",
    "status",
    "trim",
]

MODES = ("pool", "mallopt", "off")

_VARIABLE = "SPEECHRNT_INFERENCE_MEMORY"
_SMALLEST_LIMIT = 2 << 20
_KEEP_S = 10

_lock = threading.Lock()
_status: str | None = None  # None until a mode is in effect


@dataclass(frozen=True)
class InferenceMemory:
    """Counters of the pool, all read at one moment. Sizes are in bytes, counts since the start.

    Attributes
    ----------
    limit
        Bound on `reserved`; 0 while the pool is not used.
    in_use
        Size of the blocks that CTranslate2 holds.
    peak
        Largest `in_use` so far.
    reserved
        Memory that may be resident, in pages of 2 MiB: `in_use` and what is kept for later.
    blocks
        Number of blocks that CTranslate2 holds.
    hits
        Blocks that were resident already: no page faults.
    misses
        Blocks with pages that had to be faulted in.
    overflows
        Blocks that did not fit under the limit and were left to libc.
    trims
        Times that idle memory was given back to the system.
    """

    limit: int
    in_use: int
    peak: int
    reserved: int
    blocks: int
    hits: int
    misses: int
    overflows: int
    trims: int


def configure(mode: str = "pool", limit: int | None = None) -> None:
    """Choose how CTranslate2's memory on the CPU is kept, from now on, for the whole process.

    What was allocated before stays where it is.

    Parameters
    ----------
    mode
        ``"pool"``; ``"off"``, which leaves new blocks to libc; or ``"mallopt"``, which has glibc
        keep the memory of large blocks, for where the pool cannot be used. That concerns everything
        else in the process, too, has no limit, and cannot be undone.
    limit
        Bound of the pool's resident memory in bytes, at least 2 MiB; by default half of the memory
        that this process may use. Blocks beyond it are left to libc.

    Raises
    ------
    OptionError
        If the mode is unknown or the limit is too small.

    Notes
    -----
    A mode that cannot be had here is no error: everything works without it, and `status` tells why.
    The pool has to come before CTranslate2 loads its first model.
    """
    if mode not in MODES:
        raise OptionError(f"inference memory: {mode!r} is unknown; use one of {', '.join(MODES)}")
    if limit is not None and limit < _SMALLEST_LIMIT:
        raise OptionError(f"inference memory: the limit must be at least 2 MiB, not {limit} bytes")
    with _lock:
        _apply(mode, limit)


def prepare() -> None:
    """Put the mode of the environment into effect, unless one is; before a model is loaded.

    Raises
    ------
    OptionError
        If the environment names an unknown mode.
    """
    with _lock:
        if _status is None:
            _apply(_default_mode(), None)


def _default_mode() -> str:
    mode = os.environ.get(_VARIABLE, "pool")
    if mode not in MODES:
        raise OptionError(f"{_VARIABLE}={mode!r} is unknown; use one of {', '.join(MODES)}")
    return mode


def _apply(mode: str, limit: int | None) -> None:
    global _status
    if mode == "pool":
        limit = usable_memory() // 2 if limit is None else limit
        obstacle = _inference_memory.install(limit)
        _status = _describe_pool(obstacle) + ("" if obstacle else f", up to {limit >> 20} MiB")
        return
    _inference_memory.set_limit(0)
    if mode == "off":
        _status = "off, as configured"
    elif _inference_memory.tune_malloc():
        _status = "kept by glibc (mallopt)"
    else:
        _status = "off: mallopt needs glibc"


def _describe_pool(obstacle: str | None) -> str:
    return f"off: CTranslate2's library: {obstacle}" if obstacle else "pool"


def statistics() -> InferenceMemory:
    """Read the counters of the pool."""
    return InferenceMemory(**_inference_memory.counters())


def status() -> str:
    """Tell in one line how CTranslate2's memory is kept, and why not by the pool if it is not.

    Before a mode is in effect, that is what can be foreseen.

    Raises
    ------
    OptionError
        If the environment names an unknown mode.
    """
    if _status is not None:
        return _status
    mode = _default_mode()
    return _describe_pool(_inference_memory.why_not()) if mode == "pool" else mode


def trim(idle_s: int = 0) -> int:
    """Give the pool's idle memory back to the system.

    While models are used, what was idle for ten seconds is given back anyway. When nothing uses
    them any more, nothing runs that could do it, unless `maintain` does: call this then, or after
    unloading a model.

    Parameters
    ----------
    idle_s
        Keep what was used in the last so many seconds.

    Returns
    -------
    int
        Bytes given back.
    """
    return _inference_memory.trim(idle_s)


def maintain() -> None:
    """Give back what has been idle for ten seconds, for `speechrnt.pools.maintain_on`."""
    trim(_KEEP_S)
