"""Handles, streams and page-locked memory: contents, order, sharing with other libraries."""

import ctypes
import gc
import pickle

import numpy as np
import pytest

from speechrnt.errors import HandleError, OptionError, PoolExhausted
from speechrnt.gpu import GpuMemoryHandle, GpuMemoryPool, GpuStream, pinned_memory
from speechrnt.pools import AudioBufferPool, PoolLimits

MIB = 2**20


@pytest.fixture
def pool():
    return GpuMemoryPool(limit=32 * MIB, chunk=2 * MIB)


@pytest.fixture
def pinned():
    return AudioBufferPool(PoolLimits(max_bytes=8 * MIB), memory=pinned_memory())


# Copies


@pytest.mark.parametrize("dtype", ["float16", "float32", "int8", "int32", "bool", "complex64"])
def test_what_is_copied_in_comes_out(pool, dtype):
    array = np.arange(240).reshape(2, 3, 40).astype(dtype)
    block = pool.allocate(array.shape, dtype)
    block.copy_from(array)
    result = block.copy_to()
    assert result.dtype == array.dtype
    assert result.shape == array.shape
    assert (result == array).all()
    target = bytearray(array.nbytes)
    assert block.copy_to(target) is target
    assert target == array.tobytes()


def test_blocks_are_copied_to_each_other(pool):
    first, second = pool.allocate(1000), pool.allocate((10, 100))
    stream = pool.stream()
    first.copy_from(np.arange(1000, dtype="u1"), stream=stream)
    second.copy_from(first)
    assert (second.copy_to().ravel() == np.arange(1000).astype("u1")).all()


def test_memory_that_does_not_fit_is_refused(pool):
    block = pool.allocate(16)
    cases = [np.zeros(15, "u1"), np.zeros(32, "u1")[::2], "text", 5, None, pool.allocate(8)]
    for source in cases:
        with pytest.raises(OptionError, match="source"):
            block.copy_from(source)
    for target in (np.zeros(15, "u1"), np.zeros(32, "u1")[::2], bytes(16), 5):
        with pytest.raises(OptionError, match="target"):
            block.copy_to(target)
    block.copy_from(bytes(range(16)))
    assert bytes(block.copy_to()) == bytes(range(16))


def test_a_copy_on_a_stream_returns_before_it_is_done(double, pool, pinned):
    stream = pool.stream()
    block = pool.allocate(4000, stream=stream)
    buffer = pinned.acquire(1000)
    buffer.array[:] = 1.5
    with double.held(stream):
        block.copy_from(buffer, stream=stream)
        assert not stream.done()
        target = pinned.acquire(1000)
        target.array[:] = 0
        block.copy_to(target, stream=stream)
        assert not target.array.any()
        stream.synchronize()
        assert stream.done()
        assert (target.array == 1.5).all()


def test_a_copy_waits_for_what_another_stream_has_to_write(double, pool, pinned):
    writer, reader = pool.stream(), pool.stream()
    block = pool.allocate(4000)
    buffer = pinned.acquire(1000)
    buffer.array[:] = 2.5
    for stream in (None, reader):
        with double.held(writer):
            block.copy_from(buffer, stream=writer)
            target = pinned.acquire(1000)
            block.copy_to(target, stream=stream)
            reader.synchronize()
            assert (target.array == 2.5).all()


# Views


def test_views_share_the_block_until_the_last_has_ended(pool):
    block = pool.allocate((4, 6), "float32")
    data = np.arange(24, dtype="f4").reshape(4, 6)
    block.copy_from(data)
    flat = block.reshape(-1)
    cube = block.reshape((2, 2, 6))
    half = cube.view("float16")
    assert (flat.shape, cube.shape, half.shape) == ((24,), (2, 2, 6), (2, 2, 12))
    assert flat.address == block.address
    assert (half.copy_to() == data.view("f2").reshape(2, 2, 12)).all()
    assert (block.reshape(6, 4).copy_to() == data.reshape(6, 4)).all()
    block.free()
    cube.free()
    half.free()
    assert pool.statistics().live == 1
    assert (flat.copy_to() == data.ravel()).all()
    with pytest.raises(HandleError):
        cube.reshape(-1)
    flat.free()
    assert pool.statistics().live == 0


