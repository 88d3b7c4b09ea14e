"""CTranslate2's GPU memory: kept, limited, trimmed and left as it was, on the driver's pools.

What CTranslate2 takes and gives back is taken and given back here by the same calls of the driver.
"""

import contextlib
import os
import threading

import pytest
from cuda.bindings import driver

from speechrnt import errors, mempool
from speechrnt.mempool import (
    cap_inference_memory,
    free_memory,
    inference_memory,
    inference_memory_status,
    restore_inference_memory,
    retain_inference_memory,
    trim_inference_memory,
    why_not_steerable,
)

MIB = 2**20
EVERYTHING = 2**64 - 1


def call(function, *arguments):
    code, *results = function(*arguments)
    if int(code):
        raise RuntimeError(code.name)
    return results[0] if len(results) == 1 else results


class Engine:
    """Takes memory as CTranslate2 does, and synchronises when it has nothing to do."""

    def __init__(self):
        self.stream = call(driver.cuStreamCreate, 0)
        self.blocks = []

    def take(self, *sizes):
        self.blocks += [call(driver.cuMemAllocAsync, size, self.stream) for size in sizes]

    def give_back(self, count=None):
        for _ in range(len(self.blocks) if count is None else count):
            call(driver.cuMemFreeAsync, self.blocks.pop(), self.stream)

    def idle(self):
        call(driver.cuStreamSynchronize, self.stream)


@pytest.fixture
def engine():
    """An engine on device 0, with nothing steered before and nothing left behind after."""
    call(driver.cuInit, 0)
    call(driver.cuCtxPushCurrent, call(driver.cuDevicePrimaryCtxRetain, 0))
    default = call(driver.cuDeviceGetDefaultMemPool, 0)
    try:
        engine = Engine()
        set_threshold(default, 0)
        yield engine
        restore_inference_memory()
        engine.give_back()
        engine.idle()
        call(driver.cuStreamDestroy, engine.stream)
        assert int(call(driver.cuDeviceGetMemPool, 0)) == int(default)
        assert not mempool._steered
        call(driver.cuMemPoolTrimTo, default, 0)
    finally:
        call(driver.cuCtxPopCurrent)
        call(driver.cuDevicePrimaryCtxRelease, 0)


def set_threshold(pool, size):
    name = driver.CUmemPool_attribute.CU_MEMPOOL_ATTR_RELEASE_THRESHOLD
    call(driver.cuMemPoolSetAttribute, pool, name, driver.cuuint64_t(size))


@contextlib.contextmanager
def foreign_pool():
    """Another library's pool, installed for device 0."""
    properties = driver.CUmemPoolProps()
    properties.allocType = driver.CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED
    properties.location.type = driver.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
    pool = call(driver.cuMemPoolCreate, properties)
    call(driver.cuDeviceSetMemPool, 0, pool)
    try:
        yield pool
    finally:
        call(driver.cuMemPoolDestroy, pool)


# Keeping


def test_by_default_everything_is_given_back_when_idle_and_retained_it_is_not(engine):
    engine.take(100 * MIB)
    engine.give_back()
    assert inference_memory().reserved >= 100 * MIB
    engine.idle()
    assert inference_memory().reserved == 0
    assert inference_memory_status() == "off: given back whenever the GPU is idle"

    assert retain_inference_memory()
    engine.take(100 * MIB)
    engine.give_back()
    engine.idle()
    now = inference_memory()
    assert now.reserved >= 100 * MIB
    assert (now.in_use, now.limit, now.threshold, now.owner) == (0, 0, EVERYTHING, "device")
    assert now.peak >= 100 * MIB
    assert now.peak_reserved >= now.reserved
    assert inference_memory_status() == "kept by the device's pool, all"

    restore_inference_memory()
    engine.idle()
    assert inference_memory().reserved == 0
    assert inference_memory().threshold == 0


def test_a_threshold_bounds_what_is_kept_and_can_be_changed(engine):
    assert retain_inference_memory(threshold=64 * MIB)
    engine.take(200 * MIB)
    engine.give_back()
    engine.idle()
    assert 0 < inference_memory().reserved <= 64 * MIB
    assert inference_memory_status() == "kept by the device's pool, up to 64 MiB"
    assert retain_inference_memory(threshold=256 * MIB)
    assert inference_memory().threshold == 256 * MIB
    restore_inference_memory()
    assert inference_memory().threshold == 0


def test_a_threshold_that_someone_else_has_set_is_left_alone(engine):
    default = call(driver.cuDeviceGetDefaultMemPool, 0)
    set_threshold(default, 128 * MIB)
    assert retain_inference_memory()
    assert inference_memory().threshold == 128 * MIB
    restore_inference_memory()
    assert inference_memory().threshold == 128 * MIB
    set_threshold(default, 0)


