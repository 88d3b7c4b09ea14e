"""The test double itself, through cuda-bindings: what the other tests rely on."""

import ctypes
import os

import numpy as np
import pytest
from cuda.bindings import driver

from speechrnt import system

MIB = 2**20
OK = driver.CUresult.CUDA_SUCCESS


def call(function, *arguments):
    """What a call of the driver gives; an exception with the name of its error otherwise."""
    code, *results = function(*arguments)
    if code != OK:
        raise RuntimeError(code.name)
    return results[0] if len(results) == 1 else results


@pytest.fixture
def context(double):
    call(driver.cuInit, 0)
    call(driver.cuCtxPushCurrent, call(driver.cuDevicePrimaryCtxRetain, 0))
    yield double
    call(driver.cuCtxPopCurrent)
    call(driver.cuDevicePrimaryCtxRelease, 0)


def view(address, size):
    return np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(int(address)))


def test_it_is_the_driver_that_everybody_finds(double):
    assert call(driver.cuDriverGetVersion) >= 12000
    call(driver.cuInit, 0)
    assert call(driver.cuDeviceGetCount) == 1
    assert system.why_no_cuda() is None


def test_memory_is_bounded_counted_and_given_back(context):
    before = context.everything()
    calls = context.calls("cuMemAlloc")
    context.configure(capacity=8 * MIB)
    block = call(driver.cuMemAlloc, 6 * MIB)
    with pytest.raises(RuntimeError, match="OUT_OF_MEMORY"):
        call(driver.cuMemAlloc, 4 * MIB)
    assert context.calls("cuMemAlloc") == calls + 2
    assert call(driver.cuMemGetInfo) == [2 * MIB, 8 * MIB]
    call(driver.cuMemFree, block)
    assert context.everything() == before
    with pytest.raises(RuntimeError, match="INVALID_VALUE"):
        call(driver.cuMemFree, block)


def test_the_nth_call_fails(context):
    with context.failing("cuMemAlloc", n=2, times=2):
        first = call(driver.cuMemAlloc, 10)
        for _ in range(2):
            with pytest.raises(RuntimeError, match="OUT_OF_MEMORY"):
                call(driver.cuMemAlloc, 10)
        second = call(driver.cuMemAlloc, 10)
    for block in (first, second):
        call(driver.cuMemFree, block)
    with context.broken(), pytest.raises(RuntimeError, match="ILLEGAL_ADDRESS"):
        call(driver.cuCtxSynchronize)
    since = context.calls()
    call(driver.cuCtxSynchronize)
    assert context.log(since) == ["cuCtxSynchronize"]


def test_physical_memory_keeps_its_contents_when_it_is_mapped_elsewhere(context):
    before = context.everything()
    property_ = driver.CUmemAllocationProp()
    property_.type = driver.CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED
    property_.location.type = driver.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
    access = driver.CUmemAccessDesc()
    access.location = property_.location
    access.flags = driver.CUmemAccess_flags.CU_MEM_ACCESS_FLAGS_PROT_READWRITE
    reserved = int(call(driver.cuMemAddressReserve, 2**40, 0, 0, 0))
    chunk = call(driver.cuMemCreate, 2 * MIB, property_, 0)
    for place in (reserved, reserved + 6 * MIB):
        call(driver.cuMemMap, place, 2 * MIB, 0, chunk, 0)
        call(driver.cuMemSetAccess, place, 2 * MIB, [access], 1)
        if place == reserved:
            view(place, 2 * MIB)[:] = 7
        assert (view(place, 2 * MIB) == 7).all()
        with pytest.raises(RuntimeError, match="INVALID_VALUE"):
            call(driver.cuMemAddressFree, reserved, 2**40)
        call(driver.cuMemUnmap, place, 2 * MIB)
    call(driver.cuMemRelease, chunk)
    call(driver.cuMemAddressFree, reserved, 2**40)
    assert context.everything() == before


def test_a_held_stream_gets_on_when_it_is_waited_for(context):
    stream = call(driver.cuStreamCreate, 0)
    event = call(driver.cuEventCreate, 0)
    block = call(driver.cuMemAlloc, MIB)
    with context.held(stream):
        call(driver.cuMemsetD8Async, block, 3, MIB, stream)
        call(driver.cuEventRecord, event, stream)
        assert driver.cuEventQuery(event)[0] == driver.CUresult.CUDA_ERROR_NOT_READY
        assert not view(block, MIB).any()
        call(driver.cuStreamWaitEvent, None, event, 0)  # the default stream is not held
        assert (view(block, MIB) == 3).all()
    call(driver.cuEventQuery, event)
    call(driver.cuMemFree, block)
    call(driver.cuEventDestroy, event)
    call(driver.cuStreamDestroy, stream)


def test_pinned_memory_is_read_late_and_other_memory_at_once(context):
    stream = call(driver.cuStreamCreate, 0)
    block = call(driver.cuMemAlloc, 8192)
    pinned = call(driver.cuMemHostAlloc, 4096, 0)
    plain = np.ones(4096, np.uint8)
    with context.held(stream):
        call(driver.cuMemcpyHtoDAsync, block, pinned, 4096, stream)
        call(driver.cuMemcpyHtoDAsync, int(block) + 4096, plain.ctypes.data, 4096, stream)
        view(pinned, 4096)[:] = 2
        plain[:] = 2
    assert (view(block, 8192) == [2] * 4096 + [1] * 4096).all()
    call(driver.cuMemFreeHost, pinned)
    call(driver.cuMemFree, block)
    call(driver.cuStreamDestroy, stream)


def test_a_mempool_keeps_its_threshold_at_a_synchronisation(context):
    pool = call(driver.cuDeviceGetMemPool, 0)
    attribute = driver.CUmemPool_attribute
    stream = call(driver.cuStreamCreate, 0)

    def reserved():
        name = attribute.CU_MEMPOOL_ATTR_RESERVED_MEM_CURRENT
        return int(call(driver.cuMemPoolGetAttribute, pool, name))

    for threshold in (0, 2**64 - 1):
        call(
            driver.cuMemPoolSetAttribute,
            pool,
            attribute.CU_MEMPOOL_ATTR_RELEASE_THRESHOLD,
            driver.cuuint64_t(threshold),
        )
        block = call(driver.cuMemAllocAsync, 40 * MIB, stream)
        call(driver.cuMemFreeAsync, block, stream)
        assert reserved() == 64 * MIB
        call(driver.cuStreamSynchronize, stream)
        assert reserved() == (64 * MIB if threshold else 0)
    call(driver.cuMemPoolTrimTo, pool, 0)
    assert reserved() == 0
    call(
        driver.cuMemPoolSetAttribute,
        pool,
        attribute.CU_MEMPOOL_ATTR_RELEASE_THRESHOLD,
        driver.cuuint64_t(0),
    )
    call(driver.cuStreamDestroy, stream)


def test_without_a_context_and_in_a_forked_child_it_refuses(double):
    call(driver.cuInit, 0)
    with pytest.raises(RuntimeError, match="INVALID_CONTEXT"):
        call(driver.cuMemAlloc, 10)
    child = os.fork()
    if child == 0:
        code, _ = driver.cuDeviceGetCount()
        os._exit(int(code))
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == driver.CUresult.CUDA_ERROR_NOT_INITIALIZED
