"""What Prometheus reads: the statistics of one engine or of several, each metric once."""

import gc
import math
import os
import re
import subprocess
import sys
import weakref
from pathlib import Path

import numpy as np
import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from speechrnt import OptimizationConfig, OptionError, PerformanceOptimizedSTT
from speechrnt.latency import Histogram
from speechrnt.monitoring import MIB
from speechrnt.prometheus import EngineCollector, _buckets

ROOT = Path(__file__).parent.parent
SMALL = OptimizationConfig(
    thread_pool_size=1, model_workers=1, max_queued_requests=10, max_concurrent_utterances=2
)
# Of the process, or of a device, whichever engine tells of it.
SHARED = {("speechrnt_memory_resident_bytes",), ("speechrnt_pool_reserved_bytes", "inference")}


@pytest.fixture(scope="module")
def stt():
    with PerformanceOptimizedSTT(SMALL, device="cpu") as stt:
        transcribe(stt)
        yield stt


@pytest.fixture
def other():
    with PerformanceOptimizedSTT(SMALL, device="cpu") as stt:
        yield stt


def transcribe(stt):
    noise = np.random.default_rng(0).uniform(-0.1, 0.1, 16_000)
    stt.transcribe_async(noise, "en", vad=False).result()


def registry_with(engines):
    registry = CollectorRegistry()
    registry.register(EngineCollector(engines))
    return registry


def samples_of(registry):
    text = generate_latest(registry).decode()
    families = list(text_string_to_metric_families(text))
    assert len({family.name for family in families}) == len(families)
    assert len(set(re.findall(r"^# TYPE (\S+)", text, re.MULTILINE))) == text.count("# TYPE ")
    return [sample for family in families for sample in family.samples]


def values_of(registry, **labels):
    """Return the values of metrics that have these labels, by name and other labels' values."""
    values = {}
    for sample in samples_of(registry):
        if labels.items() <= sample.labels.items():
            rest = [value for label, value in sample.labels.items() if label not in labels]
            values[(sample.name, *rest)] = sample.value
    return values


def test_the_values_are_those_of_the_statistics(stt):
    registry = registry_with(stt)
    values = values_of(registry)
    s = stt.statistics()
    assert values["speechrnt_requests_total", "completed"] == s.requests["completed"] > 0
    assert values["speechrnt_stage_seconds_count", "total"] == s.stages["total"].count
    assert values["speechrnt_stage_seconds_sum", "total"] == s.stages["total"].sum_s
    windows = s.utterances.stages["decode"].count
    assert values["speechrnt_window_seconds_count", "decode"] == windows > 0
    assert values["speechrnt_audio_seconds_total", "out", "request"] == s.audio_out_s > 0
    assert values["speechrnt_audio_seconds_total", "in", "stream"] == 0
    assert values["speechrnt_sheds_total", "requests"] == s.sheds["requests"]
    assert values["speechrnt_batch_room_total",] == s.dispatcher.batch_room > 0
    assert values["speechrnt_threads",] == s.active_threads
    assert values["speechrnt_memory_resident_bytes",] > 10 * MIB
    limits = [
        (float(sample.labels["le"]), sample.value)
        for sample in samples_of(registry)
        if sample.name == "speechrnt_stage_seconds_bucket" and sample.labels["stage"] == "total"
    ]
    assert limits[-1] == (math.inf, s.stages["total"].count)
    assert len(limits) > 10
    for limit, count in limits:
        exact = sum(n for upper, n in s.stages["total"].buckets.items() if upper <= limit)
        assert count == exact


def test_a_bucket_holds_all_times_up_to_its_limit():
    histogram = Histogram()
    limits = dict(_buckets(histogram.snapshot()))
    for limit in limits:
        if limit != "+Inf":
            histogram.add(float(limit))
    for beyond in (1000.0, 5000.0, math.inf):
        histogram.add(beyond)
    counts = [count for _, count in _buckets(histogram.snapshot())]
    assert counts == [*range(1, len(limits)), len(limits) + 2]


