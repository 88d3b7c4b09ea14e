"""The pool of GPU memory without its face: `speechrnt._gpu` has the handles and the public classes.

How the pool works is described in _gpu_pool.h; the functions for code without the GIL are in the
declarations.
"""

cimport cython
from libc.stdint cimport uint64_t, uintptr_t
from speechrnt._gpu_driver cimport (
    device_number, error_text, gpu_driver, sr_gpu_driver, stream_create, stream_destroy,
    stream_query, stream_wait,
)
from speechrnt._pools cimport (
    SR_CLOSED, SR_EXHAUSTED, SR_INVALID, SR_NO_MEMORY, SR_OK, raise_status,
)

import operator

from speechrnt._gpu_driver import device_memory
from speechrnt._gpu_types import Defragmentation, GpuMemoryStatistics, mib
from speechrnt.errors import GpuError, GpuOutOfMemory, HandleError, OptionError, PoolClosedError

__all__ = ["BasePool", "GpuStream"]

BACKINGS = ("auto", "vmm", "segments")  # by their numbers in _gpu_types.h
LARGEST = 2**46  # kMaxSize of _gpu_state.h
NOT_READY = 600  # CUDA_ERROR_NOT_READY
FORKED = "the GPU cannot be used in a forked child; make the pool after the fork"


cdef extern from "_gpu_pool.h" namespace "speechrnt_gpu" nogil:
    const int kRetry

    struct Failure:
        int code
        const char *call

    Failure last_failure

    int gpu_pool_new(const sr_gpu_options &options, const sr_gpu_driver &, sr_gpu_pool **result)
    int gpu_pool_free(sr_gpu_pool *pool)
    int gpu_try_alloc(
        sr_gpu_pool *pool, size_t size, bint on_stream, void *stream, sr_gpu_block *result,
    )
    int gpu_alloc(
        sr_gpu_pool *pool, size_t size, bint on_stream, void *stream, sr_gpu_block *result,
    )
    int gpu_try_free(sr_gpu_pool *pool, uint64_t handle)
    int gpu_free(sr_gpu_pool *pool, uint64_t handle)
    int gpu_free_on(sr_gpu_pool *pool, uint64_t handle, void *stream)
    int gpu_flush(sr_gpu_pool *pool, void *stream)
    uint64_t gpu_address(sr_gpu_pool *pool, uint64_t handle)
    int gpu_defragment(sr_gpu_pool *pool, sr_gpu_defragmentation *result)
    int gpu_trim(sr_gpu_pool *pool, size_t keep, uint64_t *released)
    int gpu_close(sr_gpu_pool *pool)
    int gpu_statistics(sr_gpu_pool *pool, sr_gpu_statistics *result)
    int gpu_state(sr_gpu_pool *pool)
    void *gpu_context(sr_gpu_pool *pool)
    int gpu_judge(sr_gpu_pool *pool, int code, const char *call)
    void handle_fork()


cdef int gpu_pool_delete(sr_gpu_pool *pool) noexcept nogil:
    return gpu_pool_free(pool)


cdef int gpu_memory_alloc(sr_gpu_pool *pool, size_t size, sr_gpu_block *block) noexcept nogil:
    return gpu_alloc(pool, size, False, NULL, block)


cdef int gpu_memory_alloc_on(
    sr_gpu_pool *pool, size_t size, void *stream, sr_gpu_block *block,
) noexcept nogil:
    return gpu_alloc(pool, size, True, stream, block)


cdef int gpu_memory_free(sr_gpu_pool *pool, uint64_t handle) noexcept nogil:
    return gpu_free(pool, handle)


cdef int gpu_memory_free_on(sr_gpu_pool *pool, uint64_t handle, void *stream) noexcept nogil:
    return gpu_free_on(pool, handle, stream)


cdef int gpu_stream_flush(sr_gpu_pool *pool, void *stream) noexcept nogil:
    return gpu_flush(pool, stream)


cdef uint64_t gpu_memory_address(sr_gpu_pool *pool, uint64_t handle) noexcept nogil:
    return gpu_address(pool, handle)


cdef int gpu_pool_state(sr_gpu_pool *pool) noexcept nogil:
    return gpu_state(pool)