@pytest.mark.parametrize(
    "shape",
    [(5,), (-1, -1), (-1, 7), (0, -1), (24, 0), ("a",), (-2, -12), ("a", -1), (-1, 2.5), (None,)],
)
def test_shapes_that_do_not_fit_are_refused(pool, shape):
    block = pool.allocate((4, 6))
    with pytest.raises(OptionError):
        block.reshape(*shape)
    with pytest.raises(OptionError):
        block.view("float32").reshape(5)
    with pytest.raises(OptionError, match="rows"):
        pool.allocate(7).view("float16")


# The ends of a handle


def test_it_ends_once(pool):
    stream = pool.stream()
    for end in (GpuMemoryHandle.free, lambda block: block.free_on(stream)):
        block = pool.allocate(10)
        end(block)
        for use in (
            GpuMemoryHandle.free,
            lambda block: block.free_on(stream),
            lambda block: block.address,
            lambda block: block.pool,
            lambda block: block.copy_to(),
            lambda block: block.copy_from(bytes(10)),
            lambda block: block.reshape(10),
            lambda block: block.view("i1"),
            lambda block: block.__cuda_array_interface__,
            lambda block: block.__dlpack__(),
            lambda block: block.__dlpack_device__(),
        ):
            with pytest.raises(HandleError, match="freed already"):
                use(block)
        assert repr(block) == "<GpuMemoryHandle (10,) uint8 freed>"


def test_it_ends_with_the_block_and_when_it_is_collected(pool):
    with pool.allocate(10) as block:
        assert pool.statistics().live == 1
    assert pool.statistics().live == 0
    with pytest.raises(HandleError):
        block.free()
    block = pool.allocate(10)
    del block
    assert pool.statistics().live == 0
    with pytest.raises(RuntimeError, match="stop"), pool.allocate(10):
        raise RuntimeError("stop")
    assert pool.statistics().live == 0


def test_it_cannot_be_made_or_pickled(pool):
    for kind in (GpuMemoryHandle, GpuStream):
        with pytest.raises(TypeError, match="come from"):
            kind()
    for thing in (pool.allocate(1), pool.stream(), pool):
        with pytest.raises(TypeError):
            pickle.dumps(thing)


# Streams


def test_a_block_freed_on_a_stream_waits_for_it(double, pool):
    stream, other = pool.stream(), pool.stream()
    with double.held(stream):
        block = pool.allocate(1000, stream=stream)
        address = block.address
        block.copy_from(bytes(1000), stream=stream)
        block.free_on(stream)
        now = pool.statistics()
        assert (now.pending, now.live, now.in_use) == (1024, 0, 0)
        others = pool.allocate(1000, stream=other)
        assert others.address != address
        pool.maintain()
        assert pool.statistics().pending == 1024
    pool.maintain()
    assert pool.statistics().pending == 0


def test_a_stream_gets_its_own_blocks_back_when_nothing_else_is_free(double):
    pool = GpuMemoryPool(limit=2 * MIB, chunk=2 * MIB)
    stream, other = pool.stream(), pool.stream()
    with double.held(stream):
        block = pool.allocate(2 * MIB, stream=stream)
        address = block.address
        block.free_on(stream)
        since = double.calls()
        block = pool.allocate(2 * MIB - 100_000, stream=stream)
        assert (block.address, double.log(since)) == (address, [])
        block.free_on(stream)
        # Another one can have it only once the stream is done: here, the host waits.
        assert pool.allocate(2 * MIB, stream=other).address == address
        assert "cuEventSynchronize" in double.log(since)
        assert pool.statistics().retries == 1


def test_one_event_serves_many_frees(double, pool):
    stream = pool.stream()
    since = double.calls("cuEventRecord")
    for _ in range(160):
        pool.allocate(1000).free_on(stream)
    assert double.calls("cuEventRecord") - since == 10
    pool.close()
    assert pool.statistics().pending == 0