def test_the_pool_of_another_library_is_left_alone(engine):
    with foreign_pool() as pool:
        assert not retain_inference_memory()
        with pytest.raises(errors.GpuError, match="another library has installed a memory pool"):
            cap_inference_memory(64 * MIB)
        assert int(call(driver.cuDeviceGetMemPool, 0)) == int(pool)
        engine.take(40 * MIB)
        now = inference_memory()
        assert (now.owner, now.threshold) == ("other", 0)
        assert now.in_use >= 40 * MIB
        assert inference_memory_status() == "left to the pool that another library has installed"
        engine.give_back()
        engine.idle()


def test_a_pool_that_another_library_installs_over_ours_is_left_alone(engine):
    cap_inference_memory(64 * MIB)
    with foreign_pool() as pool:
        assert inference_memory().owner == "other"
        assert not retain_inference_memory()
        restore_inference_memory()
        assert int(call(driver.cuDeviceGetMemPool, 0)) == int(pool)


# Limits


def test_a_cap_bounds_the_engine_and_keeps_memory_up_to_it(engine):
    cap_inference_memory(256 * MIB)
    assert inference_memory_status() == "pool, up to 256 MiB"
    engine.take(100 * MIB, 100 * MIB)
    with pytest.raises(RuntimeError, match="OUT_OF_MEMORY"):
        engine.take(200 * MIB)
    now = inference_memory()
    assert (now.limit, now.owner, now.threshold) == (256 * MIB, "speechrnt", EVERYTHING)
    assert now.in_use == 200 * MIB <= now.reserved <= now.limit
    engine.give_back()
    engine.idle()
    assert inference_memory().reserved == now.reserved
    assert retain_inference_memory()  # it is, already
    assert inference_memory().owner == "speechrnt"


def test_what_was_taken_before_stays_where_it_was(engine):
    assert retain_inference_memory()
    engine.take(64 * MIB)
    cap_inference_memory(96 * MIB)
    assert inference_memory().in_use == 0
    engine.take(80 * MIB)
    cap_inference_memory(128 * MIB)  # a new one; the old one lives on until it is empty
    engine.take(100 * MIB)
    assert inference_memory().in_use == 100 * MIB
    restore_inference_memory()
    now = inference_memory()
    assert (now.owner, now.in_use, now.threshold) == ("device", 64 * MIB, 0)
    engine.give_back()
    engine.idle()
    assert inference_memory().reserved == 0


def test_a_driver_whose_pools_have_no_limit_is_found_out(engine, monkeypatch):
    create = driver.cuMemPoolCreate

    def unlimited(properties):
        properties.maxSize = 0
        return create(properties)

    unlimited.__name__ = "cuMemPoolCreate"
    monkeypatch.setattr(driver, "cuMemPoolCreate", unlimited)
    with pytest.raises(errors.GpuUnavailable, match="pools cannot be limited with this NVIDIA"):
        cap_inference_memory(64 * MIB)
    assert inference_memory().owner == "device"


# Trimming


def test_trimming_gives_back_what_is_idle_and_waits_for_what_is_not(engine):
    assert retain_inference_memory()
    engine.take(100 * MIB, 60 * MIB)
    engine.give_back(1)
    reserved = inference_memory().reserved
    given_back = trim_inference_memory()
    assert given_back >= 32 * MIB
    assert inference_memory().reserved == reserved - given_back >= 100 * MIB
    engine.give_back()
    assert trim_inference_memory(keep=32 * MIB) > 0
    kept = inference_memory().reserved
    assert 32 * MIB <= kept <= 64 * MIB
    assert trim_inference_memory(keep=kept) == 0
    assert trim_inference_memory() == kept
    assert trim_inference_memory() == 0


def test_memory_that_a_pool_keeps_counts_as_free(engine):
    free, total = free_memory()
    assert 0 < free <= total
    assert retain_inference_memory()
    engine.take(512 * MIB)
    assert free_memory()[0] == pytest.approx(free - 512 * MIB, abs=64 * MIB)
    engine.give_back()
    engine.idle()
    assert inference_memory().reserved >= 512 * MIB
    assert free_memory()[0] == pytest.approx(free, abs=64 * MIB)


# What cannot be


@pytest.mark.parametrize(
    "function",
    [
        lambda: retain_inference_memory(threshold=0),
        lambda: retain_inference_memory(threshold=-1),
        lambda: retain_inference_memory(threshold=2**64),
        lambda: retain_inference_memory(threshold=1.5),
        lambda: cap_inference_memory(31 * MIB),
        lambda: cap_inference_memory(None),
        lambda: cap_inference_memory(True),
        lambda: trim_inference_memory(-1),
        lambda: trim_inference_memory("all"),
        lambda: retain_inference_memory(device=-1),
        lambda: retain_inference_memory(device="0"),
        lambda: inference_memory(device=True),
    ],
)
def test_bad_numbers_are_named(engine, function):
    with pytest.raises(errors.OptionError, match=r"must be a (number of bytes|whole number) from "):
        function()
    assert inference_memory().owner == "device"


