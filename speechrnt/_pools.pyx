"""Pools of things that are costly to make: limits, statistics, and a pool of Python objects.

A pool lends and takes back. What it lent is *in use*, what it keeps for the next acquire is
*idle*, both together are *reserved*. An acquire served from what is idle is a *hit*; one for which
something was made is a *miss*; one beyond the limit, made for once and dropped at its release, is
an *overflow*.

All pools take a `PoolLimits`, and have ``trim``, ``maintain``, ``close``, ``health`` and
``statistics``. Nothing is cleaned up inside an acquire or a release: ``maintain`` does it, called
about once per second, by `speechrnt.pools.maintain_on` or by hand. Pools may be used from all
threads, and what was acquired on one thread may be released on another. In the child of a fork,
pools go on with what the child inherited: its copies of the idle objects, and the leases that its
one thread holds.

The pool of fixed-size C objects, which the pools of records build on, is in _pools.pxd.
"""

cimport cython
from cpython.mem cimport PyMem_Calloc, PyMem_Free
from libc.math cimport INFINITY
from libc.stdint cimport uint32_t, uint64_t

import time
from dataclasses import dataclass
from types import GenericAlias

from speechrnt.errors import HandleError, OptionError, PoolClosedError, PoolExhausted

__all__ = ["Lease", "ObjectPool", "PoolHealth", "PoolLimits", "PoolStatistics"]


cdef extern from "_object_slab.h" namespace "speechrnt_pools" nogil:
    const uint32_t kMaxSlots

    cppclass Demand:
        void observe(uint32_t in_use)
        void close_epoch(uint32_t in_use)
        uint32_t wanted()

    int pool_new(const sr_pool_options &options, sr_pool **result)
    int pool_free(sr_pool *pool)
    int pool_acquire(sr_pool *pool, uint64_t *handle, void **object)
    int pool_release(sr_pool *pool, uint64_t handle)
    void *pool_object(const sr_pool *pool, uint64_t handle)
    void pool_trim(sr_pool *pool)
    void pool_maintain(sr_pool *pool, double now, double epoch, double free_after)
    void pool_statistics(const sr_pool *pool, sr_pool_statistics *result)
    void handle_fork()


cdef int object_pool_new(const sr_pool_options *options, sr_pool **pool) noexcept nogil:
    return pool_new(options[0], pool)


cdef int object_pool_free(sr_pool *pool) noexcept nogil:
    return pool_free(pool)


cdef int object_pool_acquire(sr_pool *pool, uint64_t *handle, void **object) noexcept nogil:
    return pool_acquire(pool, handle, object)


cdef int object_pool_release(sr_pool *pool, uint64_t handle) noexcept nogil:
    return pool_release(pool, handle)


cdef void *object_pool_get(sr_pool *pool, uint64_t handle) noexcept nogil:
    return pool_object(pool, handle)


cdef void object_pool_trim(sr_pool *pool) noexcept nogil:
    pool_trim(pool)


cdef void object_pool_maintain(
    sr_pool *pool, double now, double epoch, double free_after,
) noexcept nogil:
    pool_maintain(pool, now, epoch, free_after)


cdef void object_pool_statistics(sr_pool *pool, sr_pool_statistics *statistics) noexcept nogil:
    pool_statistics(pool, statistics)


handle_fork()


cdef int raise_status(int status, object limit) except -1:
    if status == SR_EXHAUSTED:
        raise PoolExhausted(f"the pool is at its limit of {limit}")
    if status == SR_NO_MEMORY:
        raise PoolExhausted("the system has no memory left for the pool")
    if status == SR_STALE:
        raise HandleError("the handle was released already")
    if status == SR_FOREIGN:
        raise HandleError("the handle is not of this pool")
    if status == SR_CLOSED:
        raise PoolClosedError("the pool is closed")
    return 0


cdef double seconds_of(object now) except -1:
    """The time that maintenance is told, or else that of the system."""
    cdef double seconds
    if now is None:
        return time.monotonic()
    try:
        seconds = now
    except (TypeError, OverflowError):
        seconds = -1
    if not 0 <= seconds < INFINITY:
        raise OptionError(f"now must be a number of seconds, 0 or more, not {now!r}")
    return seconds