cdef void *gpu_pool_context(sr_gpu_pool *pool) noexcept nogil:
    return gpu_context(pool)


cdef int gpu_pool_judge(sr_gpu_pool *pool, int code, const char *call) noexcept nogil:
    return gpu_judge(pool, code, call)


cdef int gpu_memory_statistics(
    sr_gpu_pool *pool, sr_gpu_statistics *statistics,
) noexcept nogil:
    return gpu_statistics(pool, statistics)


handle_fork()


cdef str dead_context(int code):
    if code == 4:  # CUDA_ERROR_DEINITIALIZED
        return "the NVIDIA driver has shut down, as the process is exiting"
    return (
        f"the GPU cannot be used by this process any more: {error_text(code)}; what it held is "
        "lost, and only a new process can go on"
    )


cdef void *stream_address(object stream) except? NULL:
    """The CUstream of one of ours, of another library's, or of an integer."""
    if isinstance(stream, GpuStream):
        return (<GpuStream> stream).living()
    protocol = getattr(stream, "__cuda_stream__", None)
    try:
        address = stream
        if protocol is not None:
            _, address = protocol()
        return <void *> <uintptr_t> operator.index(address)
    except (TypeError, ValueError, OverflowError):
        raise OptionError(
            "stream must be a GpuStream, the address of a CUstream, or an object with "
            f"__cuda_stream__, not {stream!r}"
        ) from None


cdef size_t size_option(str name, object value, size_t low) except? 0:
    try:
        value = operator.index(value)
    except TypeError:
        raise OptionError(f"{name} must be a number of bytes, not {value!r}") from None
    if not low <= value <= LARGEST:
        raise OptionError(f"{name} must be from {low} to {LARGEST} bytes, not {value}")
    return value


