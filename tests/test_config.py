"""The configuration: what it refuses, what suits which machine, and what each field changes."""

import subprocess
import sys
import threading
import time
from dataclasses import FrozenInstanceError, fields, replace

import numpy as np
import pytest
from engine_helpers import assert_at_rest, held, with_pauses
from hypothesis import given
from hypothesis import strategies as st
from waiting import eventually

from speechrnt import (
    HardwareProfile,
    OptimizationConfig,
    OptimizedSTTFactory,
    OptionError,
    Overloaded,
    PerformanceOptimizedSTT,
    Priority,
)
from speechrnt.config import recommend

GIB = 1 << 30
FLAGS = [field.name for field in fields(OptimizationConfig) if field.type == "bool"]
NUMBERS = [field.name for field in fields(OptimizationConfig) if "int" in str(field.type)]


@pytest.mark.parametrize("name", FLAGS)
@pytest.mark.parametrize("value", [None, 0, 1, "yes", np.bool_(True)])
def test_a_switch_is_on_or_off(name, value):
    with pytest.raises(OptionError, match=rf"{name}: must be True or False, not"):
        OptimizationConfig(**{name: value})


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize("value", [0, -1, 1.5, "3", True, float("nan"), 10**12, [1]])
def test_a_size_is_a_whole_number_in_its_range(name, value):
    with pytest.raises(
        OptionError, match=rf"{name}: must be a whole number from [12] to \d+.*, not"
    ):
        OptimizationConfig(**{name: value})


@pytest.mark.parametrize("value", [None, 0, -1, "3", True, float("nan"), float("inf"), 1e9])
def test_an_interval_is_a_number_of_seconds(value):
    with pytest.raises(OptionError, match="cleanup_interval_s: must be a number from"):
        OptimizationConfig(cleanup_interval_s=value)


@pytest.mark.parametrize("name", NUMBERS)
def test_none_is_taken_where_there_is_something_to_choose(name):
    if getattr(OptimizationConfig(), name) is None:
        OptimizationConfig(**{name: None})
    else:
        with pytest.raises(OptionError, match=f"{name}.*None"):
            OptimizationConfig(**{name: None})


def test_whole_numbers_of_numpy_will_do():
    assert OptimizationConfig(max_batch_size=np.int64(4)).max_batch_size == 4


def test_it_cannot_be_changed_and_can_be_compared():
    config = OptimizationConfig()
    with pytest.raises(FrozenInstanceError):
        config.max_batch_size = 4
    assert config == OptimizationConfig()
    assert hash(config) == hash(OptimizationConfig())
    with pytest.raises(OptionError):
        replace(config, max_batch_size=0)


def test_results_are_twice_the_buffers_unless_told():
    assert OptimizationConfig(audio_buffer_pool_size=70).result_records == 140
    assert OptimizationConfig(result_pool_size=7).result_records == 7


@pytest.mark.parametrize(
    ("device", "cores", "given", "expected"),
    [
        ("cpu", 1, {}, (1, 1)),
        ("cpu", 2, {}, (2, 1)),
        ("cpu", 4, {}, (4, 1)),
        ("cpu", 16, {}, (4, 4)),
        ("cpu", 16, {"cpu_threads": 8}, (2, 8)),
        ("cpu", 16, {"model_workers": 3}, (3, 4)),
        ("cpu", 2, {"cpu_threads": 8}, (1, 8)),
        ("cuda", 64, {}, (1, 16)),
        ("cuda", 64, {"model_workers": 2, "cpu_threads": 1}, (2, 1)),
    ],
)
def test_calls_of_the_model_share_the_cores(device, cores, given, expected):
    assert OptimizationConfig(**given).model_threads(device, cores) == expected


def assert_in_range(config):
    assert 50 <= config.audio_buffer_pool_size <= 200
    assert config.result_pool_size == 2 * config.audio_buffer_pool_size
    assert 20 <= config.max_concurrent_utterances <= 100
    assert 2 <= config.cleanup_interval_s <= 5
    assert 1 <= config.thread_pool_size <= 64


