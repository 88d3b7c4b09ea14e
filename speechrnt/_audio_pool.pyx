"""A pool of audio buffers.

Buffers come in size classes: 64 KiB, 256 KiB, 1 MiB, and multiples of 1.875 MiB, into one of which
30 s of float32 at 16 kHz fit. All are aligned to 64 KiB, and lie in huge pages where the system has
them.

Memory never serves two users at once. A lease ends with its `release`, but arrays made from it may
live on, in a local variable or a queue: then the memory stays in use until the last of them is
gone, and only then becomes idle. Such leases are counted as *kept*. What counts as a reference is
what keeps an array alive: slices, memoryviews, tensors that share the memory. Raw addresses and
weak references do not.
"""

cimport cython
from cpython.buffer cimport PyBuffer_FillInfo, PyObject_GetBuffer
from cpython.object cimport PyObject
from cpython.pycapsule cimport PyCapsule_GetPointer, PyCapsule_IsValid
from cpython.ref cimport Py_INCREF, Py_XDECREF
from libc.stdint cimport uint32_t, uint64_t
from libc.string cimport memset
from speechrnt._pools cimport SR_EXHAUSTED, SR_INVALID, SR_OK, SR_STALE, raise_status, seconds_of


import numpy as np

from speechrnt._pools import PoolLimits, PoolStatistics, check_limits, health_of
from speechrnt.errors import OptionError

__all__ = ["AudioBuffer", "AudioBufferPool"]

AUDIO_LIMITS = PoolLimits(max_size=65536, max_bytes=2**30)
UNLIMITED = 2**62
cdef bytes MEMORY_CAPSULE = b"speechrnt.sr_memory"


cdef extern from "_block_pool.h" namespace "speechrnt_pools" nogil:
    const size_t kMaxBlock

    struct Views:
        PyObject *array
        PyObject *base

    int block_pool_new(const sr_audio_options &options, sr_audio_pool **result)
    int block_pool_free(sr_audio_pool *pool)
    int block_acquire(sr_audio_pool *pool, size_t size, uint64_t *handle, void **memory)
    int block_release(sr_audio_pool *pool, uint64_t handle, bint keep)
    void block_return(sr_audio_pool *pool, uint32_t index)
    void *block_memory(sr_audio_pool *pool, uint64_t handle)
    Views *block_views(sr_audio_pool *pool, uint32_t index)
    size_t block_capacity(sr_audio_pool *pool, uint32_t index)
    uint32_t block_slots(sr_audio_pool *pool)
    int block_reserve(sr_audio_pool *pool, size_t size, uint32_t count)
    void block_trim(sr_audio_pool *pool)
    void block_close(sr_audio_pool *pool)
    bint block_is_closed(sr_audio_pool *pool)
    void block_maintain(
        sr_audio_pool *pool, double now, double epoch, double purge_after, double unmap_after,
    )
    void block_statistics(sr_audio_pool *pool, sr_audio_statistics *result)
    bint is_sole_reference(PyObject *object)
    uint32_t handle_index(uint64_t handle)
    void handle_fork()


cdef int audio_pool_new(const sr_audio_options *options, sr_audio_pool **pool) noexcept nogil:
    return block_pool_new(options[0], pool)


cdef int audio_pool_free(sr_audio_pool *pool) noexcept nogil:
    return block_pool_free(pool)


cdef int audio_pool_acquire(
    sr_audio_pool *pool, size_t size, uint64_t *handle, void **memory,
) noexcept nogil:
    return block_acquire(pool, size, handle, memory)


cdef int audio_pool_release(sr_audio_pool *pool, uint64_t handle) noexcept nogil:
    return block_release(pool, handle, False)


cdef void *audio_pool_get(sr_audio_pool *pool, uint64_t handle) noexcept nogil:
    return block_memory(pool, handle)


cdef int audio_pool_reserve(sr_audio_pool *pool, size_t size, uint32_t count) noexcept nogil:
    return block_reserve(pool, size, count)


cdef void audio_pool_trim(sr_audio_pool *pool) noexcept nogil:
    block_trim(pool)


cdef void audio_pool_maintain(
    sr_audio_pool *pool, double now, double epoch, double purge_after, double free_after,
) noexcept nogil:
    block_maintain(pool, now, epoch, purge_after, free_after)


cdef void audio_pool_statistics(
    sr_audio_pool *pool, sr_audio_statistics *statistics,
) noexcept nogil:
    block_statistics(pool, statistics)


