"""A pool of GPU memory, on the CUDA driver API.

Blocks come from physical chunks that the pool maps into one range of addresses, or from segments
where the device cannot do that. Allocating and freeing take constant time and call the driver only
when the pool grows, shrinks or has blocks that streams may still use. A device address that was
handed out never moves; defragmentation moves free chunks.

Nothing here can be used in a forked child: the driver cannot. There, allocating raises, and what
the child inherited is left alone.
"""

cimport cython
from cpython.buffer cimport (
    PyBUF_C_CONTIGUOUS, PyBUF_WRITABLE, PyBuffer_Release, PyObject_GetBuffer,
)
from cpython.object cimport PyObject
from libc.stdint cimport int64_t, uint64_t, uintptr_t
from speechrnt._gpu_driver cimport (
    copy_on_device, copy_to_device, copy_to_host, gpu_driver, sr_gpu_driver,
)
from speechrnt._gpu_pool cimport (
    BasePool, OwnedBlock, gpu_pool_context, gpu_pool_judge, gpu_pool_state, order_streams,
    stream_address,
)
from speechrnt._pools cimport SR_CLOSED, SR_OK

import math
import operator

import numpy as np

from speechrnt._gpu_pool import GpuStream
from speechrnt.errors import HandleError, OptionError

__all__ = ["GpuMemoryHandle", "GpuMemoryPool", "GpuStream"]

cdef size_t LARGEST = 70_368_744_177_664  # 2^46: kMaxSize of _gpu_state.h
DLPACK_CODES = {"i": 0, "u": 1, "f": 2, "c": 5, "b": 6}
DLPACK_CUDA = 2
LEGACY_STREAM = 1  # what the protocols call the default stream, as 0 means something else there


cdef extern from "Python.h":
    Py_ssize_t Py_REFCNT(PyObject *o)


cdef extern from "_gpu_dlpack.h" namespace "speechrnt_gpu":
    const int kMaxDimensions

    object dlpack_capsule(
        PyObject *owner, void *data, int device, int code, int bits, int ndim, const int64_t *shape,
        bint versioned,
    )


@cython.final
cdef class GpuMemoryPool(BasePool):
    """Memory of one GPU, taken from the driver in chunks and lent in blocks.

    All methods may be called from any thread. The pool keeps the device's primary context, which
    CTranslate2 uses as well; which context is current in the calling thread does not matter and is
    left as it is.

    Parameters
    ----------
    device : int
        Number of the GPU.
    initial : int
        Bytes to take from the start; also what `trim` leaves unless told otherwise.
    limit : int, optional
        Bound on what is taken, in bytes, rounded down to whole chunks; if not given, all memory of
        the device, so that only the device itself is a bound.
    alignment : int
        Of each block, in bytes: a power of two from 256 to 2 MiB. Sizes are rounded up to it.
    chunk : int
        By how much the pool grows at least, and what defragmentation moves; rounded up to what the
        device can map, mostly 2 MiB.
    backing : {"auto", "vmm", "segments"}
        Where memory comes from: chunks mapped into one range of addresses, segments from
        cuMemAlloc, or by default whatever the device can do better.
    defragment : bool
        Whether free chunks are moved together when no free block is large enough, before the pool
        grows. `defragment` can be called in any case.
    trim_mempool : bool
        Whether the device's mempool, from which CTranslate2 allocates, has to give back what it
        does not use, before a request fails because the GPU is full.

    Raises
    ------
    OptionError
        A number is out of range, or there is no such device.
    GpuUnavailable
        There is no driver that works.
    GpuOutOfMemory
        The GPU has no room for `initial`.
    GpuError
        The driver refused, or the device has no virtual memory management for ``"vmm"``.

    Examples
    --------
    >>> pool = GpuMemoryPool(limit=2**30)
    >>> with pool.allocate((1, 80, 3000), "float16") as block:
    ...     block.copy_from(features)
    """

    def allocate(self, shape, dtype="uint8", *, stream=None):
        """Lend a block, with arbitrary contents.

        Parameters
        ----------
        shape : int or tuple of int
            Of a C-contiguous array; 1 item or more, 8 dimensions at most.
        dtype : numpy dtype
        stream : GpuStream, int or object with ``__cuda_stream__``, optional
            Says that only work given to this stream from now on will use the block. Then it may be
            one that was freed on the same stream, although earlier work there still uses it.

        Returns
        -------
        GpuMemoryHandle

        Raises
        ------
        OptionError
            `shape`, `dtype` or `stream` cannot be used.
        GpuOutOfMemory
            The pool is at its limit or the GPU is full, even after all that could be given back
            was. Its ``statistics`` are those of the pool.
        GpuError
            The driver refused, or the context is dead, or this is a forked child.
        PoolClosedError
            The pool is closed.
        """
        cdef GpuMemoryHandle handle = GpuMemoryHandle.__new__(GpuMemoryHandle)
        handle.lay_out(shape, dtype)
        handle.owned = self.lend(handle.nbytes, stream)
        return handle


