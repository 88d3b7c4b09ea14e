import json
import math
import pickle
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import FrozenInstanceError, asdict, replace

import numpy as np
import pytest
from engine_helpers import assert_at_rest, held
from waiting import eventually

from speechrnt import (
    AudioError,
    ModelError,
    OptimizationConfig,
    OptionError,
    PerformanceOptimizedSTT,
    Priority,
)
from speechrnt._gpu_types import GpuMemoryHealth
from speechrnt.latency import Histogram
from speechrnt.monitoring import HealthFacts, as_json, judge, report

WELL = HealthFacts(
    memory_use={"memory of the process": 0.5},
    queue_use={"open streams": 0.1},
    oldest_wait_s=0.0,
    longest_call_s=0.0,
    stalled_workers={},
    stalled_streams=0,
    gpu_pool=GpuMemoryHealth(True, 0.5, 0.1, ()),
    closed=False,
    probe=None,
)


@pytest.fixture(scope="module")
def stt():
    with PerformanceOptimizedSTT(OptimizationConfig(max_queued_requests=10)) as stt:
        yield stt


class TestJudge:
    def test_nothing_is_wrong(self):
        health = judge(WELL, 10)
        assert health.ok
        assert health.problems == ()
        assert health.facts is WELL

    @pytest.mark.parametrize(
        ("change", "problem"),
        [
            ({"memory_use": {"audio buffers": 0.9}}, "audio buffers: 90% of the limit is in use."),
            ({"queue_use": {"open streams": 0.8}}, "open streams: 80% of the most allowed."),
            ({"oldest_wait_s": 10.5}, "A job has waited for the model for 10.5 s."),
            ({"longest_call_s": 11}, "A call of the model has run for 11.0 s."),
            ({"stalled_workers": {1: 12.0}}, "Worker 1 has been at one task for 12.0 s."),
            ({"stalled_streams": 2}, "2 streams get no text for their audio."),
            (
                {"gpu_pool": GpuMemoryHealth(False, 0.5, 0.3, ("30% is outside",))},
                "GPU pool: 30% is outside.",
            ),
            ({"closed": True}, "The engine is closed."),
            ({"probe": "it was slow"}, "A decoding failed: it was slow"),
        ],
    )
    def test_each_bound(self, change, problem):
        health = judge(replace(WELL, **change), 10)
        assert not health.ok
        assert health.problems == (problem,)

    @pytest.mark.parametrize(
        "change",
        [
            {"memory_use": {"audio buffers": 0.89}},
            {"queue_use": {"open streams": 0.79}},
            {"oldest_wait_s": 10.0},
            {"gpu_pool": None},
        ],
    )
    def test_just_below_each_bound(self, change):
        assert judge(replace(WELL, **change), 10).ok