def test_several_engines_share_a_registry(stt, other):
    registry = registry_with({"live": stt, "files": other})
    live, files = values_of(registry, engine="live"), values_of(registry, engine="files")
    assert live["speechrnt_requests_total", "completed"] == stt.statistics().requests["completed"]
    assert files["speechrnt_requests_total", "completed"] == 0
    transcribe(other)
    files = values_of(registry, engine="files")
    assert files["speechrnt_requests_total", "completed"] == 1
    assert files["speechrnt_stage_seconds_count", "total"] == 1
    # One alone has the same metrics without the label; what is shared is there once, without it.
    values = values_of(registry_with(stt))
    assert live.keys() == values.keys() - SHARED
    shared = [sample for sample in samples_of(registry) if "engine" not in sample.labels]
    assert {(sample.name, *sample.labels.values()) for sample in shared} == SHARED
    assert len(shared) == len(SHARED)


def test_a_second_collector_of_the_same_metrics_is_refused(stt, other):
    registry = registry_with({"live": stt})
    with pytest.raises(ValueError, match="Duplicated timeseries"):
        registry.register(EngineCollector({"files": other}))
    assert not values_of(registry, engine="files")


def test_another_collector_can_take_its_place(stt, other):
    registry = CollectorRegistry()
    first = EngineCollector(stt)
    registry.register(first)
    registry.unregister(first)
    assert samples_of(registry) == []
    registry.register(EngineCollector({"live": stt, "files": other}))
    assert values_of(registry, engine="files")


def test_single_metrics_can_be_asked_for(stt):
    registry = registry_with({"live": stt}).restricted_registry(["speechrnt_requests_live"])
    assert [sample.name for sample in samples_of(registry)] == ["speechrnt_requests_live"]


def test_an_engine_that_is_dropped_ends_and_is_shown_no_more(stt):
    dropped = PerformanceOptimizedSTT(SMALL, device="cpu")
    registry = registry_with({"live": stt, "dropped": dropped})
    assert values_of(registry, engine="dropped")
    reference = weakref.ref(dropped)
    del dropped
    gc.collect()
    assert reference() is None
    assert not values_of(registry, engine="dropped")
    assert values_of(registry, engine="live")


def test_when_no_engine_is_left_there_are_no_metrics():
    stt = PerformanceOptimizedSTT(SMALL, device="cpu")
    registry = registry_with(stt)
    del stt
    gc.collect()
    assert generate_latest(registry) == b""


def test_a_closed_engine_shows_what_it_has_counted():
    stt = PerformanceOptimizedSTT(SMALL, device="cpu")
    registry = registry_with(stt)
    transcribe(stt)
    stt.close()
    values = values_of(registry)
    assert values["speechrnt_requests_total", "completed"] == 1
    assert values["speechrnt_threads",] == 0


@pytest.mark.parametrize(
    ("engines", "problem"),
    [
        (None, "engines: must be a PerformanceOptimizedSTT, not None"),
        ([], r"engines: must be a PerformanceOptimizedSTT, not \[\]"),
        ({"live": 7}, r"engines\['live'\]: must be a PerformanceOptimizedSTT, not 7"),
        ({"": 7}, "engines: names must be texts that are not empty, not ''"),
        ({1: 7}, "engines: names must be texts that are not empty, not 1"),
    ],
)
def test_what_is_no_engine_is_refused(engines, problem):
    with pytest.raises(OptionError, match=problem):
        EngineCollector(engines)


def test_the_documentation_has_each_metric_and_no_other(stt):
    text = (ROOT / "docs" / "monitoring.md").read_text(encoding="utf-8")
    table = text.partition("| metric | what |")[2].partition("\n\n")[0]
    documented = {re.sub(r"_total$", "", name) for name in re.findall(r"`(speechrnt_\w+)", table)}
    assert documented == {family.name for family in EngineCollector(stt).describe()}


FORKED = """
import os
from prometheus_client import CollectorRegistry, generate_latest
from test_prometheus import SMALL, registry_with, values_of
from speechrnt import PerformanceOptimizedSTT

stt = PerformanceOptimizedSTT(SMALL, device="cpu")
registry = registry_with({"live": stt})
pid = os.fork()
if not pid:
    code = 1
    try:
        code = 0 if generate_latest(registry) == b"" else 2
    finally:
        os._exit(code)
code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
assert code == 0, code
assert values_of(registry, engine="live")
stt.close()
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_a_forked_child_shows_nothing_of_the_parents_engines():
    done = subprocess.run(
        [sys.executable, "-c", FORKED],
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parent)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr
