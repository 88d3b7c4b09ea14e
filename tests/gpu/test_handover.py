"""Features on their way to a GPU: the contract with CTranslate2, and the same text.

Only CTranslate2 on a GPU takes a view of GPU memory. On the double, a stand-in for its function
checks what it demands of such an array, reads the features from the double's memory, which is
memory of this process, and gives them to a model on the CPU.
"""

import contextlib
import ctypes
import threading
from pathlib import Path

import ctranslate2
import numpy as np
import pytest
from cuda.bindings import driver

from speechrnt import errors, gpu, handover, load_model, models
from speechrnt.handover import FeatureHandover, open_handover, why_off
from speechrnt.transcribe import WhisperModel

MIB = 2**20
SAMPLES = sorted((Path(__file__).parent.parent / "samples").glob("*.wav"))
TYPES = {"<f4": np.float32, "<f2": np.float16}


def call(function, *arguments):
    code, *results = function(*arguments)
    assert int(code) == 0, code
    return results[0] if len(results) == 1 else results


@pytest.fixture
def taken(double, monkeypatch):
    """The arrays that CTranslate2 would be given; views of them are on the CPU here."""
    arrays = []

    def take(array):
        if isinstance(array, np.ndarray):
            arrays.append(("host", array.dtype.str, array.shape))
            return ctranslate2.StorageView.from_array(array)
        assert not hasattr(array, "__array_interface__")
        interface = array.__cuda_array_interface__
        assert interface.get("strides") is None
        address, read_only = interface["data"]
        assert not read_only
        dtype = np.dtype(TYPES[interface["typestr"]])
        # What the view is of is the device whose context is current.
        context = call(driver.cuCtxGetCurrent)
        primary = call(driver.cuDevicePrimaryCtxRetain, 0)
        call(driver.cuDevicePrimaryCtxRelease, 0)
        assert int(context) == int(primary)
        arrays.append(("gpu", dtype.str, interface["shape"]))
        size = int(np.prod(interface["shape"])) * dtype.itemsize
        memory = (ctypes.c_uint8 * size).from_address(address)
        features = np.frombuffer(memory, dtype).reshape(interface["shape"]).astype(np.float32)
        return ctranslate2.StorageView.from_array(features)

    monkeypatch.setattr(handover, "_storage_view", take)
    return arrays


def on_gpu(dtype, pool=None):
    """The embedded model on the CPU, whose features go by way of the GPU."""
    model = load_model(device="cpu", cpu_threads=1)
    return models.Model(
        "pico",
        model.whisper,
        model.tokenizer,
        model.capabilities,
        model.shape,
        FeatureHandover(0, dtype, pool),
    )


def features(batch=1, frames=3000, seed=0):
    rng = np.random.default_rng(seed)
    return rng.uniform(-1, 1.5, (batch, 80, frames)).astype(np.float32)


@pytest.fixture
def transcribe(monkeypatch):
    """A function that gives the texts of all samples."""

    def texts(model):
        monkeypatch.setattr("speechrnt.transcribe.load_model", lambda *_, **__: model)
        whisper = WhisperModel()
        return [[segment.text for segment in whisper.transcribe(path)[0]] for path in SAMPLES]

    return texts


@pytest.mark.parametrize(("dtype", "typestr"), [("float32", "<f4"), ("float16", "<f2")])
def test_the_text_is_that_of_ctranslate2s_own_way(taken, transcribe, dtype, typestr):
    expected = transcribe(load_model(device="cpu", cpu_threads=1))
    assert len(expected) > 3
    assert taken == []
    model = on_gpu(dtype)
    assert transcribe(model) == expected
    assert {(way, kind) for way, kind, _ in taken} == {("gpu", typestr)}
    counted = model.handover.statistics()
    assert (counted.handed_over, counted.fallbacks) == (len(taken), 0)
    itemsize = np.dtype(typestr).itemsize
    assert counted.copied_bytes == sum(int(np.prod(shape)) for *_, shape in taken) * itemsize
    assert model.handover.pool.statistics().in_use == 0


def test_float32_features_arrive_bit_by_bit(taken):
    for batch, frames in ((1, 3000), (4, 3000), (3, 250), (1, 1)):
        given = features(batch, frames)
        expected = np.array(load_model(device="cpu", cpu_threads=1).encode(given))
        np.testing.assert_array_equal(np.array(on_gpu("float32").encode(given)), expected)
    assert [shape for *_, shape in taken] == [
        (1, 80, 3000),
        (4, 80, 3000),
        (3, 80, 250),
        (1, 80, 1),
    ]


def test_the_copy_is_waited_for_before_ctranslate2_looks(taken, double):
    model = on_gpu("float32")
    since = double.calls()
    model.encode(features())
    calls = double.log(since)
    steps = [calls.index(name) for name in ("cuMemcpyHtoDAsync", "cuStreamSynchronize")]
    assert steps == sorted(steps)
    assert steps[1] < calls.index("cuCtxGetCurrent")  # which is where the view is taken
    assert double.hazards() == 0


def test_a_batch_that_is_known_needs_no_memory_of_the_driver(taken, double):
    model = on_gpu("float16")
    model.encode(features(2))
    since = double.calls()
    for seed in range(2):
        model.encode(features(2, seed=seed))
    names = set(double.log(since))
    assert not names & {"cuMemAlloc", "cuMemCreate", "cuMemMap", "cuMemHostAlloc", "cuMemFree"}
    assert model.handover.pool.statistics().in_use == 0