@cython.final
@cython.no_gc
@cython.freelist(64)
cdef class GpuMemoryHandle:
    """A block of GPU memory on loan, seen as a C-contiguous array.

    Made by `GpuMemoryPool.allocate`. It ends with `free` or `free_on`, at the end of a ``with``
    block, or when it is collected; in the last two cases as with `free_on`, if `allocate` or a copy
    named a stream, and else as with `free`. `reshape` and `view` make further handles of the same
    block, which goes back when the last of them has ended.

    Other libraries take it as an array of theirs without a copy, by ``__cuda_array_interface__`` or
    DLPack: ``torch.from_dlpack(handle)``, ``cupy.asarray(handle)``,
    ``ctranslate2.StorageView.from_array(handle)``. What follows the first of these protocols holds
    this object and not the block: do not call `free` before it is done.
    """

    cdef OwnedBlock owned  # None once ended
    cdef readonly tuple shape
    cdef readonly object dtype
    cdef readonly size_t nbytes

    def __init__(self):
        raise TypeError("handles come from GpuMemoryPool.allocate")

    cdef int lay_out(self, object shape, object dtype) except -1:
        """Set shape and dtype, of a new block."""
        cdef size_t size
        self.dtype = plain_dtype(dtype)
        size = self.dtype.itemsize
        shape = whole_numbers(shape)
        if len(shape) > kMaxDimensions:
            raise OptionError(f"shape must have at most {kMaxDimensions} dimensions, not {shape}")
        for n in shape:
            if not 1 <= n <= LARGEST // size:
                raise OptionError(
                    f"shape must be of 1 or more, and of {LARGEST} bytes at most, not {shape} of "
                    f"{self.dtype}"
                )
            size *= <size_t> n
        self.shape = shape
        self.nbytes = size
        return 0

    cdef OwnedBlock living(self):
        cdef OwnedBlock owned = self.owned
        if owned is None:
            raise HandleError("the block was freed already")
        return owned

    @property
    def address(self):
        """Where the block is in the device's memory.

        Raises
        ------
        HandleError
            The handle has ended.
        """
        return self.living().address

    @property
    def pool(self):
        """The `GpuMemoryPool` that the block is of.

        Raises
        ------
        HandleError
            The handle has ended.
        """
        return self.living().pool

    def reshape(self, *shape):
        """Make a handle of the same block with another shape.

        Parameters
        ----------
        *shape : int, or one sequence of int
            Of as many items; one of them may be -1 and is then what remains.

        Returns
        -------
        GpuMemoryHandle

        Raises
        ------
        OptionError
            It does not have as many items.
        HandleError
            The handle has ended.
        """
        shape = whole_numbers(shape[0] if len(shape) == 1 else shape)
        items = self.nbytes // self.dtype.itemsize
        if shape.count(-1) == 1:
            known = -math.prod(shape)
            if known > 0 and items % known == 0:
                shape = tuple([items // known if n == -1 else n for n in shape])
        return self.sharing(shape, self.dtype)

    def view(self, dtype):
        """Make a handle of the same block with another dtype; the last dimension changes with it.

        Parameters
        ----------
        dtype : numpy dtype

        Returns
        -------
        GpuMemoryHandle

        Raises
        ------
        OptionError
            The last dimension is not a whole number of such items.
        HandleError
            The handle has ended.
        """
        wanted = plain_dtype(dtype)
        if not self.shape:
            return self.sharing((), wanted)
        *outer, row = self.shape
        size = row * self.dtype.itemsize
        if size % wanted.itemsize:
            raise OptionError(f"rows of {size} bytes are not a whole number of {wanted}")
        return self.sharing((*outer, size // wanted.itemsize), wanted)

    cdef GpuMemoryHandle sharing(self, object shape, object dtype):
        cdef GpuMemoryHandle handle = GpuMemoryHandle.__new__(GpuMemoryHandle)
        cdef OwnedBlock owned = self.living()
        handle.lay_out(shape, dtype)
        if handle.nbytes != self.nbytes:
            raise OptionError(
                f"shape {self.shape} of {self.dtype} cannot be seen as {handle.shape} of "
                f"{handle.dtype}: they differ in size"
            )
        handle.owned = owned
        owned.shared = True
        return handle

    def copy_from(self, source, *, stream=None):
        """Fill the block with what is in memory of the host, or in another block.

        Parameters
        ----------
        source : buffer or GpuMemoryHandle
            C-contiguous, and of the same size in bytes. Copies of page-locked memory are faster
            and, on a stream, do not block the host: see `speechrnt.gpu.pinned_memory`.
        stream : GpuStream, int or object with ``__cuda_stream__``, optional
            Do it in the order of this stream, and return at once; `source` must not change before
            the stream gets there. The block refers to it until its next copy or its end. Otherwise
            the copy is done when this returns.

        Raises
        ------
        OptionError
            `source` is of another size or not contiguous, or `stream` is no stream.
        GpuError
            The driver refused.
        HandleError
            A handle has ended.
        """
        cdef OwnedBlock owned = self.living()
        cdef OwnedBlock other = None
        cdef Py_buffer buffer
        if isinstance(source, GpuMemoryHandle):
            other = (<GpuMemoryHandle> source).living()
            self.check_size((<GpuMemoryHandle> source).nbytes, "source")
            self.copy(owned.address, NULL, other.address, NULL, stream, other, None)
            return
        get_buffer(source, &buffer, PyBUF_C_CONTIGUOUS, "source")
        try:
            self.check_size(buffer.len, "source")
            self.copy(owned.address, NULL, 0, buffer.buf, stream, None, memoryview(source))
        finally:
            PyBuffer_Release(&buffer)

    def copy_to(self, target=None, *, stream=None):
        """Copy the block to memory of the host.

        Parameters
        ----------
        target : writable buffer, optional
            C-contiguous, and of the same size in bytes; a new array if not given.
        stream : GpuStream, int or object with ``__cuda_stream__``, optional
            Do it in the order of this stream, and return at once; what is in `target` is good when
            the stream has got there. Otherwise the copy is done when this returns.

        Returns
        -------
        buffer
            `target`, or an array of this handle's shape and dtype.

        Raises
        ------
        OptionError
            `target` is of another size, not contiguous or not writable, or `stream` is no stream.
        GpuError
            The driver refused.
        HandleError
            The handle has ended.
        """
        cdef OwnedBlock owned = self.living()
        cdef Py_buffer buffer
        if target is None:
            target = np.empty(self.shape, self.dtype)
        get_buffer(target, &buffer, PyBUF_C_CONTIGUOUS | PyBUF_WRITABLE, "target")
        try:
            self.check_size(buffer.len, "target")
            self.copy(0, buffer.buf, owned.address, NULL, stream, None, memoryview(target))
        finally:
            PyBuffer_Release(&buffer)
        return target

    cdef int check_size(self, size_t size, str name) except -1:
        if size != self.nbytes:
            raise OptionError(f"{name} must have {self.nbytes} bytes, not {size}")
        return 0

    cdef int copy(
        self, uint64_t to, void *to_host, uint64_t source, const void *source_host, object stream,
        OwnedBlock other, object partner,
    ) except -1:
        """Copy between two addresses, one of them this block's; those that are not used are 0.

        What belongs to the other address is a block or memory of the host: one is None.
        """
        cdef OwnedBlock owned = self.owned
        cdef BasePool pool = owned.pool
        cdef const sr_gpu_driver *driver = gpu_driver()
        cdef void *context = gpu_pool_context(pool.pool)
        cdef size_t size = self.nbytes
        cdef bint wait = stream is None
        cdef void *c_stream = pool.copy_stream() if wait else stream_address(stream)
        cdef int code
        cdef int status = gpu_pool_state(pool.pool)
        if status not in (SR_OK, SR_CLOSED):
            pool.check(status, size)
        go_on_after(owned, c_stream)
        if other is not None:
            go_on_after(other, c_stream)
        with nogil:
            code = driver.push_context(context)
            if code == 0:
                if source_host != NULL:
                    code = copy_to_device(to, source_host, size, c_stream)
                elif to_host != NULL:
                    code = copy_to_host(to_host, source, size, c_stream)
                else:
                    code = copy_on_device(to, source, size, c_stream)
                if wait and code == 0:
                    code = driver.stream_synchronize(c_stream)
                driver.pop_context()
        pool.check(gpu_pool_judge(pool.pool, code, "copy"), size)
        owned.use_on(stream, c_stream)
        owned.partner = None if wait else partner
        if other is not None:
            other.use_on(stream, c_stream)
        return 0

    @property
    def __cuda_array_interface__(self):
        """What other libraries need to know; version 3, without strides.

        Raises
        ------
        HandleError
            The handle has ended.
        """
        cdef OwnedBlock owned = self.living()
        cdef void *c_stream
        stream = None
        if owned.is_used_on(&c_stream):
            stream = <uintptr_t> c_stream or LEGACY_STREAM
        return {
            "shape": self.shape,
            "typestr": self.dtype.str,
            "data": (owned.address, False),
            "strides": None,
            "version": 3,
            "stream": stream,
        }

    def __dlpack_device__(self):
        """Return DLPack's number of CUDA, and the device's.

        Raises
        ------
        HandleError
            The handle has ended.
        """
        return DLPACK_CUDA, self.living().pool.device

    def __dlpack__(self, *, stream=None, max_version=None, dl_device=None, copy=None):
        """Return a capsule, which keeps the block in use for as long as its consumer needs it.

        Parameters
        ----------
        stream : int, optional
            Where the consumer will use the block: what is still to be written is ordered before it.
            The default stream if not given; -1 for none of that.
        max_version, dl_device, copy
            As the array API standard has them.

        Raises
        ------
        BufferError
            A copy, or another device, is asked for.
        OptionError
            `stream` is no stream, or `max_version` no version.
        HandleError
            The handle has ended.
        GpuError
            The driver refused.
        """
        cdef OwnedBlock owned = self.living()
        cdef int64_t[8] shape
        cdef void *consumer
        if copy:
            raise BufferError("a block of GPU memory is shared, not copied")
        if dl_device is not None and dl_device != self.__dlpack_device__():
            raise BufferError(f"the block is on device {self.__dlpack_device__()}, not {dl_device}")
        if stream != -1:
            consumer = stream_address(LEGACY_STREAM if stream is None else stream)
            go_on_after(owned, consumer)
        try:
            major, _ = (0, 0) if max_version is None else max_version
            versioned = operator.index(major) >= 1
        except (TypeError, ValueError):
            raise OptionError(
                f"max_version must be a tuple of two integers, not {max_version!r}"
            ) from None
        for i, n in enumerate(self.shape):
            shape[i] = n
        return dlpack_capsule(
            <PyObject *> owned, <void *> <uintptr_t> owned.address, owned.pool.device,
            DLPACK_CODES[self.dtype.kind], 8 * self.dtype.itemsize, len(self.shape), shape,
            versioned,
        )

    def free(self):
        """End the handle; nothing on the device uses the block any more. Any thread may.

        Raises
        ------
        HandleError
            The handle has ended.
        """
        cdef OwnedBlock owned = self.detach()
        if owned is None:
            raise HandleError("the block was freed already")
        if Py_REFCNT(<PyObject *> owned) == 1:  # no other handle
            owned.use_on(None, NULL)

    def free_on(self, stream):
        """End the handle; what was given to `stream` so far may still use the block.

        Where several handles of a block end on different streams, each stream waits for the one
        before. Any thread may call this.

        Parameters
        ----------
        stream : GpuStream, int or object with ``__cuda_stream__``
            It must live until the pool is closed, or `GpuMemoryPool.flush` be called before. A
            `GpuStream` is kept alive, and does that by itself.

        Raises
        ------
        OptionError
            `stream` is no stream.
        HandleError
            The handle or the stream has ended.
        GpuError
            The driver refused to have a stream wait; the handle has not ended.
        """
        cdef OwnedBlock owned = self.living()
        cdef void *c_stream = stream_address(stream)
        if owned.shared and gpu_pool_state(owned.pool.pool) in (SR_OK, SR_CLOSED):
            go_on_after(owned, c_stream)
        if self.detach() is None:
            raise HandleError("the block was freed already")
        owned.use_on(stream, c_stream)

    cdef OwnedBlock detach(self):
        cdef OwnedBlock owned
        with cython.critical_section(self):
            owned = self.owned
            self.owned = None
        return owned

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.detach()

    def __reduce__(self):
        raise TypeError("a handle of GPU memory cannot be pickled")

    def __repr__(self):
        state = "freed" if self.owned is None else f"at {self.owned.address:#x}"
        return f"<GpuMemoryHandle {self.shape} {self.dtype} {state}>"


cdef int go_on_after(OwnedBlock owned, void *stream) except -1:
    """Have a stream wait for what another may still do with a block."""
    cdef void *earlier
    if owned.is_used_on(&earlier) and earlier != stream:
        owned.pool.check(order_streams(owned.pool, earlier, stream), 0)
    return 0


cdef tuple whole_numbers(object shape):
    """What users give for a shape, as a tuple of int."""
    if type(shape) is not tuple:
        try:
            return (operator.index(shape),)
        except TypeError:
            pass
    try:
        return tuple([operator.index(n) for n in shape])
    except TypeError:
        raise OptionError(
            f"shape must be an integer or a sequence of them, not {shape!r}"
        ) from None


cdef dict plain_dtypes = {}  # by what users write


cdef object plain_dtype(object dtype):
    try:
        known = plain_dtypes.get(dtype)
    except TypeError:  # not hashable
        known = None
    if known is not None:
        return known
    wanted = None
    if dtype is not None:  # which numpy takes for float64
        try:
            wanted = np.dtype(dtype)
        except (TypeError, ValueError, SyntaxError):
            pass
    if wanted is None or wanted.kind not in DLPACK_CODES or not wanted.isnative:
        raise OptionError(f"dtype must be one of numpy's plain numbers, not {dtype!r}")
    if isinstance(dtype, (str, type, np.dtype)):
        plain_dtypes[dtype] = wanted  # there are not many
    return wanted


cdef int get_buffer(object memory, Py_buffer *buffer, int flags, str name) except -1:
    try:
        PyObject_GetBuffer(memory, buffer, flags)
    except (TypeError, ValueError, BufferError) as error:
        raise OptionError(
            f"{name} must be a contiguous {'writable ' if flags & PyBUF_WRITABLE else ''}buffer: "
            f"{error}"
        ) from None
    return 0
