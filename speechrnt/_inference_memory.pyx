"""The pool that CTranslate2's CPU tensors live in.

`install` makes the MKL inside CTranslate2's library take every block of 512 KiB and more from the
pool. How, and what is checked before, is in ``_mkl_hook.h``; the pool is in ``_span_pool.h``.
Neither knows of Python.

All functions may be called from any thread at any time. Sizes are in bytes.
"""

from libc.stdint cimport uint64_t, uintptr_t

__all__ = ["LIBRARY", "counters", "install", "owns", "set_limit", "trim", "tune_malloc", "why_not"]

LIBRARY = "libctranslate2"


cdef extern from "_mkl_hook.h" namespace "speechrnt_memory" nogil:
    struct Counters:
        size_t limit
        size_t in_use
        size_t peak
        size_t reserved
        uint64_t blocks
        uint64_t hits
        uint64_t misses
        uint64_t overflows
        uint64_t trims

    const char *c_why_not "speechrnt_memory::why_not"(const char *library) noexcept
    const char *c_install "speechrnt_memory::install"(const char *library, size_t limit) noexcept
    bint c_owns "speechrnt_memory::owns"(const void *block) noexcept
    void c_set_limit "speechrnt_memory::set_limit"(size_t bytes) noexcept
    size_t c_trim "speechrnt_memory::trim"(uint32_t seconds) noexcept
    Counters c_counters "speechrnt_memory::counters"() noexcept
    bint c_tune_malloc "speechrnt_memory::tune_malloc"() noexcept


cdef size_t inference_memory_trim(uint32_t idle_s) noexcept nogil:
    return c_trim(idle_s)


def why_not(str library=LIBRARY):
    """Tell why a loaded library's memory functions cannot be replaced. Nothing is written.

    Parameters
    ----------
    library : str
        Its file name, up to the version.

    Returns
    -------
    str or None
        The reason; None if they can be replaced, or are.
    """
    cdef bytes name = library.encode()
    cdef const char *reason = c_why_not(name)
    return reason.decode() if reason else None


def install(size_t limit, str library=LIBRARY):
    """Make a loaded library take its large blocks from the pool, for the life of the process.

    Parameters
    ----------
    limit : int
        Bound of the pool's resident memory, at least 2 MiB; see `set_limit`.
    library : str
        Its file name, up to the version.

    Returns
    -------
    str or None
        Why it cannot be done, and has not been; None if all is well.
    """
    cdef bytes name = library.encode()
    cdef const char *reason = c_install(name, limit)
    return reason.decode() if reason else None


def owns(uintptr_t address):
    """Whether an address lies in the pool's range."""
    return c_owns(<const void *>address)


def set_limit(size_t size):
    """Bound the pool's resident memory, from now on.

    Parameters
    ----------
    size : int
        The bound, rounded down to 2 MiB. With 0, every new block is left to libc.
    """
    with nogil:
        c_set_limit(size)


def trim(uint32_t idle_s=0):
    """Give idle memory back to the system.

    Parameters
    ----------
    idle_s : int
        Keep what was used in the last so many seconds.

    Returns
    -------
    int
        How much was given back.
    """
    cdef size_t released
    with nogil:
        released = inference_memory_trim(idle_s)
    return released


def counters():
    """Read all counters at one moment.

    Returns
    -------
    dict of int
        See `speechrnt.inference_memory.InferenceMemory`.
    """
    return c_counters()


def tune_malloc():
    """Have glibc keep the memory of large blocks, of the whole process and for its life.

    Returns
    -------
    bool
        False where libc is another one; nothing has changed then.
    """
    return c_tune_malloc()