@given(
    cores=st.integers(1, 100_000),
    memory=st.integers(1, 1 << 60),
    gpu=st.none() | st.integers(0, 1 << 60),
)
def test_what_is_recommended_is_sensible_on_any_machine(cores, memory, gpu):
    config = recommend(HardwareProfile(cores, memory, gpu))
    assert_in_range(config)
    assert config.enable_gpu_memory_pool == (gpu is not None)


def test_more_hardware_gets_more():
    small = recommend(HardwareProfile(1, 256 << 20))
    large = recommend(HardwareProfile(512, 4096 * GIB))
    assert (small.max_concurrent_utterances, small.audio_buffer_pool_size) == (20, 50)
    assert (large.max_concurrent_utterances, large.audio_buffer_pool_size) == (100, 200)
    assert (small.thread_pool_size, large.thread_pool_size) == (1, 64)
    assert (small.cleanup_interval_s, large.cleanup_interval_s) == (2, 5)
    # Many cores, no memory; and the other way round.
    assert recommend(HardwareProfile(512, 256 << 20)).max_concurrent_utterances == 20
    assert recommend(HardwareProfile(1, 4096 * GIB)).max_concurrent_utterances == 20


def test_a_gpu_gets_a_quarter_of_what_is_free_for_the_pool():
    config = recommend(HardwareProfile(8, 32 * GIB, 16 * GIB))
    assert config.gpu_memory_pool_size_mb == 4096
    assert config.max_batch_size > recommend(HardwareProfile(8, 32 * GIB)).max_batch_size
    assert recommend(HardwareProfile(8, 32 * GIB, 1)).gpu_memory_pool_size_mb == 2


@pytest.mark.parametrize("profile", [HardwareProfile(0, GIB), HardwareProfile(1, 0)])
def test_a_machine_without_anything_is_refused(profile):
    with pytest.raises(OptionError, match="no machine"):
        recommend(profile)


def test_this_machine_is_found_and_served():
    profile = OptimizedSTTFactory.detect_hardware()
    assert profile.cores >= 1
    assert profile.memory_bytes > 1 << 20
    assert_in_range(OptimizedSTTFactory.recommended_config())
    assert OptimizedSTTFactory.recommended_config(profile) == recommend(profile)
    with OptimizedSTTFactory.create_optimized(device="cpu") as stt:
        assert stt.config == OptimizedSTTFactory.recommended_config()


# What each field changes, on a real engine.


@pytest.fixture
def engine_with():
    """Make engines; they are closed after the test."""
    made = []

    def make(**changes):
        stt = PerformanceOptimizedSTT(OptimizationConfig(**changes), device="cpu")
        made.append(stt)
        return stt

    yield make
    for stt in made:
        stt.close(cancel=True)


def threads():
    return set(threading.enumerate())


@pytest.mark.parametrize("size", [1, 50])
def test_audio_buffer_pool_size(engine_with, clips, monkeypatch, size):
    stt = engine_with(audio_buffer_pool_size=size, cleanup_interval_s=3600)
    with held(monkeypatch):
        futures = [stt.transcribe_async(clip) for clip in clips[:8]]
        eventually(lambda: stt.statistics().audio_buffers.in_use >= 16)
    assert all(future.result().text for future in futures)
    assert_at_rest(stt)
    assert stt.statistics().audio_buffers.idle >= 16
    # As soon as anything may be freed, while the demand is still remembered.
    now = time.monotonic()
    for later in (0, 11):
        stt._buffers.maintain(now + later)
    idle = stt.statistics().audio_buffers.idle
    assert idle <= 1 if size == 1 else idle >= 16


def test_as_many_requests_as_are_accepted_have_their_buffers(engine_with, clips, monkeypatch):
    stt = engine_with(audio_buffer_pool_size=1, max_queued_requests=300, max_batch_size=1)
    with held(monkeypatch):
        futures = [stt.transcribe_async(clips[1], "en") for _ in range(300)]
    assert {future.result().text for future in futures} == {"Two five one."}