handle_fork()


cdef object float32 = np.dtype(np.float32)
cdef object int16 = np.dtype(np.int16)


cdef object dtype_of(object dtype):
    # Both names and types; anything else that numpy takes for one of the two is fine as well.
    if dtype is float32 or type(dtype) is str and dtype == "float32":
        return float32
    if dtype is int16 or type(dtype) is str and dtype == "int16":
        return int16
    try:
        wanted = np.dtype(dtype)
    except Exception:  # of many classes
        wanted = None
    if wanted == float32:
        return float32
    if wanted == int16:
        return int16
    raise OptionError(f"dtype must be float32 or int16, not {dtype!r}")


cdef size_t bytes_of(object n_samples, int itemsize) except 0:
    cdef Py_ssize_t n
    try:
        n = n_samples
    except OverflowError:
        n = -1
    if not 1 <= n <= <Py_ssize_t> kMaxBlock // itemsize:
        raise OptionError(
            f"n_samples must be from 1 to {kMaxBlock // itemsize}, not {n_samples}"
        )
    return n * itemsize


@cython.final
@cython.no_gc
cdef class AudioBufferPool:
    """Buffers for mono samples, float32 or int16, of any length up to 2 GiB.

    Parameters
    ----------
    limits : PoolLimits, optional
        Numbers are of buffers, bytes of their classes' sizes. If not given, 65 536 buffers and
        1 GiB. `initial_size` buffers for `initial_samples` are in memory from the start.
    initial_samples : int
        Length that the initial buffers are for, in samples of float32; 30 s unless given.
    memory : capsule, optional
        Where buffers come from: a capsule named ``speechrnt.sr_memory`` around the functions that
        speechrnt/capi.pxd declares as `sr_audio_memory`; page-locked memory, for example. Pages of
        such memory are not given to the system, only freed. The pool keeps the capsule.

    Raises
    ------
    OptionError
        A number is out of range, the limits have no room for the initial buffers, or `memory` is
        something else.
    PoolExhausted
        There is no memory for the initial buffers.

    Examples
    --------
    >>> pool = AudioBufferPool()
    >>> with pool.acquire(16000) as buffer:
    ...     buffer.array[:] = 0.5
    >>> pool.statistics().idle_bytes
    65536
    """

    cdef sr_audio_pool *pool
    cdef object limits
    cdef object memory
    cdef object __weakref__

    def __cinit__(self, limits=None, *, initial_samples=480_000, memory=None):
        cdef sr_audio_options options
        limits = AUDIO_LIMITS if limits is None else check_limits(limits)
        cdef size_t size = bytes_of(initial_samples, 4)
        options.hard = limits.max_size
        options.soft = limits.max_size if limits.soft_size is None else limits.soft_size
        options.hard_bytes = UNLIMITED if limits.max_bytes is None else limits.max_bytes
        options.soft_bytes = UNLIMITED if limits.soft_bytes is None else limits.soft_bytes
        options.overflow = limits.overflow == "allocate"
        options.memory = NULL
        if memory is not None:
            if not PyCapsule_IsValid(memory, MEMORY_CAPSULE):
                raise OptionError(
                    f"memory must be a capsule named {MEMORY_CAPSULE.decode()!r}, not {memory!r}"
                )
            options.memory = <sr_memory *> PyCapsule_GetPointer(memory, MEMORY_CAPSULE)
        self.limits = limits
        self.memory = memory
        status = audio_pool_new(&options, &self.pool)
        if status == SR_INVALID:
            raise OptionError("memory must have both of its functions")
        raise_status(status, "pools")
        if limits.initial_size:
            status = audio_pool_reserve(self.pool, size, limits.initial_size)
            if status == SR_EXHAUSTED:
                raise OptionError(
                    f"max_bytes must have room for {limits.initial_size} buffers of {size} "
                    f"bytes, but is {limits.max_bytes}"
                )
            raise_status(status, None)

    def __dealloc__(self):
        # Leases and kept blocks hold a reference to the pool: nothing is in use.
        if self.pool == NULL:
            return
        for index in range(block_slots(self.pool)):
            Py_XDECREF(block_views(self.pool, index).array)
        audio_pool_free(self.pool)

    def acquire(self, n_samples, dtype="float32", *, zero=False):
        """Lend a buffer.

        Parameters
        ----------
        n_samples : int
            Length in samples, 1 or more.
        dtype : {"float32", "int16"} or numpy dtype
        zero : bool
            Whether the samples are set to zero; otherwise they are arbitrary.

        Returns
        -------
        AudioBuffer

        Raises
        ------
        OptionError
            `n_samples` or `dtype` is out of range.
        PoolExhausted
            The pool is at its limit, or the system has no memory.
        PoolClosedError
            The pool is closed.
        """
        cdef AudioBuffer buffer = AudioBuffer.__new__(AudioBuffer)
        cdef size_t size
        cdef void *memory
        buffer.dtype = dtype_of(dtype)
        buffer.itemsize = 4 if buffer.dtype is float32 else 2
        size = bytes_of(n_samples, buffer.itemsize)
        buffer.n_samples = size // buffer.itemsize
        status = block_acquire(self.pool, size, &buffer.handle, &buffer.memory)
        if status != SR_OK:
            raise_status(status, self.limit())
        buffer.pool = self
        if zero:
            memory = buffer.memory
            with nogil:
                memset(memory, 0, size)
        return buffer

    cdef str limit(self):
        numbers = f"{self.limits.max_size} buffers"
        if self.limits.max_bytes is None:
            return numbers
        return f"{numbers} and {self.limits.max_bytes} bytes"

    def reserve(self, n_samples, count, dtype="float32"):
        """Have buffers idle and in memory, and leave them in clean-up from now on.

        Parameters
        ----------
        n_samples : int
            Length in samples.
        count : int
            How many, 1 or more.
        dtype : {"float32", "int16"} or numpy dtype

        Raises
        ------
        OptionError
            A number or `dtype` is out of range.
        PoolExhausted
            The limit or the system leaves no room for them. Those that were made are idle.
        """
        cdef size_t size = bytes_of(n_samples, dtype_of(dtype).itemsize)
        cdef uint32_t c_count
        cdef int status
        if not isinstance(count, int) or not 1 <= count <= self.limits.max_size:
            raise OptionError(f"count must be from 1 to {self.limits.max_size}, not {count!r}")
        c_count = count
        with nogil:
            status = audio_pool_reserve(self.pool, size, c_count)
        raise_status(status, self.limit())

    def trim(self):
        """Free all idle buffers but those reserved."""
        with nogil:
            audio_pool_trim(self.pool)

    def maintain(self, now=None):
        """Give memory back that recent demand does not explain.

        Of each size class, the buffers used least recently: after `purge_after_s` the system may
        have their pages when it needs them, and after `free_after_s` they are unmapped. To be
        called about once per `epoch_s`: see `maintain_on`.

        Parameters
        ----------
        now : float, optional
            Seconds; ``time.monotonic()`` if not given. If it is less than the last, that counts.

        Raises
        ------
        OptionError
            `now` is no number, or negative, or not finite.
        """
        cdef double c_now = seconds_of(now)
        cdef double epoch = self.limits.epoch_s
        cdef double purge_after = self.limits.purge_after_s
        cdef double free_after = self.limits.free_after_s
        with nogil:
            audio_pool_maintain(self.pool, c_now, epoch, purge_after, free_after)

    def close(self):
        """Free all idle buffers, reserved ones too, and refuse further acquires.

        Buffers in use stay good, and are freed when they are released. Closing twice is harmless.
        """
        with nogil:
            block_close(self.pool)

    @property
    def closed(self):
        """Whether `close` was called."""
        return block_is_closed(self.pool)

    def health(self):
        """Return the use against the limits, as a `PoolHealth`."""
        cdef sr_audio_statistics now
        audio_pool_statistics(self.pool, &now)
        utilisation = now.in_use / self.limits.max_size
        if self.limits.max_bytes is not None:
            utilisation = max(utilisation, now.in_use_bytes / self.limits.max_bytes)
        return health_of(self.closed, utilisation)

    def statistics(self):
        """Return a `PoolStatistics`."""
        cdef sr_audio_statistics now
        audio_pool_statistics(self.pool, &now)
        return PoolStatistics(
            hits=now.acquired - now.misses - now.overflows,
            misses=now.misses,
            overflows=now.overflows,
            in_use=now.in_use,
            idle=now.idle,
            peak=now.peak,
            reserved_bytes=now.in_use_bytes + now.idle_bytes,
            idle_bytes=now.idle_bytes,
            purges=now.purges,
            kept=now.kept,
            max_size=self.limits.max_size,
            max_bytes=self.limits.max_bytes,
        )


