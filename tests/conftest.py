"""What all tests share: no network, the recordings, and fast tests first."""

import json
import os
import shutil
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

# However slow the machine; fixtures may serve many examples.
settings.register_profile(
    "exploring",
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
# The same examples each time: `--hypothesis-profile=exploring` looks for new ones.
settings.register_profile("the same", settings.get_profile("exploring"), derandomize=True)
settings.load_profile("the same")

# huggingface_hub reads these when it is imported: no test reaches the hub or the user's cache.
_empty_cache = tempfile.TemporaryDirectory(prefix="speechrnt-hub-")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_CACHE"] = _empty_cache.name

TESTS = Path(__file__).parent
SLOW_LAST = [
    "test_hub",
    "test_sched_native",
    "test_streaming_chaos",
    "test_streaming_soak",
    "test_demo",
    "test_span_pool",
    "test_inference_memory",
    "test_gpu",
    "test_packaging",
    "test_parity",
]

# These run against an installed wheel, away from the sources: see test_packaging.py.
collect_ignore = ["wheel"]
if "SPEECHRNT_CUDA" not in os.environ:
    collect_ignore.append("gpu")  # in processes of their own: see test_gpu.py


def pytest_collection_modifyitems(items):
    order = {name: place for place, name in enumerate(SLOW_LAST, start=1)}
    items.sort(key=lambda item: order.get(item.path.stem, 0))


@pytest.fixture(scope="session")
def samples() -> Path:
    """The directory of the short recordings that the package's own model understands."""
    return TESTS / "samples"


@pytest.fixture(scope="session")
def manifest(samples) -> list[dict]:
    """What is said in each of `samples`: dicts with file, lang, text, english and seconds."""
    return json.loads((samples / "manifest.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="session")
def clips(samples, manifest):
    """The recordings as 16 kHz arrays, in the order of `manifest`."""
    from speechrnt import load_audio

    return [load_audio(samples / each["file"]).samples for each in manifest]


@pytest.fixture(scope="module")
def engine():
    """An engine on the embedded model; closed, and found to hold nothing, after the module."""
    from speechrnt import PerformanceOptimizedSTT

    with PerformanceOptimizedSTT(device="cpu") as stt:
        yield stt
    # An unclosed one would have to be found by its threads.
    assert stt.statistics().audio_buffers.in_use == 0
    assert stt.statistics().results.in_use == 0


@pytest.fixture(scope="module")
def stt():
    """An engine that looks after its streams often; without any, and without audio, at the end."""
    from waiting import eventually

    from speechrnt import OptimizationConfig, PerformanceOptimizedSTT

    config = OptimizationConfig(max_concurrent_utterances=200, cleanup_interval_s=0.05)
    with PerformanceOptimizedSTT(config) as stt:
        yield stt
        eventually(lambda: stt.statistics().streams.open == 0)
        assert stt.statistics().audio_buffers.in_use == 0


@pytest.fixture(scope="session")
def recordings(samples, manifest):
    """What puts the recordings together to longer ones."""
    from streaming_helpers import Recordings

    return Recordings(samples, manifest)


@pytest.fixture
def log():
    """A callback for a stream, which keeps the events."""
    from streaming_helpers import Log

    return Log()


@pytest.fixture
def counted(stt):
    """A function that tells by how much a count of streams has changed."""
    before = stt.statistics().streams.counts
    return lambda name: stt.statistics().streams.counts[name] - before[name]


@pytest.fixture(scope="session")
def pico() -> Path:
    """The directory of the embedded model."""
    from speechrnt.hub import EMBEDDED_MODELS

    return EMBEDDED_MODELS["pico"]


@pytest.fixture
def copy(pico, tmp_path) -> Path:
    """A copy of the embedded model that a test may damage."""
    return shutil.copytree(pico, tmp_path / "my model")


@pytest.fixture(scope="session")
def contents(pico) -> dict[str, bytes]:
    """The files of the embedded model."""
    return {path.name: path.read_bytes() for path in pico.iterdir()}


@pytest.fixture(scope="session")
def human_audio() -> Path:
    """The directory of human recordings, which are not part of the repository."""
    path = TESTS.parent.parent / "shared" / "audio"
    if not path.is_dir():
        pytest.skip("needs human recordings in ../shared/audio beside the repository")
    return path


@pytest.fixture(scope="session")
def native():
    """A compiled module that calls what only C code can call of the scheduler."""
    from native import load

    return load("sched_native")


@pytest.fixture
def scheduler():
    """A scheduler of two workers."""
    from speechrnt import Scheduler

    with Scheduler(workers=2) as scheduler:
        yield scheduler


@pytest.fixture(scope="session")
def probe():
    """A compiled module that calls what only C code can call of the pools."""
    from native import load

    return load("pool_probe")


@pytest.fixture(scope="module")
def model():
    """The embedded model."""
    from speechrnt import WhisperModel

    return WhisperModel(device="cpu")


@pytest.fixture(scope="module")
def undeclared(tmp_path_factory):
    """The embedded model's weights, declaring nothing, as stock models do; full context."""
    from speechrnt import WhisperModel
    from speechrnt.hub import EMBEDDED_MODELS

    directory = tmp_path_factory.mktemp("undeclared")
    for file in EMBEDDED_MODELS["pico"].iterdir():
        if file.name != "speechrnt.json":
            (directory / file.name).symlink_to(file)
    return WhisperModel(directory, device="cpu")