@dataclass(frozen=True)
class PoolLimits:
    """How large a pool may be, and how fast it shrinks.

    Parameters
    ----------
    initial_size : int
        Made at the start, and never cleaned up before the pool is closed.
    soft_size : int, optional
        What clean-up leaves reserved at most, however high the demand was; `max_size` if not given.
    max_size : int
        What may be reserved, from 1 to 524 288.
    soft_bytes, max_bytes : int, optional
        The same in bytes; no limit if not given. Both kinds of limit hold at once.
    overflow : {"raise", "allocate"}
        What an acquire beyond the limit does: raise `PoolExhausted`, or be served for once, up to
        as much again as the limit, and then raise.
    epoch_s : float
        Demand is the largest number in use during the last ten epochs of this many seconds.
        ``maintain`` leaves idle what it takes to serve that and a quarter more.
    purge_after_s : float
        How long what demand does not explain stays idle before the system may have its pages, where
        the pool holds pages.
    free_after_s : float
        How long until it is freed.

    Raises
    ------
    OptionError
        A number is out of range, or the limits contradict each other.
    """

    initial_size: int = 0
    soft_size: int | None = None
    max_size: int = 1024
    soft_bytes: int | None = None
    max_bytes: int | None = None
    overflow: str = "raise"
    epoch_s: float = 1.0
    purge_after_s: float = 1.0
    free_after_s: float = 10.0

    def __post_init__(self):
        check_int("max_size", self.max_size, 1, kMaxSlots // 2)
        check_int("initial_size", self.initial_size, 0, self.max_size)
        if self.soft_size is not None:
            check_int("soft_size", self.soft_size, self.initial_size, self.max_size)
        if self.max_bytes is not None:
            check_int("max_bytes", self.max_bytes, 1, 2**62)
        if self.soft_bytes is not None:
            check_int("soft_bytes", self.soft_bytes, 0, self.max_bytes or 2**62)
        if self.overflow not in ("raise", "allocate"):
            raise OptionError(f"overflow must be 'raise' or 'allocate', not {self.overflow!r}")
        for name in ("epoch_s", "purge_after_s", "free_after_s"):
            value = getattr(self, name)
            if not isinstance(value, (int, float)) or not 0 <= value <= 1e9:
                raise OptionError(f"{name} must be seconds, from 0 to 1e9, not {value!r}")
        if self.free_after_s < self.purge_after_s:
            raise OptionError(
                f"free_after_s must be at least purge_after_s ({self.purge_after_s}), "
                f"not {self.free_after_s}"
            )

    def sizes(self, object_size):
        """Return the initial, soft and hard numbers for objects of `object_size` bytes.

        Raises
        ------
        OptionError
            The bytes allow for no object, or for fewer than `initial_size`.
        """
        hard = self.max_size
        soft = self.max_size if self.soft_size is None else self.soft_size
        if object_size and self.max_bytes is not None:
            hard = min(hard, self.max_bytes // object_size)
        if object_size and self.soft_bytes is not None:
            soft = min(soft, self.soft_bytes // object_size)
        if hard < max(self.initial_size, 1):
            raise OptionError(
                f"max_bytes must allow for {max(self.initial_size, 1)} objects of {object_size} "
                f"bytes, but is {self.max_bytes}"
            )
        return self.initial_size, max(self.initial_size, min(soft, hard)), hard


def check_int(name, value, low, high):
    if not isinstance(value, int) or isinstance(value, bool):
        raise OptionError(f"{name} must be an integer, not {value!r}")
    if not low <= value <= high:
        raise OptionError(f"{name} must be from {low} to {high}, not {value}")


@dataclass(frozen=True)
class PoolStatistics:
    """Counts of a pool at one moment, and since it was made.

    Attributes
    ----------
    hits, misses, overflows : int
        Acquires, by how they were served.
    in_use, idle : int
        Now.
    peak : int
        The largest number in use so far. Pools with per-thread caches count what lies in those, so
        that it may be too large by up to 32 per thread.
    reserved_bytes, idle_bytes : int
        Memory now. Idle pages that the system may take when it needs them are part of both.
    purges : int
        Chunks, blocks or objects that clean-up gave back, or whose pages it gave back.
    kept : int
        Leases that ended while arrays still referred to the memory.
    max_size, max_bytes : int or None
        The limits.
    """

    hits: int
    misses: int
    overflows: int
    in_use: int
    idle: int
    peak: int
    reserved_bytes: int
    idle_bytes: int
    purges: int
    kept: int
    max_size: int
    max_bytes: int | None

    @property
    def hit_rate(self):
        """Hits among all acquires; 0 before the first."""
        acquires = self.hits + self.misses + self.overflows
        return self.hits / acquires if acquires else 0.0


@dataclass(frozen=True)
class PoolHealth:
    """Use of a pool against its limit.

    Attributes
    ----------
    state : {"ok", "high", "full", "closed"}
        "high" from nine tenths of the limit on.
    utilisation : float
        In use against the limit, in numbers or in bytes, whichever is more. Above 1 with overflow.
    """

    state: str
    utilisation: float


def health_of(closed, utilisation):
    if closed:
        state = "closed"
    elif utilisation >= 1:
        state = "full"
    elif utilisation >= 0.9:
        state = "high"
    else:
        state = "ok"
    return PoolHealth(state, utilisation)


@cython.final
cdef class ObjectPool:
    """Python objects that are costly to make.

    The object used last is lent first. Calls into `factory`, `reset`, `validator` and `deleter` are
    made without a lock held; they may use the pool.

    Parameters
    ----------
    factory : callable
        Called without arguments; returns a new object, not None.
    limits : PoolLimits, optional
    reset : callable, optional
        Called with an object when it is released. If it raises, the object is dropped.
    validator : callable, optional
        Called with an idle object before it is lent. If the answer is false, or it raises, the
        object is dropped.
    deleter : callable, optional
        Called with each object that the pool drops.
    object_size : int
        What one object takes, in bytes, by the caller's estimate; the limits in bytes and the
        statistics rely on it.

    Raises
    ------
    OptionError
        `object_size` is negative, or the limits allow for no object.
    TypeError
        One of the callables is not callable.

    Notes
    -----
    A list takes about a quarter of the time per acquire and release. What the pool adds is a
    bound, a release that cannot be forgotten, clean-up, and statistics.

    Examples
    --------
    >>> pool = ObjectPool(bytearray, reset=bytearray.clear)
    >>> with pool.acquire() as buffer:
    ...     buffer.extend(b"abc")
    >>> pool.statistics().idle
    1
    """

    cdef object factory
    cdef object reset
    cdef object validator
    cdef object deleter
    cdef object limits
    cdef object __weakref__
    cdef list slots  # the idle objects, and then None: it keeps its length, to keep its memory
    cdef Py_ssize_t n_idle
    cdef double *idle_since  # of each idle object
    cdef Demand demand
    cdef Py_ssize_t object_size
    cdef uint32_t initial
    cdef uint32_t soft
    cdef uint32_t hard
    cdef bint may_overflow
    cdef readonly bint closed
    cdef uint32_t in_use
    cdef uint32_t n_overflow  # of those in use
    cdef uint32_t peak
    cdef uint64_t hits
    cdef uint64_t misses
    cdef uint64_t overflows
    cdef uint64_t purges
    cdef double clock  # as of the last maintenance
    cdef double epoch_start

    def __cinit__(
        self, factory, limits=None, *, reset=None, validator=None, deleter=None, object_size=0,
    ):
        limits = check_limits(limits)
        if not callable(factory):
            raise TypeError(f"factory must be callable, not {type(factory).__name__}")
        for name, function in (("reset", reset), ("validator", validator), ("deleter", deleter)):
            if function is not None and not callable(function):
                raise TypeError(f"{name} must be callable, not {type(function).__name__}")
        check_int("object_size", object_size, 0, 2**62)
        self.initial, self.soft, self.hard = limits.sizes(object_size)
        self.may_overflow = limits.overflow == "allocate"
        self.factory = factory
        self.reset = reset
        self.validator = validator
        self.deleter = deleter
        self.limits = limits
        self.object_size = object_size
        self.idle_since = <double *> PyMem_Calloc(self.hard, sizeof(double))
        if self.idle_since == NULL:
            raise MemoryError()
        self.slots = []
        for _ in range(self.initial):
            self.slots.append(self.make())
            self.n_idle += 1

    def __dealloc__(self):
        PyMem_Free(self.idle_since)

    def __del__(self):
        if self.slots is not None:
            self.close()

    @classmethod
    def __class_getitem__(cls, item):
        return GenericAlias(cls, item)

    def acquire(self):
        """Lend an object.

        Returns
        -------
        Lease

        Raises
        ------
        PoolExhausted
            The pool is at its limit.
        PoolClosedError
            The pool is closed.

        What `factory`, `validator` or `deleter` raise is passed on; the pool stays usable.
        """
        cdef Lease lease = Lease.__new__(Lease)
        while self.begin(lease):
            if self.validator is None or self.validate(lease):
                return lease
        try:
            lease.object = self.make()
        except BaseException:
            lease.pool = None
            with cython.critical_section(self):
                self.overflows -= lease.overflow
                self.misses -= not lease.overflow
            self.end(lease.overflow)
            raise
        return lease

    cdef object make(self):
        made = self.factory()
        if made is None:
            raise TypeError("factory must return an object, not None")
        return made

    cdef bint begin(self, Lease lease) except -1:
        """Count a lease, and give it an idle object; false if there is none."""
        with cython.critical_section(self):
            if self.closed:
                raise PoolClosedError("the pool is closed")
            if self.n_idle:
                self.n_idle -= 1
                lease.object = self.slots[self.n_idle]
                self.slots[self.n_idle] = None
                self.hits += 1
            elif self.in_use - self.n_overflow < self.hard:
                self.misses += 1
            elif self.may_overflow and self.n_overflow < self.hard:
                self.n_overflow += 1
                self.overflows += 1
                lease.overflow = True
            else:
                raise_status(SR_EXHAUSTED, f"{self.hard} objects")
            self.in_use += 1
            self.peak = max(self.peak, self.in_use)
            self.demand.observe(self.in_use)
            lease.pool = self
            return lease.object is not None

    cdef int end(self, bint overflow) except -1:
        with cython.critical_section(self):
            self.in_use -= 1
            self.n_overflow -= overflow
        return 0

    cdef bint validate(self, Lease lease) except -1:
        """Whether an idle object is fit for use; if it is not, it is dropped."""
        try:
            if self.validator(lease.object):
                return True
        except BaseException:
            self.drop(lease)
            raise
        self.drop(lease)
        return False

    cdef int drop(self, Lease lease) except -1:
        """Undo `begin` with an object that is not fit for use."""
        dropped = lease.object
        lease.object = None
        lease.pool = None
        with cython.critical_section(self):
            self.in_use -= 1
            self.hits -= 1
            self.purges += 1
        if self.deleter is not None:
            self.deleter(dropped)
        return 0

    cdef int take_back(self, object returned, bint overflow) except -1:
        cdef bint kept = False
        if self.reset is not None:
            try:
                self.reset(returned)
            except BaseException:
                self.end(overflow)
                if self.deleter is not None:
                    self.deleter(returned)
                raise
        with cython.critical_section(self):
            self.in_use -= 1
            self.n_overflow -= overflow
            if not overflow and not self.closed:
                if self.n_idle < len(self.slots):
                    self.slots[self.n_idle] = returned
                else:
                    self.slots.append(returned)
                self.idle_since[self.n_idle] = self.clock
                self.n_idle += 1
                kept = True
        if not kept and self.deleter is not None:
            self.deleter(returned)
        return 0

    cdef Py_ssize_t reserved(self) except -1:
        with cython.critical_section(self):
            return <Py_ssize_t> (self.in_use - self.n_overflow) + self.n_idle

    cdef int clean(self, Py_ssize_t surplus, double idle_before) except -1:
        """Drop up to `surplus` idle objects, the coldest first, idle since `idle_before`."""
        cdef Py_ssize_t n = 0
        cdef list dropped
        with cython.critical_section(self):
            while n < surplus and n < self.n_idle and self.idle_since[n] <= idle_before:
                n += 1
            dropped = self.slots[:n]
            del self.slots[:n]
            self.n_idle -= n
            for i in range(self.n_idle):
                self.idle_since[i] = self.idle_since[i + n]
            self.purges += n
        if self.deleter is not None:
            for n in range(len(dropped)):
                try:
                    self.deleter(dropped[n])
                except BaseException:
                    for item in dropped[n + 1:]:
                        self.delete(item)
                    raise
        return 0

    cdef void delete(self, object item) noexcept:
        """Call the deleter; what it raises goes to `sys.unraisablehook`."""
        self.deleter(item)

    def trim(self):
        """Drop all idle objects, but as many as leave `initial_size` reserved.

        What `deleter` raises is passed on when it has been called with all of them; after the first
        error, others go to `sys.unraisablehook`.
        """
        self.clean(self.reserved() - self.initial, self.clock)

    def maintain(self, now=None):
        """Drop what recent demand does not explain and has been idle for `free_after_s`.

        To be called about once per `epoch_s`: see `maintain_on`.

        Parameters
        ----------
        now : float, optional
            Seconds; ``time.monotonic()`` if not given. If it is less than the last, that counts.

        Raises
        ------
        OptionError
            `now` is no number, or negative, or not finite.
        """
        cdef uint32_t keep
        cdef double epoch = self.limits.epoch_s
        cdef double c_now = seconds_of(now)
        with cython.critical_section(self):
            self.clock = max(self.clock, c_now)
            if self.clock - self.epoch_start >= epoch:
                self.demand.close_epoch(self.in_use)
                self.epoch_start = self.clock
            keep = max(self.initial, min(self.soft, self.demand.wanted()))
        self.clean(self.reserved() - keep, self.clock - self.limits.free_after_s)

    def close(self):
        """Drop all idle objects and refuse further acquires.

        Objects that are in use stay good, and are dropped when they are released. Closing twice is
        harmless.
        """
        with cython.critical_section(self):
            self.closed = True
        self.clean(self.hard, self.clock)

    def health(self):
        """Return the use against the limit, as a `PoolHealth`."""
        return health_of(self.closed, <double> self.in_use / self.hard)

    def statistics(self):
        """Return a `PoolStatistics`."""
        max_bytes = self.limits.max_bytes
        with cython.critical_section(self):
            return PoolStatistics(
                hits=self.hits,
                misses=self.misses,
                overflows=self.overflows,
                in_use=self.in_use,
                idle=self.n_idle,
                peak=self.peak,
                reserved_bytes=(self.in_use + self.n_idle) * self.object_size,
                idle_bytes=self.n_idle * self.object_size,
                purges=self.purges,
                kept=0,
                max_size=self.hard,
                max_bytes=max_bytes,
            )


def check_limits(limits):
    if limits is None:
        return PoolLimits()
    if not isinstance(limits, PoolLimits):
        raise TypeError(f"limits must be PoolLimits, not {type(limits).__name__}")
    return limits


# No free list: an object that comes from one still counts as finalized, and __del__ runs once.
@cython.auto_pickle(False)
@cython.final
cdef class Lease:
    """An object on loan from an `ObjectPool`.

    Made by `ObjectPool.acquire`. It ends with `release`, at the end of a ``with`` block, or when
    the lease is collected. ``with pool.acquire() as x`` gives the object itself.
    """

    cdef ObjectPool pool  # None once released
    cdef object object
    cdef bint overflow

    def __init__(self):
        raise TypeError("leases come from ObjectPool.acquire")

    @classmethod
    def __class_getitem__(cls, item):
        return GenericAlias(cls, item)

    @property
    def value(self):
        """The object.

        Raises
        ------
        HandleError
            It was released.
        """
        with cython.critical_section(self):
            if self.pool is None:
                raise_status(SR_STALE, None)
            return self.object

    def release(self):
        """Give the object back. Any thread may.

        Raises
        ------
        HandleError
            It was released already.
        """
        cdef ObjectPool pool
        with cython.critical_section(self):
            pool = self.pool
            self.pool = None
            lent = self.object
            self.object = None
        if pool is None:
            raise_status(SR_STALE, None)
        pool.take_back(lent, self.overflow)

    def __enter__(self):
        return self.value

    def __exit__(self, exc_type, exc_value, traceback, /):
        if self.pool is not None:
            self.release()

    def __del__(self):
        if self.pool is not None:
            self.release()