@pytest.mark.parametrize("size", [1, 1500])
def test_result_pool_size(engine_with, clips, size):
    stt = engine_with(result_pool_size=size, max_queued_requests=1500, cleanup_interval_s=3600)
    streams = [stt.stream(language="en") for _ in range(8)]
    for stream in streams:
        stream.push(with_pauses([clips[1]]))
    eventually(lambda: stt.statistics().results.in_use == 8)
    for stream in streams:
        assert stream.finalize().result(60).text == "Two five one."
    assert_at_rest(stt)
    # As many as with as many utterances at once.
    records = [stt._results.acquire() for _ in range(1500)]
    for record in records:
        record.release()
    now = time.monotonic()
    for later in (0, 11):
        stt._results.maintain(now + later)
    idle = stt.statistics().results.idle
    assert idle <= 512 if size == 1 else idle >= 1500  # whole chunks


@pytest.mark.parametrize("workers", [1, 3])
def test_thread_pool_size(engine_with, workers):
    stt = engine_with(thread_pool_size=workers)
    assert len(stt.statistics().scheduler.workers) == workers


def test_enable_work_stealing(engine_with, clips):
    off = engine_with(enable_work_stealing=False, thread_pool_size=3)
    on = engine_with(enable_work_stealing=True, thread_pool_size=3)
    audio = with_pauses(clips[:6])

    def stolen(stt):
        for future in [stt.transcribe_async(audio, "en") for _ in range(6)]:
            future.result()
        return stt.statistics().scheduler.stolen

    # The features are spawned by a task that goes on reading: whoever is idle takes them.
    eventually(lambda: stolen(on) > 0)
    assert stolen(off) == 0
    assert off.statistics().scheduler.spawned > 0


@pytest.mark.parametrize("is_on", [True, False])
def test_enable_priority_scheduling(engine_with, clips, monkeypatch, is_on):
    stt = engine_with(enable_priority_scheduling=is_on, model_workers=1, max_batch_size=1)
    order = []
    with held(monkeypatch, first=1) as gate:
        stt.transcribe_async(clips[1], "en")
        assert gate.reached.wait(60)
        for n, priority in enumerate((Priority.LOW, Priority.NORMAL, Priority.HIGH), start=1):
            future = stt.transcribe_async(clips[1], "en", priority=priority)
            future.add_done_callback(lambda _, priority=priority: order.append(priority))
            # One by one, as they may overtake each other before they wait.
            eventually(lambda n=n: sum(stt.statistics().dispatcher.queued.values()) == n)
    eventually(lambda: len(order) == 3)
    assert order == (sorted(order) if is_on else sorted(order, reverse=True))
    used = {p for p, n in stt.statistics().scheduler.executed.items() if n} - {Priority.LOW}
    assert used == ({Priority.HIGH, Priority.NORMAL} if is_on else {Priority.NORMAL})


def test_enable_async_processing(engine_with, clips):
    before = threads()
    stt = engine_with(enable_async_processing=False, model_workers=1)
    assert [thread.name for thread in threads() - before] == ["speechrnt-model-0"]
    assert stt.statistics().scheduler is None
    futures = [stt.transcribe_async(with_pauses(clips[3:6])) for _ in range(3)]
    assert len({future.result().text for future in futures}) == 1
    assert_at_rest(stt)
    stt.close()
    assert not threads() - before
    with_scheduler = engine_with()
    assert with_scheduler.statistics().scheduler.size >= 1


def test_max_concurrent_utterances(engine_with):
    stt = engine_with(max_concurrent_utterances=2)
    streams = [stt.stream() for _ in range(2)]
    with pytest.raises(Overloaded, match="2 streams"):
        stt.stream()
    for stream in streams:
        stream.cancel()


def test_max_queued_requests(engine_with, clips, monkeypatch):
    stt = engine_with(max_queued_requests=3)
    with held(monkeypatch) as gate:
        futures = [stt.transcribe_async(clips[1], "en") for _ in range(3)]
        assert gate.reached.wait(60)
        with pytest.raises(Overloaded, match="3 requests are under way") as refusal:
            stt.transcribe_async(clips[1], "en")
        assert refusal.value.retry_after_s > 0
    assert {future.result().text for future in futures} == {"Two five one."}
    # What a future tells is counted before: there is room again.
    assert stt.transcribe_async(clips[1], "en").result().text == "Two five one."
    assert stt.statistics().requests["rejected"] == 1


