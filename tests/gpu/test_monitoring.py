"""The GPU's pool as an operator sees it: on a live engine, in numbers, and when it is not well."""

import gc
import json

import ctranslate2
import numpy as np
import pytest
from engine_helpers import assert_at_rest
from test_handover import MIB, SAMPLES, on_gpu
from waiting import eventually

from speechrnt import OptimizationConfig, PerformanceOptimizedSTT, gpu, handover, load_audio, stt

CHUNK = 2 * MIB


@pytest.fixture
def engine_on_gpu(double, monkeypatch):
    """Make engines whose features go by way of a pool on the double; see test_handover.py."""
    made = []
    view = ctranslate2.StorageView.from_array

    def make(pool=None, **changes):
        model = on_gpu("float32", pool)
        monkeypatch.setattr(handover, "_storage_view", lambda array: view(to_host(array)))
        monkeypatch.setattr(stt, "load_model", lambda *_, **__: model)
        engine = PerformanceOptimizedSTT(OptimizationConfig(**changes), device="cpu")
        made.append(engine)
        return engine

    yield make
    for engine in made:
        engine.close()


def to_host(array):
    """Return what is in a block, or an array of the host as it is."""
    if isinstance(array, np.ndarray):
        return array
    out = np.empty(array.shape, np.float32)
    array.copy_to(out)
    return out


def fragmented_pool(hole):
    """Return a pool with every other block of a size free, and those that are not."""
    pool = gpu.GpuMemoryPool(limit=32 * MIB, chunk=CHUNK)
    blocks = [pool.allocate(hole) for _ in range(24 * MIB // hole)]
    kept = blocks[::2]
    del blocks
    gc.collect()
    return pool, kept


def test_fragmentation_that_remapping_mends(engine_on_gpu):
    engine = engine_on_gpu(gpu.GpuMemoryPool(limit=32 * MIB, chunk=CHUNK), cleanup_interval_s=3600)
    assert engine.is_system_healthy()
    pool = engine.model.handover.pool
    blocks = [pool.allocate(CHUNK) for _ in range(12)]
    for block in blocks[::2]:
        block.free()
    health = engine.health()
    assert health.problems == (
        "GPU pool: 83% of the free 12.0 MiB is outside the largest free block.",
    )
    assert health.facts.gpu_pool.fragmentation == pytest.approx(5 / 6)
    assert not engine.is_system_healthy()
    # What the engine's maintenance does, every few seconds.
    engine.model.handover.maintain()
    assert engine.is_system_healthy()
    assert engine.statistics().gpu.handover.pool.remapped_chunks > 0


def test_maintenance_mends_it_unasked(engine_on_gpu):
    pool, kept = fragmented_pool(CHUNK)
    assert not pool.health().healthy
    engine = engine_on_gpu(pool, cleanup_interval_s=0.02)
    eventually(engine.is_system_healthy)
    assert engine.statistics().gpu.handover.pool.defragmentations == 1
    assert len(kept) == 6


def test_fragmentation_inside_chunks_lasts_until_the_blocks_are_free(engine_on_gpu):
    pool, kept = fragmented_pool(CHUNK // 2)
    engine = engine_on_gpu(pool, cleanup_interval_s=0.02)
    rounds = engine._maintenance.rounds
    eventually(lambda: engine._maintenance.rounds > rounds + 1)
    [problem] = engine.health().problems
    assert problem == "GPU pool: 92% of the free 12.0 MiB is outside the largest free block."
    # Requests have their text all the same.
    text = engine.transcribe_async(load_audio(SAMPLES[1]).samples, "en").result(60).text
    assert text == "Two five one."
    del kept
    eventually(engine.is_system_healthy)
    assert_at_rest(engine)


def test_a_full_pool_is_noticed_and_features_go_past_it(engine_on_gpu):
    pool = gpu.GpuMemoryPool(limit=8 * MIB, chunk=CHUNK)
    engine = engine_on_gpu(pool)
    blocks = [pool.allocate(CHUNK) for _ in range(4)]
    assert engine.health().problems == ("GPU pool: 100% of the limit of 8.0 MiB is in use.",)
    clip = load_audio(SAMPLES[1]).samples
    assert engine.transcribe_async(clip, "en").result(60).text == "Two five one."
    counted = engine.statistics().gpu.handover
    assert (counted.handed_over, counted.fallbacks) == (0, 1)
    del blocks
    assert engine.is_system_healthy()
    assert engine.transcribe_async(clip, "en").result(60).text == "Two five one."
    counted = engine.statistics().gpu.handover
    assert (counted.handed_over, counted.fallbacks) == (1, 1)


def test_a_broken_driver_is_said_and_stays(engine_on_gpu, double):
    engine = engine_on_gpu(gpu.GpuMemoryPool(limit=8 * MIB, chunk=CHUNK))
    block = engine.model.handover.pool.allocate(CHUNK)
    with double.broken(), pytest.raises(Exception, match="700"):
        block.copy_from(np.zeros(CHUNK, np.uint8))
    [problem] = engine.health().problems
    assert problem.startswith("GPU pool: ")
    assert engine.statistics().gpu.handover.pool.error == 700


def test_the_same_numbers_everywhere(engine_on_gpu):
    from prometheus_client import CollectorRegistry, generate_latest
    from prometheus_client.parser import text_string_to_metric_families

    from speechrnt.prometheus import EngineCollector

    engine = engine_on_gpu(gpu.GpuMemoryPool(limit=32 * MIB, chunk=CHUNK), cleanup_interval_s=3600)
    blocks = [engine.model.handover.pool.allocate(CHUNK) for _ in range(4)]
    blocks[0].free()
    blocks[2].free()
    clip = load_audio(SAMPLES[1]).samples
    assert engine.transcribe_async(clip, "en").result(60).text == "Two five one."
    now = engine.statistics().gpu
    pool = now.handover.pool
    assert (now.device, now.handover.handed_over) == (0, 1)
    assert (pool.in_use, pool.reserved, pool.fragmentation) == (4 * MIB, 8 * MIB, 0.5)
    assert now.handover.staging.misses >= 1

    values = json.loads(engine.get_performance_report("json"))["gpu"]
    assert values["handover"]["pool"]["fragmentation"] == 0.5
    assert values["handover"]["pool"]["in_use"] == 4 * MIB
    assert "fragmentation 50%, utilisation 50%; 1 batches" in engine.get_performance_report()

    registry = CollectorRegistry()
    registry.register(EngineCollector(engine))
    families = text_string_to_metric_families(generate_latest(registry).decode())
    found = {
        (sample.name, *sample.labels.values()): sample.value
        for family in families
        for sample in family.samples
    }
    assert found["speechrnt_gpu_memory_bytes", "0", "pool", "in_use"] == 4 * MIB
    assert found["speechrnt_gpu_memory_bytes", "0", "inference", "in_use"] == now.inference.in_use
    assert found["speechrnt_gpu_fragmentation_ratio", "0"] == 0.5
    assert found["speechrnt_gpu_utilisation_ratio", "0"] == 0.5
    assert found["speechrnt_gpu_batches_total", "0"] == 1
    assert found["speechrnt_pool_acquires_total", "misses", "page_locked"] >= 1