cdef class BasePool:
    """All of `GpuMemoryPool` but `allocate`."""

    def __cinit__(
        self, device=0, *, initial=0, limit=None, alignment=512, chunk=32 * 2**20, backing="auto",
        defragment=True, trim_mempool=True,
    ):
        cdef sr_gpu_options options
        cdef int status
        self.device = device_number(device)
        if backing not in BACKINGS:
            raise OptionError(f"backing must be one of {', '.join(BACKINGS)}, not {backing!r}")
        options.device = self.device
        options.backing = BACKINGS.index(backing)
        options.alignment = size_option("alignment", alignment, 256)
        if options.alignment & (options.alignment - 1) or options.alignment > 2**21:
            raise OptionError(
                f"alignment must be a power of two from 256 to {2**21} bytes, not {alignment}"
            )
        options.chunk = size_option("chunk", chunk, options.alignment)
        options.limit = 0 if limit is None else size_option("limit", limit, options.chunk)
        options.initial = size_option("initial", initial, 0)
        if limit is not None and options.initial > options.limit:
            raise OptionError(
                f"initial must be at most the limit, {options.limit} bytes, not {initial}"
            )
        options.defragment = bool(defragment)
        options.trim_mempool = bool(trim_mempool)
        self.initial = options.initial
        self.moves = options.defragment
        with nogil:
            status = gpu_pool_new(options, gpu_driver()[0], &self.pool)
        if status == SR_INVALID:
            raise OptionError(
                "limit must have room for a chunk, and for initial in whole chunks, but is "
                + ("all memory of the GPU" if limit is None else f"{limit} bytes")
            )
        self.check(status, options.initial)

    def __dealloc__(self):
        # Blocks and streams hold a reference to the pool: none is in use, unless code without the
        # GIL leaked a block; then the pool stays.
        if self.pool == NULL:
            return
        if self.copies != NULL:
            self.destroy_stream(self.copies)
        with nogil:
            # Twice: what the driver refused once is tried again.
            if gpu_pool_free(self.pool) != SR_OK:
                gpu_pool_free(self.pool)

    cdef int check(self, int status, size_t size) except -1:
        """Raise the exception of a status, of a request of this size, unless it is SR_OK."""
        cdef Failure why = last_failure
        if status == SR_OK:
            return 0
        if status == SR_FORKED:
            raise GpuError(FORKED)
        if status == SR_CLOSED:
            raise PoolClosedError("the pool is closed")
        if status == SR_POISONED:
            raise GpuError(dead_context(why.code if self.pool == NULL else self.statistics().error))
        if status == SR_DRIVER_ERROR:
            call = (<bytes> why.call).decode().replace("_", " ")
            raise GpuError(
                f"the driver refused on GPU {self.device} ({call}): {error_text(why.code)}"
            )
        if status not in (SR_EXHAUSTED, SR_NO_MEMORY):
            raise_status(status, None)
        if self.pool == NULL:
            raise GpuOutOfMemory(f"GPU {self.device} has no room for the initial {mib(size)}")
        now = self.statistics()
        if status == SR_EXHAUSTED:
            reason = f"the pool's limit of {mib(now.limit)} leaves no room for {mib(size)}"
        else:
            available, total = device_memory(self.device)
            reason = (
                f"GPU {self.device} has no memory for {mib(size)} ({mib(available)} of "
                f"{mib(total)} left)"
            )
        hint = "" if self.moves or now.free < size else "; defragmentation is off"
        raise GpuOutOfMemory(f"{reason}: {now.describe()}{hint}", now)

    cdef void *make_stream(self) except NULL:
        cdef const sr_gpu_driver *driver = gpu_driver()
        cdef void *context = gpu_context(self.pool)
        cdef void *stream = NULL
        cdef int status = gpu_state(self.pool)
        cdef int code
        if status in (SR_OK, SR_CLOSED):
            with nogil:
                code = driver.push_context(context)
                if code == 0:
                    code = stream_create(&stream)
                    driver.pop_context()
            status = gpu_judge(self.pool, code, "stream_create")
        self.check(status, 0)
        return stream

    cdef void destroy_stream(self, void *stream) noexcept:
        """After its work is done."""
        cdef const sr_gpu_driver *driver = gpu_driver()
        cdef void *context = gpu_context(self.pool)
        if gpu_state(self.pool) not in (SR_OK, SR_CLOSED):
            return
        with nogil:
            if driver.push_context(context) == 0 or driver.push_context(context) == 0:
                driver.stream_synchronize(stream)
                stream_destroy(stream)
                driver.pop_context()

    cdef void *copy_stream(self) except NULL:
        with cython.critical_section(self):
            if self.copies == NULL:
                self.copies = self.make_stream()
            return self.copies

    cdef OwnedBlock lend(self, size_t size, object stream):
        """Allocate; `stream` may be None."""
        cdef OwnedBlock owned = OwnedBlock.__new__(OwnedBlock)
        cdef sr_gpu_block block
        cdef bint on_stream = stream is not None
        cdef void *c_stream = NULL
        cdef int status
        if on_stream:
            c_stream = stream_address(stream)
        status = gpu_try_alloc(self.pool, size, on_stream, c_stream, &block)
        if status == kRetry:
            with nogil:
                status = gpu_alloc(self.pool, size, on_stream, c_stream, &block)
        self.check(status, size)
        owned.pool = self
        owned.handle = block.handle
        owned.address = block.address
        owned.use_on(stream, c_stream)
        return owned

    def stream(self):
        """Make a stream of this pool's device.

        Returns
        -------
        GpuStream

        Raises
        ------
        GpuError
            The driver refused.
        """
        cdef GpuStream stream = GpuStream.__new__(GpuStream)
        stream.stream = self.make_stream()
        stream.pool = self
        return stream

    def flush(self, stream):
        """Say that a stream is going to be destroyed although blocks were freed on it.

        `GpuStream.close` does that by itself.

        Raises
        ------
        GpuError
            The driver refused.
        """
        cdef void *c_stream = stream_address(stream)
        cdef int status
        with nogil:
            status = gpu_flush(self.pool, c_stream)
        self.check(status, 0)

    def defragment(self):
        """Move free chunks to where they make the largest possible free block.

        Only wholly free chunks can be moved, and no address in use ever is. Segments cannot be
        joined: with that backing, nothing happens.

        Returns
        -------
        Defragmentation

        Raises
        ------
        GpuError
            The driver refused.
        """
        cdef sr_gpu_defragmentation result
        cdef int status
        with nogil:
            status = gpu_defragment(self.pool, &result)
        self.check(status, 0)
        return Defragmentation(
            result.remapped_chunks, result.largest_free_before, result.largest_free_after
        )

    def trim(self, keep=None):
        """Give memory back to the device: chunks that are wholly free.

        Parameters
        ----------
        keep : int, optional
            Bytes that stay reserved; the initial size if not given.

        Returns
        -------
        int
            Bytes given back.

        Raises
        ------
        OptionError
            `keep` is out of range.
        GpuError
            The driver refused.
        """
        cdef size_t c_keep = size_option("keep", self.initial if keep is None else keep, 0)
        cdef uint64_t released
        cdef int status
        with nogil:
            status = gpu_trim(self.pool, c_keep, &released)
        self.check(status, 0)
        return released

    def maintain(self):
        """Take what streams are done with, and defragment if that is worthwhile.

        That is when fragmentation is above 25 %, more than 10 % of what is reserved is free, and
        defragmentation was not switched off. Call it about once per second, from a background
        task; `speechrnt.maintenance.maintain_on` makes one.

        Returns
        -------
        Defragmentation or None
            What was done, if anything was.

        Raises
        ------
        GpuError
            The driver refused.
        """
        cdef size_t everything = LARGEST
        cdef uint64_t released
        cdef int status
        with nogil:
            status = gpu_trim(self.pool, everything, &released)  # so only streams are looked at
        self.check(status, 0)
        now = self.statistics()
        if self.moves and now.is_fragmented:
            result = self.defragment()
            return result if result.remapped_chunks else None
        return None

    def close(self):
        """Wait for the streams, give back all that is free, and lend no more.

        Blocks in use stay good; their chunks are given back when the last of them has been freed
        and the pool is collected. Closing again gives back what has become free since.

        Raises
        ------
        GpuError
            The driver refused to take something back. Closing again tries again.
        """
        cdef int status
        with nogil:
            status = gpu_close(self.pool)
        # With a dead context or in a forked child there is nothing to give back.
        if status not in (SR_OK, SR_POISONED, SR_FORKED):
            self.check(status, 0)

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.close()

    def statistics(self):
        """Return a `GpuMemoryStatistics`. Works with a dead context, too.

        Raises
        ------
        GpuError
            This is a forked child.
        """
        cdef sr_gpu_statistics now
        cdef int status
        with nogil:
            status = gpu_statistics(self.pool, &now)
        self.check(status, 0)
        return GpuMemoryStatistics.of(now, now.by_size)

    def health(self):
        """Tell whether the pool is in order, as a `GpuMemoryHealth`.

        Not more than 90 % of the limit may be in use. Fragmentation counts when it is above 25 %
        and matters: more than 10 % of what is reserved is free, or a request has failed although as
        much was free.

        Raises
        ------
        GpuError
            This is a forked child.
        """
        now = self.statistics()
        obstacle = None
        if now.error:
            obstacle = dead_context(now.error)
        elif gpu_state(self.pool) == SR_CLOSED:
            obstacle = "the pool is closed"
        return now.health(obstacle)

    @property
    def closed(self):
        """Whether the pool lends no more, as it was closed or its GPU failed."""
        return gpu_state(self.pool) != SR_OK

    def __repr__(self):
        return f"<{type(self).__name__} on GPU {self.device} at {<uintptr_t> self.pool:#x}>"