class TestHealth:
    def test_a_full_queue_is_noticed_and_recovers(self, stt, monkeypatch):
        noise = np.random.default_rng(0).uniform(-0.1, 0.1, 16_000)
        with held(monkeypatch, "generate"):
            futures = [stt.transcribe_async(noise, "en", vad=False) for _ in range(8)]
            health = stt.health()
            assert not health.ok
            assert "requests under way: 80% of the most allowed." in health.problems
            eventually(lambda: stt.health(latency_bound_s=0.05).facts.longest_call_s > 0.05)
            problems = " ".join(stt.health(latency_bound_s=0.05).problems)
            assert "A call of the model has run for" in problems
            assert not stt.is_system_healthy()
        for future in futures:
            future.result()
        stt.transcribe_async(noise, "en", vad=False).result()
        assert stt.is_system_healthy(), stt.health()

    def test_the_probe_decodes(self, stt, monkeypatch):
        before = stt.statistics().dispatcher.completed
        assert stt.health(probe_s=30).ok
        assert stt.statistics().dispatcher.completed == before + 1

        def broken(*args, **options):
            raise RuntimeError("out of order")

        with monkeypatch.context() as patch:
            patch.setattr(type(stt.model), "generate", broken)
            health = stt.health(probe_s=30)
        [problem] = health.problems
        assert problem.startswith("A decoding failed: ")
        assert "out of order" in problem
        assert stt.health(probe_s=30).ok

    def test_a_probe_that_takes_too_long_fails(self, stt, monkeypatch):
        with held(monkeypatch, "generate"):
            [problem] = stt.health(probe_s=0.05).problems
        assert problem == "A decoding failed: it was not done within 0.05 s"

    def test_a_probe_that_closing_cancels_is_a_problem(self, monkeypatch):
        stt = PerformanceOptimizedSTT(OptimizationConfig(max_queued_requests=10))
        with ThreadPoolExecutor(2) as threads, held(monkeypatch, "generate"):
            # The first one is at the model, and the probe waits behind it, or with it.
            first = stt.transcribe_async(np.zeros(16_000), "en", vad=False)
            probing = threads.submit(stt.health, probe_s=60)
            eventually(lambda: stt.statistics().live == 2)
            closing = threads.submit(stt.close, cancel=True)
            problems = probing.result(30).problems
        closing.result(30)
        assert first.cancelled()
        assert problems == (
            "The engine is closed.",
            "A decoding failed: it was cancelled, as the engine is being closed",
        )

    @pytest.mark.parametrize("asynchronous", [True, False])
    def test_a_callback_cannot_probe(self, asynchronous, monkeypatch):
        config = OptimizationConfig(thread_pool_size=1, enable_async_processing=asynchronous)
        told = Future()

        def probe(_):
            try:
                told.set_result(stt.health(probe_s=1))
            except RuntimeError as error:
                told.set_exception(error)

        with PerformanceOptimizedSTT(config) as stt:
            with held(monkeypatch, "generate"):
                request = stt.transcribe_async(np.zeros(16_000), "en", vad=False)
                request.add_done_callback(probe)
            with pytest.raises(RuntimeError, match="a callback cannot wait for a decoding"):
                told.result(30)

    def test_a_closed_engine_is_not_healthy(self):
        stt = PerformanceOptimizedSTT(OptimizationConfig(enable_async_processing=False))
        assert stt.is_system_healthy()
        assert stt.statistics().active_threads > 0
        stt.close()
        assert stt.statistics().active_threads == 0
        assert stt.health(probe_s=1).problems == ("The engine is closed.",)
        assert stt.get_performance_report()
        with pytest.raises(ModelError, match="closed"):
            stt.transcribe_async(np.zeros(16_000))

    @pytest.mark.parametrize("bad", [0, -1, math.nan, math.inf, "soon", None, True])
    def test_bad_bounds(self, stt, bad):
        with pytest.raises(OptionError, match="latency_bound_s: must be a positive number"):
            stt.health(latency_bound_s=bad)
        if bad is not None:
            with pytest.raises(OptionError, match="probe_s: must be a positive number"):
                stt.health(probe_s=bad)

    @pytest.mark.parametrize("asynchronous", [True, False])
    def test_bad_bounds_of_a_closed_engine(self, asynchronous):
        stt = PerformanceOptimizedSTT(OptimizationConfig(enable_async_processing=asynchronous))
        stt.close()
        with pytest.raises(OptionError, match="probe_s: must be a positive number"):
            stt.health(probe_s=-1)
        assert stt.health(probe_s=1).problems == ("The engine is closed.",)

    def test_a_probe_may_take_as_long_as_can_be_waited_for(self, stt):
        assert stt.health(probe_s=threading.TIMEOUT_MAX).ok
        for bad in (1e300, 10**400, -(10**400)):
            with pytest.raises(OptionError, match=r"probe_s: must be .* at most"):
                stt.health(probe_s=bad)


