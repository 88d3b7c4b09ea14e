"""One face for CTranslate2's memory on all devices, with the driver's pools behind it."""

import pytest
from cuda.bindings import driver

from speechrnt import errors, inference_memory, mempool

MIB = 2**20


@pytest.fixture(autouse=True)
def nothing_configured(monkeypatch):
    monkeypatch.delenv("SPEECHRNT_INFERENCE_MEMORY", raising=False)
    driver.cuInit(0)
    yield
    inference_memory.configure("off", device="cuda")
    inference_memory._gpus.clear()
    assert mempool.inference_memory().owner == "device"


def test_the_first_model_has_the_memory_kept():
    assert inference_memory.status("cuda") == "pool"  # to come
    assert mempool.inference_memory().threshold == 0
    inference_memory.prepare("cuda")
    assert inference_memory.status("cuda:0") == "kept by the device's pool, all"
    now = inference_memory.statistics("cuda")
    assert isinstance(now, inference_memory.GpuInferenceMemory)
    assert (now.owner, now.limit) == ("device", 0)
    assert inference_memory.trim(device="cuda") >= 0
    inference_memory.configure("off", device="cuda:0")
    assert mempool.inference_memory().threshold == 0
    inference_memory.prepare("cuda")  # a choice was made
    assert mempool.inference_memory().threshold == 0
    assert inference_memory.status("cuda") == "off: given back whenever the GPU is idle"


def test_a_limit_makes_a_pool_of_our_own():
    inference_memory.configure("pool", 256 * MIB, "cuda")
    assert inference_memory.status("cuda") == "pool, up to 256 MiB"
    assert inference_memory.statistics("cuda").limit == 256 * MIB
    with pytest.raises(errors.OptionError, match="limit: must be a number of bytes from 33554432"):
        inference_memory.configure("pool", 5, "cuda")
    assert inference_memory.statistics("cuda").limit == 256 * MIB
    inference_memory.prepare("cuda")
    assert inference_memory.statistics("cuda").limit == 256 * MIB
    inference_memory.configure("pool", device="cuda")
    assert inference_memory.status("cuda") == "kept by the device's pool, all"


@pytest.mark.parametrize(("mode", "kept"), [("off", False), ("pool", True), ("mallopt", True)])
def test_the_environment_chooses(monkeypatch, mode, kept):
    monkeypatch.setenv("SPEECHRNT_INFERENCE_MEMORY", mode)
    assert inference_memory.status("cuda") == ("pool" if kept else "off")
    inference_memory.prepare("cuda")
    assert (mempool.inference_memory().threshold > 0) == kept


def test_an_unknown_mode_in_the_environment_is_an_error(monkeypatch):
    monkeypatch.setenv("SPEECHRNT_INFERENCE_MEMORY", "keep")
    with pytest.raises(errors.OptionError, match="SPEECHRNT_INFERENCE_MEMORY='keep' is unknown"):
        inference_memory.prepare("cuda")


def test_what_cannot_be_steered_is_told_and_no_error(monkeypatch):
    monkeypatch.setenv("CT2_CUDA_ALLOCATOR", "cub_caching")
    assert inference_memory.status("cuda").startswith("off: CT2_CUDA_ALLOCATOR=cub_caching has")
    inference_memory.prepare("cuda")
    assert inference_memory.status("cuda").startswith("off: CT2_CUDA_ALLOCATOR=cub_caching has")
    with pytest.raises(errors.GpuUnavailable, match="cub_caching"):
        inference_memory.statistics("cuda")
    monkeypatch.delenv("CT2_CUDA_ALLOCATOR")


def test_a_gpu_that_is_not_there_is_told_and_no_error():
    inference_memory.configure("pool", device="cuda:9")
    assert inference_memory.status("cuda:9").startswith("off: there is no CUDA device 9")