cdef sr_gpu_pool *gpu_pool_of(object pool) except NULL:
    return (<BasePool?> pool).pool


@cython.final
@cython.no_gc  # or its pool could be gone when it ends
cdef class GpuStream:
    """A stream of a pool's device; made by `GpuMemoryPool.stream`.

    Work given to a stream is done in its order, while the host goes on. It does not wait for the
    default stream. Ends with `close`, at the end of a ``with`` block, or when it is collected.
    """

    def __init__(self):
        raise TypeError("streams come from GpuMemoryPool.stream")

    cdef void *living(self) except NULL:
        if self.stream == NULL:
            raise HandleError("the stream is closed")
        return self.stream

    def __cuda_stream__(self):
        """Return what other libraries take for a stream: 0 and its address."""
        return 0, <uintptr_t> self.living()

    def __index__(self):
        return <uintptr_t> self.living()

    def synchronize(self):
        """Wait until all work given to the stream is done.

        Raises
        ------
        GpuError
            Work failed, or the driver refused.
        HandleError
            The stream is closed.
        """
        self.pool.check(synchronize_stream(self.pool, self.living()), 0)

    def done(self):
        """Whether all work given to the stream is done.

        Raises
        ------
        GpuError
            Work failed, or the driver refused.
        HandleError
            The stream is closed.
        """
        cdef const sr_gpu_driver *driver = gpu_driver()
        cdef void *context = gpu_context(self.pool.pool)
        cdef void *stream = self.living()
        cdef int status = gpu_state(self.pool.pool)
        cdef int code
        if status not in (SR_OK, SR_CLOSED):
            self.pool.check(status, 0)
        with nogil:
            code = driver.push_context(context)
            if code == 0:
                code = stream_query(stream)
                driver.pop_context()
        if code == NOT_READY:
            return False
        self.pool.check(gpu_judge(self.pool.pool, code, "stream_query"), 0)
        return True

    cdef void end(self) noexcept:
        cdef void *stream
        with cython.critical_section(self):
            stream = self.stream
            self.stream = NULL
        if stream != NULL:
            with nogil:
                # Twice: nobody can do it later.
                if gpu_flush(self.pool.pool, stream) != SR_OK:
                    gpu_flush(self.pool.pool, stream)
            self.pool.destroy_stream(stream)

    def close(self):
        """Wait for the stream's work and destroy it. Closing twice is harmless.

        No other thread may be giving it work, or be ending a block that was used on it.
        """
        self.end()

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.end()

    def __dealloc__(self):
        self.end()