class Odd:
    def __cuda_stream__(self):
        return None


@pytest.mark.parametrize("stream", [-1, 2**70, 2.5, "x", Odd()])
def test_what_is_no_stream_is_refused(pool, stream):
    block = pool.allocate(100)
    takes = [pool.allocate(1).free_on, pool.flush, lambda stream: block.__dlpack__(stream=stream)]
    if stream == -1:  # which DLPack takes for no stream
        takes.pop()
    for take in [*takes, lambda stream: block.copy_to(stream=stream)]:
        with pytest.raises(OptionError, match="stream must be"):
            take(stream)


@pytest.mark.parametrize("dtype", [None, "f4,,", {"names": ["a"]}, object, ">f4", "M8[s]"])
def test_what_is_no_plain_number_is_refused(pool, dtype):
    with pytest.raises(OptionError, match="dtype must be"):
        pool.allocate(4, dtype)


def test_a_handle_that_just_ends_waits_for_its_stream(double, pool, pinned):
    stream = pool.stream()
    buffer = pinned.acquire(1000)
    with double.held(stream):
        for name_stream_at in ("allocate", "copy"):
            if name_stream_at == "allocate":
                block = pool.allocate(4000, stream=stream)
            else:
                block = pool.allocate(4000)
                block.copy_from(buffer, stream=stream)
            del block
        assert pool.statistics().pending == 2 * 4096
        block = pool.allocate(4000, stream=stream)
        block.free()  # which says that nothing uses it
        assert pool.statistics().pending == 2 * 4096
    assert double.hazards() == 0


def test_frees_on_a_stream_that_is_closed_are_not_lost(double, pool):
    stream = pool.stream()
    late = pool.allocate(1000, stream=stream)
    with double.held(stream):
        for _ in range(3):
            pool.allocate(1000).free_on(stream)
        stream.close()
    stream.close()
    for use in (stream.synchronize, stream.done, stream.__cuda_stream__, stream.__index__):
        with pytest.raises(HandleError, match="closed"):
            use()
    with pytest.raises(HandleError):
        pool.allocate(1, stream=stream)
    pool.maintain()
    assert pool.statistics().pending == 0
    del late
    assert pool.statistics().live == 0
    assert pool.statistics().pending == 0


def test_what_a_flushed_stream_still_uses_is_not_lent_to_another_with_its_address(double):
    pool = GpuMemoryPool(limit=4 * MIB, chunk=2 * MIB)
    stream = pool.stream()
    address = stream.__index__()
    with double.held(stream):
        for _ in range(2):  # the second time, there is an event already
            pool.allocate(2 * MIB).free_on(address)
            pool.flush(address)
        assert pool.statistics().pending == 4 * MIB
        waits = double.calls("cuEventSynchronize")
        pool.allocate(2 * MIB, stream=address)
        assert double.calls("cuEventSynchronize") > waits


def test_handles_that_end_on_different_streams_are_waited_for_together(double, pool):
    first, second = pool.stream(), pool.stream()
    block = pool.allocate(2 * MIB)
    view = block.reshape(2, MIB)
    with double.held(first):
        block.free_on(first)
        since = double.calls()
        view.free_on(second)
        assert "cuStreamWaitEvent" in double.log(since)
    pool.maintain()
    assert pool.statistics().pending == 0


class Foreign:
    """A stream of another library, which cannot tell its address any more once it is closed."""

    def __init__(self, stream):
        self.stream = stream

    def __cuda_stream__(self):
        if self.stream is None:
            raise RuntimeError("closed")
        return 0, self.stream.__index__()


def test_a_stream_that_can_no_longer_tell_its_address_loses_no_block(pool):
    stream = pool.stream()
    foreign = Foreign(stream)
    block = pool.allocate(1000)
    view = block.reshape(10, 100)
    block.free_on(foreign)
    foreign.stream = None
    assert view.__cuda_array_interface__["stream"] == stream.__index__()
    del view
    assert pool.statistics().live == 0
    pool.close()
    assert pool.statistics().reserved == 0