@pytest.mark.parametrize("size", [1, 2, 8])
def test_max_batch_size(engine_with, clips, monkeypatch, size):
    stt = engine_with(max_batch_size=size, model_workers=1)
    with held(monkeypatch, first=1) as gate:
        futures = [stt.transcribe_async(clips[1], "en")]
        assert gate.reached.wait(60)
        futures += [stt.transcribe_async(clips[1], "en") for _ in range(12)]
        eventually(lambda: sum(stt.statistics().dispatcher.queued.values()) == 12)
    for future in futures:
        future.result()
    assert max(stt.statistics().dispatcher.batch_sizes) == size


@pytest.mark.parametrize("workers", [1, 3])
def test_model_workers(engine_with, clips, monkeypatch, workers):
    stt = engine_with(model_workers=workers, max_batch_size=1)
    assert stt.model.whisper.num_workers == workers
    with held(monkeypatch) as gate:
        futures = [stt.transcribe_async(clips[1], "en") for _ in range(6)]
        for _ in range(workers):
            assert gate.arrived.acquire(timeout=60)
        eventually(lambda: sum(stt.statistics().dispatcher.queued.values()) == 6 - workers)
        assert stt.statistics().dispatcher.running == workers
    assert {future.result().text for future in futures} == {"Two five one."}


@pytest.mark.parametrize("threads", [1, 3])
def test_cpu_threads(monkeypatch, threads):
    import speechrnt.stt

    given = []
    load = speechrnt.stt.load_model

    def note(*args, **options):
        given.append(options["cpu_threads"])
        return load(*args, **options)

    monkeypatch.setattr(speechrnt.stt, "load_model", note)
    config = OptimizationConfig(cpu_threads=threads, model_workers=1)
    with PerformanceOptimizedSTT(config, device="cpu") as stt:
        assert given == [threads]
        assert stt.transcribe_async(np.zeros(16_000, dtype=np.float32)).result().text == ""


def test_cleanup_interval_s(engine_with):
    often = engine_with(cleanup_interval_s=0.02)
    seldom = engine_with(cleanup_interval_s=60)
    eventually(lambda: often.statistics().scheduler.executed[Priority.LOW] >= 3)
    assert seldom.statistics().scheduler.executed[Priority.LOW] == 0


def test_stall_after_s(engine_with):
    release = threading.Event()
    soon, late = (engine_with(stall_after_s=seconds) for seconds in (0.02, 60))
    for stt in (soon, late):
        stt._scheduler.submit_nowait(release.wait, 60)
    try:
        eventually(lambda: soon.health().facts.stalled_workers)
        assert not late.health().facts.stalled_workers
    finally:
        release.set()


@pytest.mark.parametrize("keeps", [True, False])
def test_retain_inference_memory(keeps):
    program = f"""
import sys, numpy as np
from speechrnt import OptimizationConfig, PerformanceOptimizedSTT, inference_memory
config = OptimizationConfig(retain_inference_memory={keeps})
with PerformanceOptimizedSTT(config, device="cpu") as stt:
    audio = np.random.default_rng(0).normal(0, 0.1, 160_000).astype(np.float32)
    stt.transcribe_async(audio, "en", vad=False, audio_context="full").result()
    print(inference_memory.status())
    print(inference_memory.statistics().reserved > 0)
"""
    if sys.platform != "linux":
        pytest.skip("the pool is Linux's")
    output = subprocess.run(
        [sys.executable, "-c", program], check=True, timeout=300, capture_output=True, text=True
    ).stdout.splitlines()
    if keeps and output[-1] == "False":
        pytest.skip(f"there is no pool here: {output[0]}")
    assert output[-1] == str(keeps)


# What a GPU's pool does, tests/gpu shows; here, that it is asked for.


def test_enable_gpu_memory_pool():
    assert OptimizationConfig(enable_gpu_memory_pool=False).gpu_pool_bytes(GIB) == 0
    assert OptimizationConfig().gpu_pool_bytes(GIB) == GIB // 4
    assert OptimizationConfig().gpu_pool_bytes(None) is None


def test_gpu_memory_pool_size_mb():
    assert OptimizationConfig(gpu_memory_pool_size_mb=64).gpu_pool_bytes(GIB) == 64 << 20


def test_every_field_has_a_test_here():
    names = {name.removeprefix("test_") for name in globals() if name.startswith("test_")}
    assert {field.name for field in fields(OptimizationConfig)} <= names