class TestStatistics:
    def test_counters_equal_a_known_workload(self, samples, manifest, tmp_path):
        clips = manifest[:6]
        broken = tmp_path / "broken.wav"
        broken.write_bytes(b"RIFF")
        with PerformanceOptimizedSTT() as stt:
            futures = [stt.transcribe_async(samples / clip["file"], clip["lang"]) for clip in clips]
            for future in futures:
                future.result()
            with pytest.raises(AudioError):
                stt.transcribe_async(broken).result()
            with pytest.raises(OptionError):
                stt.transcribe_async(samples / clips[0]["file"], "xx")
            s = stt.get_performance_statistics()
        assert s.requests == {
            "accepted": 7, "completed": 6, "failed": 1, "cancelled": 0, "rejected": 0,
        }  # fmt: skip
        assert s.errors == {"AudioFileError": 1}
        assert s.live == 0
        assert s.audio_out_s == pytest.approx(sum(clip["seconds"] for clip in clips), abs=0.1)
        assert s.audio_in_s == pytest.approx(s.audio_out_s)
        assert s.utterances.windows == s.dispatcher.completed == 6
        assert sum(size * n for size, n in s.dispatcher.batch_sizes.items()) == 6
        assert s.mean_batch_size >= 1
        assert {name: times.count for name, times in s.stages.items()} == dict.fromkeys(s.stages, 6)
        mean_ms = 1e3 * s.stages["total"].sum_s / 6
        assert s.average_transcription_latency_ms == pytest.approx(mean_ms)
        assert s.total_memory_usage_mb > 10
        assert s.active_threads == s.scheduler.size + stt.model.whisper.num_workers
        assert sum(s.scheduler.executed.values()) >= 6

    def test_json_and_text_show_the_same(self, stt):
        stt.transcribe_async(np.zeros(16_000), "en", vad=False).result()
        values = json.loads(stt.get_performance_report("json"))
        assert values["requests"]["accepted"] == stt.statistics().requests["accepted"]
        assert set(values["dispatcher"]["queued"]) == {each.name.lower() for each in Priority}
        # What is computed of the counts is there, too.
        assert values["sheds"] == stt.statistics().sheds
        assert values["audio_buffers"]["hit_rate"] == stt.statistics().audio_buffers.hit_rate
        assert 0 < values["batch_fill"] <= 1
        assert values["gpu"] is None
        text = stt.get_performance_report()
        assert f"{values['requests']['accepted']} accepted" in text
        with pytest.raises(OptionError, match="form: must be 'text' or 'json', not 'xml'"):
            stt.get_performance_report("xml")

    def test_long_times_have_no_exponent(self, stt):
        slow = Histogram()
        slow.add(12.5)
        statistics = stt.statistics()
        text = report(replace(statistics, stages={**statistics.stages, "total": slow.snapshot()}))
        assert "p50 14108 ms" in text

    def test_times_of_over_an_hour_say_so(self, stt):
        slow = Histogram()
        for seconds in (1.0, 3700.0):
            slow.add(seconds)
        now = stt.statistics()
        now = replace(now, stages={**now.stages, "total": slow.snapshot()})
        assert "p50 1049 ms, p90 over an hour, p99 over an hour of 2" in report(now)
        values = json.loads(as_json(now))["stages"]["total"]
        assert (values["p99_s"], values["buckets"]["inf"]) == (None, 1)

    def test_a_snapshot_is_the_callers_own(self, stt):
        stt.transcribe_async(np.zeros(16_000), "en", vad=False).result()
        assert_at_rest(stt)
        s, before = stt.statistics(), stt.statistics()
        with pytest.raises(FrozenInstanceError):
            s.live = 7
        # Its mappings are dicts, with which it can be copied, sent and shown; only of itself.
        assert pickle.loads(pickle.dumps(s)) == s
        assert json.dumps(asdict(s)["requests"]) == json.dumps(s.requests)
        mappings = [s.requests, s.errors, s.stages, s.streams.counts, s.streams.errors]
        mappings += [s.utterances.stages, s.dispatcher.queued, s.dispatcher.batch_sizes]
        mappings += [s.scheduler.executed, s.scheduler.queued, s.scheduler.wait]
        for mapping in (*mappings, s.stages["total"].buckets):
            mapping.clear()
        after = stt.statistics()
        for part in ("requests", "errors", "stages", "streams", "utterances", "dispatcher"):
            assert getattr(after, part) == getattr(before, part)
        assert after.scheduler.wait.keys() == before.scheduler.wait.keys() == {*Priority}