def test_a_block_outlives_the_stream_that_it_was_used_on(pool):
    stream = pool.stream()
    block = pool.allocate(1000, stream=stream)
    stream.close()
    assert block.__cuda_array_interface__["stream"] is None
    del block
    assert pool.statistics().free == pool.statistics().reserved


def test_blocks_copied_to_each_other_on_a_stream_are_collected(double, pool):
    stream = pool.stream()
    one, other = pool.allocate(1000), pool.allocate(1000)
    one.copy_from(bytes(1000), stream=stream)
    waits = double.calls("cuStreamSynchronize")
    other.copy_from(one, stream=stream)
    one.copy_from(other, stream=stream)
    assert double.calls("cuStreamSynchronize") == waits
    del one, other
    assert pool.statistics().live == 0


def test_streams_and_blocks_in_a_cycle_are_collected(double):
    before = double.everything()
    pool = GpuMemoryPool(limit=32 * MIB, chunk=2 * MIB)
    stream = pool.stream()
    block = pool.allocate(100, stream=stream)
    block.copy_from(bytes(100), stream=stream)
    cycle = [stream, block, pool]
    cycle.append(cycle)
    del stream, block, pool, cycle
    gc.collect()
    assert double.everything() == before


def test_streams_of_others_are_taken_by_address_and_by_protocol(pool):
    ours = pool.stream()

    class Theirs:
        def __cuda_stream__(self):
            return 0, int(ours)

    for stream in (ours, int(ours), Theirs(), 0, np.int64(int(ours))):
        block = pool.allocate(100, stream=stream)
        block.copy_from(bytes(100), stream=stream)
        block.free_on(stream)
        pool.flush(stream)
    assert ours.__cuda_stream__() == (0, int(ours))
    pool.close()
    assert pool.statistics().pending == 0


def test_a_stream_without_an_event_is_waited_for(double, pool):
    stream = pool.stream()
    with double.failing("cuEventCreate", times=1), double.held(stream):
        for _ in range(16):
            pool.allocate(1000).free_on(stream)
        assert pool.statistics().pending == 0
    with double.failing("cuEventRecord", times=1), double.held(stream):
        for _ in range(16):
            pool.allocate(1000).free_on(stream)
        assert pool.statistics().pending == 0


# What other libraries see


def test_the_cuda_array_interface_is_as_ctranslate2_takes_it(pool):
    block = pool.allocate((1, 80, 3000), "float16")
    assert block.__cuda_array_interface__ == {
        "shape": (1, 80, 3000),
        "typestr": "<f2",
        "data": (block.address, False),
        "strides": None,
        "version": 3,
        "stream": None,
    }
    stream = pool.stream()
    block.copy_from(bytes(block.nbytes), stream=stream)
    assert block.__cuda_array_interface__["stream"] == int(stream)
    block.copy_from(bytes(block.nbytes), stream=0)
    assert block.__cuda_array_interface__["stream"] == 1  # 0 would mean that there is none


class Tensor(ctypes.Structure):
    """DLTensor of dlpack.h."""

    _fields_ = [
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    ]


class Managed(ctypes.Structure):
    """DLManagedTensor of dlpack.h."""

    _fields_ = [("tensor", Tensor), ("ctx", ctypes.c_void_p), ("deleter", ctypes.c_void_p)]