cdef int synchronize_stream(BasePool pool, void *stream) noexcept:
    cdef const sr_gpu_driver *driver = gpu_driver()
    cdef void *context = gpu_context(pool.pool)
    cdef int status = gpu_state(pool.pool)
    cdef int code
    if status not in (SR_OK, SR_CLOSED):
        return status
    with nogil:
        code = driver.push_context(context)
        if code == 0:
            code = driver.stream_synchronize(stream)
            driver.pop_context()
    return gpu_judge(pool.pool, code, "stream_synchronize")


cdef int order_streams(BasePool pool, void *first, void *then) noexcept:
    """Have a stream wait for what another has been given so far."""
    cdef const sr_gpu_driver *driver = gpu_driver()
    cdef void *context = gpu_context(pool.pool)
    cdef void *event = NULL
    cdef int status = gpu_state(pool.pool)
    cdef int code
    if status not in (SR_OK, SR_CLOSED):
        return status
    with nogil:
        code = driver.push_context(context)
        if code == 0:
            code = driver.event_create(&event)
            if code == 0:
                code = driver.event_record(event, first)
                if code == 0:
                    code = stream_wait(then, event)
                driver.event_destroy(event)  # which lives until both streams have passed it
            driver.pop_context()
    return gpu_judge(pool.pool, code, "stream_wait")


@cython.final
@cython.no_gc
@cython.freelist(64)
cdef class OwnedBlock:
    """A block of the pool, which goes back when the last handle of it has ended."""

    cdef void use_on(self, object stream, void *c_stream) noexcept:
        """Note which stream has been given work for the block; None if all work is done."""
        self.stream = stream
        self.c_stream = c_stream

    cdef bint is_used_on(self, void **stream) noexcept:
        """Whether a stream may still have work for the block, and which one."""
        if isinstance(self.stream, GpuStream) and (<GpuStream> self.stream).stream == NULL:
            self.stream = None  # it was closed, after its work was done
        stream[0] = self.c_stream
        return self.stream is not None

    cdef int give_back(self) noexcept:
        cdef sr_gpu_pool *pool = self.pool.pool
        cdef uint64_t handle = self.handle
        cdef void *stream
        cdef int status
        self.handle = 0
        if self.is_used_on(&stream):
            with nogil:
                status = gpu_free_on(pool, handle, stream)
        else:
            status = gpu_try_free(pool, handle)
            if status == kRetry:
                with nogil:
                    status = gpu_free(pool, handle)
        return status

    def __dealloc__(self):
        if self.handle != 0:
            self.give_back()