def test_a_pool_at_its_limit_sends_features_the_other_way(taken):
    pool = gpu.GpuMemoryPool(limit=2 * MIB, chunk=2 * MIB)
    model = on_gpu("float32", pool)
    expected = np.array(load_model(device="cpu", cpu_threads=1).encode(features(4)))
    np.testing.assert_array_equal(np.array(model.encode(features(4))), expected)
    model.encode(features(1))
    assert [way for way, *_ in taken] == ["host", "gpu"]
    counted = model.handover.statistics()
    assert (counted.handed_over, counted.fallbacks) == (1, 1)
    assert pool.statistics().in_use == 0


def test_a_raising_encoder_leaves_nothing_behind(taken, double):
    model = on_gpu("float32")
    model.encode(features())
    before = double.everything()
    for shape in ((1, 70, 3000), (1, 80, 3002), (80, 3000), (1,)):
        with pytest.raises(ValueError, match=r"[Ee]xpected (an )?input"):
            model.encode(np.zeros(shape, np.float32))
    model.handover.maintain()
    assert model.handover.pool.statistics().in_use == 0
    assert double.everything() == before


@pytest.mark.parametrize("name", ["cuMemcpyHtoDAsync", "cuStreamSynchronize", "cuCtxPushCurrent"])
def test_a_driver_that_refuses_is_an_error_and_the_next_call_works(taken, double, name):
    model = on_gpu("float32")
    expected = np.array(model.encode(features()))
    before = double.everything()
    for n in (1, 2, 3):
        double.fail(name, n, 801, 1)  # not supported
        try:
            with contextlib.suppress(errors.GpuError):
                model.encode(features())
        finally:
            double.fail(None, 0, 0, 0)
        np.testing.assert_array_equal(np.array(model.encode(features())), expected)
    assert model.handover.pool.statistics().in_use == 0
    assert double.everything() == before


def test_threads_hand_over_at_once(taken, double):
    model = on_gpu("float32")
    given = [features(1 + seed % 2, 200, seed) for seed in range(4)]
    expected = [np.array(load_model(device="cpu", cpu_threads=1).encode(each)) for each in given]
    failures = []

    def work(seed):
        try:
            for _ in range(20):
                np.testing.assert_array_equal(np.array(model.encode(given[seed])), expected[seed])
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert model.handover.statistics().handed_over == 80
    assert model.handover.pool.statistics().in_use == 0
    assert double.hazards() == 0


# Which way


@pytest.mark.parametrize(
    ("compute_type", "dtype"),
    [
        ("float16", "float16"),
        ("int8_float16", "float16"),
        ("bfloat16", "float32"),
        ("int8_bfloat16", "float32"),
        ("float32", "float32"),
        ("int8_float32", "float32"),
        ("int8", "float32"),
    ],
)
def test_features_are_in_the_type_that_the_model_computes_in(double, compute_type, dtype):
    assert open_handover(0, compute_type).dtype == dtype


@pytest.mark.parametrize("size", [2 * MIB, 5 * MIB, 33 * MIB])
def test_a_small_pool_has_small_chunks(double, size):
    pool = open_handover(0, "float16", size).pool
    assert 0 <= size - pool.statistics().limit < 32 * MIB
    assert pool.allocate(2 * MIB).address
    with pytest.raises(errors.OptionError, match="limit must be from 2097152"):
        open_handover(0, "float16", 2 * MIB - 1)


def test_it_can_be_switched_off(double, monkeypatch):
    assert why_off() is None
    monkeypatch.setenv("SPEECHRNT_GPU_POOL", "off")
    assert why_off() == "SPEECHRNT_GPU_POOL is off"
    assert open_handover(0, "float16") is None
    monkeypatch.setenv("SPEECHRNT_GPU_POOL", "of")
    with pytest.raises(errors.OptionError, match="SPEECHRNT_GPU_POOL='of' is unknown"):
        open_handover(0, "float16")


def test_bad_options_are_named(double):
    with pytest.raises(errors.OptionError, match="dtype: must be one of float32, float16, not 'bf"):
        FeatureHandover(0, "bfloat16")
    with pytest.raises(errors.OptionError, match="device must be from 0 to 0, not 3"):
        FeatureHandover(3)
    double.configure(2)
    with pytest.raises(errors.OptionError, match="pool: is of GPU 0, not 1"):
        FeatureHandover(1, pool=gpu.GpuMemoryPool(0, limit=32 * MIB))


def test_models_on_one_gpu_share_a_pool(double):
    one, other = FeatureHandover(0), FeatureHandover(0, "float16")
    assert one.pool is other.pool


# On a real GPU


@pytest.mark.skipif(
    not ctranslate2.get_cuda_device_count(), reason="needs a GPU that CTranslate2 can use"
)
@pytest.mark.parametrize("compute_type", ["float32", "float16"])
def test_on_a_gpu_both_ways_give_the_same_text(monkeypatch, transcribe, compute_type):
    texts = {}
    for way in ("on", "off"):
        monkeypatch.setenv("SPEECHRNT_GPU_POOL", way)
        model = load_model(device="cuda", compute_type=compute_type)
        assert (model.handover is not None) == (way == "on")
        texts[way] = transcribe(model)
        if way == "on":
            assert model.handover.statistics().handed_over > 0
            assert model.handover.pool.statistics().in_use == 0
    assert texts["on"] == texts["off"]