cdef sr_audio_pool *audio_pool_of(object pool) except NULL:
    return (<AudioBufferPool?> pool).pool


@cython.final
@cython.internal
@cython.no_gc
cdef class Base:
    """What the array of a block has as its base; both outlive the lease if slices do."""

    cdef void *memory
    cdef size_t size
    cdef int itemsize
    cdef AudioBufferPool pool  # set when the lease has ended: this object is to return the block
    cdef uint32_t index

    def __getbuffer__(self, Py_buffer *buffer, int flags):
        PyBuffer_FillInfo(buffer, self, self.memory, self.size, False, flags)

    def __dealloc__(self):
        if self.pool is not None:
            block_return(self.pool.pool, self.index)


@cython.final
@cython.no_gc
@cython.freelist(64)
cdef class AudioBuffer:
    """A buffer on loan from an `AudioBufferPool`.

    Made by `AudioBufferPool.acquire`. It ends with `release`, at the end of a ``with`` block, or
    when it is collected. A buffer is itself a one-dimensional, writable Python buffer.
    """

    cdef AudioBufferPool pool  # None once released
    cdef uint64_t handle
    cdef void *memory
    cdef Py_ssize_t n_samples
    cdef object dtype
    cdef int itemsize
    cdef object view

    def __init__(self):
        raise TypeError("audio buffers come from AudioBufferPool.acquire")

    @property
    @cython.critical_section
    def array(self):
        """The samples: a writable array of shape (n_samples,), the same at each call.

        Raises
        ------
        HandleError
            The buffer was released.
        """
        if self.pool is None:
            raise_status(SR_STALE, None)
        if self.view is None:
            self.view = self.whole_block()[:self.n_samples]
        return self.view

    cdef object whole_block(self):
        """The array of all of the block, which stays with it from lease to lease.

        Users see slices only, so that what they do to the shape or flags of theirs ends with it.
        """
        cdef uint32_t index = handle_index(self.handle)
        cdef Views *views = block_views(self.pool.pool, index)
        cdef size_t size = block_capacity(self.pool.pool, index)
        cdef Base base = None if views.array == NULL else <Base> views.base
        cdef PyObject *last
        if (
            base is None
            or base.memory != self.memory
            or base.size != size
            or base.itemsize != self.itemsize
        ):
            base = Base.__new__(Base)
            base.memory = self.memory
            base.size = size
            base.itemsize = self.itemsize
            array = np.ndarray((size // self.itemsize,), self.dtype, base)
            # Making it may have let another thread run, even one that released the buffer.
            if self.pool is None:
                raise_status(SR_STALE, None)
            last = views.array
            Py_INCREF(array)
            views.array = <PyObject *> array
            views.base = <PyObject *> base  # borrowed: the array holds it
            Py_XDECREF(last)
        return <object> views.array

    def release(self):
        """Give the buffer back. Any thread may.

        The memory becomes idle, or stays in use for as long as arrays of it are alive.

        Raises
        ------
        HandleError
            It was released already.
        """
        if not self.end():
            raise_status(SR_STALE, None)

    cdef bint end(self) noexcept:
        """End the lease; false if it has ended already."""
        cdef AudioBufferPool pool
        cdef Views *views
        cdef PyObject *array
        with cython.critical_section(self):
            pool = self.pool
            self.pool = None
            self.view = None
        if pool is None:
            return False
        views = block_views(pool.pool, handle_index(self.handle))
        array = views.array
        # One reference each, to the array from here and to the base from the array, means that
        # nobody else has one, and that nobody can come by one.
        if array == NULL or (is_sole_reference(array) and is_sole_reference(views.base)):
            block_release(pool.pool, self.handle, False)
            return True
        (<Base> views.base).pool = pool
        (<Base> views.base).index = handle_index(self.handle)
        views.array = NULL
        views.base = NULL
        block_release(pool.pool, self.handle, True)
        Py_XDECREF(array)
        return True

    def __enter__(self):
        return self

    def __exit__(self, exc_type, exc_value, traceback, /):
        self.end()

    def __dealloc__(self):
        self.end()

    def __getbuffer__(self, Py_buffer *buffer, int flags):
        # The consumer then holds the array, not this lease.
        PyObject_GetBuffer(self.array, buffer, flags)

    def __releasebuffer__(self, Py_buffer *buffer):
        # Never called, the array being the exporter. But numpy.frombuffer gives a buffer back at
        # once, and holds on to this object instead, if it is of a type without this method.
        pass