def test_a_device_that_is_not_there_is_said(engine):
    count = call(driver.cuDeviceGetCount)
    sentence = f"there is no CUDA device {count}: the driver sees {count}"
    assert why_not_steerable(count) == sentence
    for function in (
        lambda: retain_inference_memory(count),
        lambda: cap_inference_memory(64 * MIB, count),
        lambda: trim_inference_memory(0, count),
        lambda: inference_memory(count),
        lambda: free_memory(count),
    ):
        with pytest.raises(errors.GpuUnavailable, match=sentence):
            function()
    assert inference_memory_status(count) == f"off: {sentence}"
    restore_inference_memory(count)  # nothing was done


def test_ctranslate2s_other_allocator_is_not_steered(engine, monkeypatch):
    monkeypatch.setenv("CT2_CUDA_ALLOCATOR", "cub_caching")
    for function in (retain_inference_memory, inference_memory, trim_inference_memory):
        with pytest.raises(errors.GpuUnavailable, match="CT2_CUDA_ALLOCATOR=cub_caching has CTr"):
            function()
    with pytest.raises(errors.GpuUnavailable, match="cannot be steered"):
        cap_inference_memory(64 * MIB)
    assert inference_memory_status().startswith("off: CT2_CUDA_ALLOCATOR=cub_caching")
    assert free_memory()[0] > 0
    monkeypatch.setenv("CT2_CUDA_ALLOCATOR", "cuda_malloc_async")
    assert why_not_steerable() is None


# On the double only: what a real driver cannot be made to do


def test_a_device_without_memory_pools_is_said(double):
    double.configure(2, device=1, pools=False)
    try:
        sentence = "CUDA device 1 has no memory pools, so CTranslate2 uses none"
        assert why_not_steerable(0) == why_not_steerable(1) == sentence
        assert free_memory(0)[0] > 0
    finally:
        double.configure(2, device=1)


def test_devices_are_steered_apart(double):
    double.configure(2)
    cap_inference_memory(64 * MIB, device=1)
    assert retain_inference_memory(device=0)
    assert inference_memory(0).owner == "device"
    assert inference_memory(1).owner == "speechrnt"
    restore_inference_memory(0)
    assert inference_memory(0).threshold == 0
    assert inference_memory(1).limit == 64 * MIB
    restore_inference_memory(1)
    assert inference_memory(1).owner == "device"


ACTIONS = {
    "retain": retain_inference_memory,
    "cap": lambda: cap_inference_memory(64 * MIB),
    "cap again": lambda: cap_inference_memory(96 * MIB),
    "trim": trim_inference_memory,
    "read": inference_memory,
    "free": free_memory,
}


@pytest.mark.parametrize("before", ["nothing", "retain", "cap"])
@pytest.mark.parametrize("action", ACTIONS)
def test_a_driver_that_refuses_any_call_leaks_nothing(engine, double, before, action):
    assert retain_inference_memory()
    engine.take(40 * MIB)
    engine.give_back()
    engine.idle()
    restore_inference_memory()
    initial = double.everything()
    refused = 0
    for n in range(1, 100):
        if before != "nothing":
            ACTIONS[before]()
        since = double.calls()
        double.fail(None, n, 999, 1)
        try:
            ACTIONS[action]()
        except (errors.GpuError, errors.GpuUnavailable):
            refused += 1
        is_done = double.fault_pending()
        double.fail(None, 0, 0, 0)
        failed = double.log(since)[n - 1 : n]
        restore_inference_memory()
        # What the driver refuses to take back, it keeps.
        if failed == ["cuDevicePrimaryCtxRelease"]:
            call(driver.cuDevicePrimaryCtxRelease, 0)
        if failed == ["cuMemPoolDestroy"]:
            initial["pool"] += 1
        assert inference_memory().owner == "device"
        assert inference_memory().threshold == 0
        trim_inference_memory()
        assert {**double.everything(), "used": 0} == {**initial, "used": 0}
        if is_done:
            break
    assert refused >= 3


def test_threads_steer_at_once(double):
    before = double.everything()
    failures = []

    def steer(seed):
        try:
            for step in range(100):
                [
                    retain_inference_memory,
                    lambda: cap_inference_memory(64 * MIB),
                    inference_memory,
                    trim_inference_memory,
                    restore_inference_memory,
                ][(seed * 7 + step * 3) % 5]()
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=steer, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    restore_inference_memory()
    assert failures == []
    assert double.everything() == before


def test_a_forked_child_is_refused_and_the_parent_goes_on(double):
    cap_inference_memory(64 * MIB)
    child = os.fork()
    if child == 0:
        try:
            inference_memory()
        except (errors.GpuError, errors.GpuUnavailable):
            restore_inference_memory()  # nothing is the child's
            os._exit(0)
        os._exit(1)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0
    assert inference_memory().limit == 64 * MIB
    restore_inference_memory()