class Versioned(ctypes.Structure):
    """DLManagedTensorVersioned of dlpack.h."""

    _fields_ = [
        ("major", ctypes.c_uint32),
        ("minor", ctypes.c_uint32),
        ("ctx", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
        ("flags", ctypes.c_uint64),
        ("tensor", Tensor),
    ]


def consume(capsule, versioned):
    """What a consumer does: read the struct, rename the capsule; returns struct and deleter."""
    api = ctypes.pythonapi
    api.PyCapsule_GetPointer.restype = ctypes.c_void_p
    api.PyCapsule_GetPointer.argtypes = [ctypes.py_object, ctypes.c_char_p]
    api.PyCapsule_SetName.argtypes = [ctypes.py_object, ctypes.c_char_p]
    name = b"dltensor_versioned" if versioned else b"dltensor"
    used = b"used_dltensor_versioned" if versioned else b"used_dltensor"
    address = api.PyCapsule_GetPointer(capsule, name)
    api.PyCapsule_SetName(capsule, used)
    capsule_names.append(used)
    managed = (Versioned if versioned else Managed).from_address(address)
    delete = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(managed.deleter)
    return managed, lambda: delete(address)


capsule_names = []  # the capsules refer to them


@pytest.mark.parametrize("versioned", [False, True])
@pytest.mark.parametrize(
    ("dtype", "code"), [("float16", 2), ("int8", 0), ("uint8", 1), ("bool", 6)]
)
def test_dlpack_shares_the_block_and_keeps_it(pool, versioned, dtype, code):
    block = pool.allocate((2, 3, 5), dtype)
    version = (1, 0) if versioned else None
    managed, delete = consume(block.__dlpack__(max_version=version), versioned)
    tensor = managed.tensor
    assert block.__dlpack_device__() == (tensor.device_type, tensor.device_id) == (2, 0)
    assert tensor.data == block.address
    assert (tensor.code, tensor.bits, tensor.lanes) == (code, 8 * np.dtype(dtype).itemsize, 1)
    assert tensor.shape[: tensor.ndim] == [2, 3, 5]
    assert tensor.strides[: tensor.ndim] == [15, 5, 1]
    assert tensor.byte_offset == 0
    if versioned:
        assert (managed.major, managed.flags) == (1, 0)
    block.free()
    assert pool.statistics().live == 1
    delete()
    assert pool.statistics().live == 0


def test_a_capsule_that_nobody_consumes_lets_go(pool):
    for version in (None, (1, 0)):
        capsule = pool.allocate(5).__dlpack__(max_version=version)
        gc.collect()
        assert pool.statistics().live == 1
        del capsule
        assert pool.statistics().live == 0


def test_dlpack_orders_the_streams(double, pool, pinned):
    writer, reader = pool.stream(), pool.stream()
    block = pool.allocate(4000)
    buffer = pinned.acquire(1000)
    with double.held(writer):
        since = double.calls("cuStreamWaitEvent")
        block.__dlpack__(stream=int(reader))
        assert double.calls("cuStreamWaitEvent") == since  # nothing is to be written
        block.copy_from(buffer, stream=writer)
        for stream, waits in ((int(writer), 0), (-1, 0), (int(reader), 1), (None, 1)):
            since = double.calls("cuStreamWaitEvent")
            block.__dlpack__(stream=stream)
            assert double.calls("cuStreamWaitEvent") == since + waits
            if waits:  # which made the double get on with it
                block.copy_from(buffer, stream=writer)


def test_dlpack_neither_copies_nor_moves(pool):
    block = pool.allocate(5)
    with pytest.raises(BufferError, match="not copied"):
        block.__dlpack__(copy=True)
    with pytest.raises(BufferError, match="on device"):
        block.__dlpack__(dl_device=(1, 0))
    block.__dlpack__(dl_device=(2, 0), copy=False)
    for version in (1, (), ("a", 0)):
        with pytest.raises(OptionError, match="max_version"):
            block.__dlpack__(max_version=version)


# Page-locked memory


def test_audio_buffers_can_be_page_locked(double):
    before = double.everything()
    pool = AudioBufferPool(PoolLimits(max_bytes=4 * MIB), memory=pinned_memory())
    buffer = pool.acquire(480_000)
    assert buffer.array.ctypes.data % 64 == 0
    buffer.array[:] = 1
    assert double.live("pinned") > before["pinned"]
    buffer.release()
    del buffer
    pool.trim()
    del pool
    gc.collect()
    assert double.everything() == before


def test_when_nothing_can_be_locked_the_pool_says_so(double):
    pool = AudioBufferPool(memory=pinned_memory())
    with double.failing("cuMemHostAlloc", times=100), pytest.raises(PoolExhausted):
        pool.acquire(1000)
    pool.acquire(1000).release()
    with pytest.raises(OptionError, match="device"):
        pinned_memory(99)
