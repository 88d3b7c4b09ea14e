"""Health on engines at work: each bound is crossed and recovers; and what streams count.

What is judged comes about by itself: buffers are taken, callbacks block, queues fill up behind a
model that is held. The GPU's pool is in gpu/test_monitoring.py.
"""

import mmap
import os
import re
import subprocess
import sys
import threading
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from engine_helpers import assert_at_rest, held, trimmed, with_pauses
from streaming_helpers import Log, silence
from waiting import eventually

from speechrnt import (
    ModelError,
    OptimizationConfig,
    Overloaded,
    PerformanceOptimizedSTT,
    inference_memory,
    load_model,
    system,
)
from speechrnt.events import Closed, Error, Final

MIB = 1 << 20
RATE = 16_000


@contextmanager
def engine_with(**changes):
    with PerformanceOptimizedSTT(OptimizationConfig(**changes), device="cpu") as stt:
        assert stt.is_system_healthy(), stt.health().problems
        yield stt
        eventually(stt.is_system_healthy, "health")
        assert_at_rest(stt)


class TestMemory:
    def test_audio_buffers(self):
        one = {"audio_buffer_pool_size": 1, "max_queued_requests": 1, "max_batch_size": 1}
        with engine_with(**one, max_concurrent_utterances=1, model_workers=1) as stt:
            most = stt.statistics().audio_buffers.max_size
            buffers = [stt._buffers.acquire(RATE) for _ in range(most - 1)]
            share = (most - 1) / most
            assert share >= 0.9
            expected = f"audio buffers: {share:.0%} of the limit is in use."
            assert stt.health().problems == (expected,)
            for buffer in buffers:
                buffer.release()
            assert stt.is_system_healthy()

    @pytest.mark.skipif(sys.platform != "linux", reason="control groups are Linux's")
    def test_memory_of_the_process(self, tmp_path, monkeypatch):
        # A group with a limit of its own; what the process has resident is measured.
        (tmp_path / "cgroup").write_text("0::/job\n")
        limit = tmp_path / "job" / "memory.max"
        limit.parent.mkdir()
        limit.write_text("max\n")
        monkeypatch.setattr(system, "_CGROUP_MEMBERSHIPS", tmp_path / "cgroup")
        monkeypatch.setattr(system, "_CGROUP_ROOT", tmp_path)
        inference_memory.trim()  # or maintenance would, in the midst of it
        with engine_with() as stt:
            more = 256 * MIB
            limit.write_text(f"{int((system.resident_memory() + more) / 0.95)}\n")
            assert stt.is_system_healthy(), stt.health().problems
            with mmap.mmap(-1, more) as memory:
                np.frombuffer(memory, np.uint8)[:: mmap.PAGESIZE] = 1
                [problem] = stt.health().problems
                assert problem.startswith("memory of the process: 9")
            assert stt.is_system_healthy()

    @pytest.mark.skipif(
        "pool" not in inference_memory.status(), reason="there is no pool under CTranslate2 here"
    )
    def test_inference_memory(self):
        # The pool has to come before the first model of a process.
        done = subprocess.run(
            [sys.executable, "-W", "error", "-c", OF_INFERENCE],
            env=os.environ | {"PYTHONPATH": str(Path(__file__).parent)},
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stdout + done.stderr


OF_INFERENCE = """
import re
import numpy as np
from speechrnt import inference_memory
from test_monitoring_live import engine_with, eventually

noise = np.zeros((1, 80, 3000), np.float32)
with engine_with() as stt:
    before = inference_memory.statistics()
    encodings = [stt.model.encode(noise) for _ in range(32)]
    in_use = inference_memory.statistics().in_use
    assert in_use > 2 * before.in_use
    inference_memory.configure(limit=in_use)
    [problem] = stt.health().problems
    assert re.fullmatch(r"inference memory: \\d+% of the limit is in use\\.", problem), problem
    del encodings
    eventually(stt.is_system_healthy)
"""


class TestQueues:
    def test_open_streams(self):
        with engine_with(max_concurrent_utterances=5) as stt:
            streams = [stt.stream() for _ in range(4)]
            assert stt.health().problems == ("open streams: 80% of the most allowed.",)
            streams.pop().cancel()
            eventually(stt.is_system_healthy)
            for stream in streams:
                stream.cancel()

    def test_jobs_that_wait_for_the_model(self, clips, monkeypatch):
        small = {"max_queued_requests": 1, "max_concurrent_utterances": 1, "max_batch_size": 4}
        with engine_with(**small, model_workers=1) as stt:
            audio = with_pauses(clips[:9])
            with held(monkeypatch):
                future = stt.transcribe_async(audio, "de")
                stream = stt.stream(language="de", partials=False)
                stream.push(audio)
                text = stream.finalize()
                # Sixteen may wait; fifteen do, and one has begun.
                eventually(lambda: sum(stt.statistics().dispatcher.queued.values()) == 15)
                assert "jobs waiting for the model: 94% of the most allowed." in (
                    stt.health().problems
                )
            assert future.result().text == text.result().text != ""

    def test_tasks_that_wait_for_a_worker(self):
        with engine_with(thread_pool_size=1) as stt:
            release = threading.Event()
            stt._scheduler.submit_nowait(release.wait, 60)
            try:
                eventually(lambda: not sum(stt.statistics().scheduler.queued.values()))
                while stt._scheduler.health().queue_use < 0.8:
                    stt._scheduler.submit_nowait(int)
                assert "tasks waiting for a worker: 80% of the most allowed." in (
                    stt.health().problems
                )
            finally:
                release.set()


class TestTime:
    def test_a_job_that_waits(self, clips, monkeypatch):
        with engine_with(model_workers=1) as stt:
            with held(monkeypatch) as gate:
                futures = [stt.transcribe_async(clips[1], "en") for _ in range(2)]
                assert gate.reached.wait(60)
                eventually(lambda: stt.health().facts.oldest_wait_s > 0.05)
                problems = stt.health(latency_bound_s=0.05).problems
                assert len([each for each in problems if "A job has waited" in each]) == 1
                assert len([each for each in problems if "A call of the model" in each]) == 1
                assert stt.is_system_healthy()  # ten seconds are allowed
            assert {future.result().text for future in futures} == {"Two five one."}
            assert stt.health(latency_bound_s=0.05).ok

    def test_a_callback_that_blocks_stalls_its_worker(self, clips):
        release, blocks = threading.Event(), threading.Event()

        def block(_):
            blocks.set()
            release.wait(60)

        with engine_with(stall_after_s=0.05, thread_pool_size=2) as stt:
            future = stt.transcribe_async(with_pauses(clips[3:6]), "en")
            future.add_done_callback(block)
            try:
                assert blocks.wait(60)
                # Others may be slow where the machine is busy, but not for so long.
                eventually(lambda: max(stt.health().facts.stalled_workers.values(), default=0) > 1)
                assert any(
                    re.fullmatch(r"Worker \d has been at one task for \d\.\d s\.", problem)
                    for problem in stt.health().problems
                )
                # The other one goes on.
                assert stt.transcribe_async(clips[1], "en").result(60).text == "Two five one."
            finally:
                release.set()

    def test_a_stream_of_which_nothing_comes(self, clips, monkeypatch):
        log = Log()
        with engine_with(stall_after_s=0.05, cleanup_interval_s=0.02) as stt:
            with held(monkeypatch) as gate:
                stream = stt.stream(callback=log, language="en")
                stream.push(with_pauses([clips[1]]))
                stream.flush()
                assert gate.reached.wait(60)
                eventually(lambda: stt.health().facts.stalled_streams)
                assert "1 streams get no text for their audio." in stt.health().problems
                assert log.wait(Error).code == "stalled"
            assert log.wait(Final).text == "Two five one."
            eventually(stt.is_system_healthy)  # while it is open
            assert stream.snapshot.state == "open"
            stream.cancel()
            n_told = sum(error.code == "stalled" for error in log.of(Error))
            assert stt.statistics().streams.counts["stalled"] == n_told

    def test_the_probe(self, monkeypatch):
        with engine_with(model_workers=1) as stt:
            with held(monkeypatch):
                [problem] = stt.health(probe_s=0.05).problems
                assert problem == "A decoding failed: it was not done within 0.05 s"
            assert_at_rest(stt)
            assert stt.health(probe_s=30).ok


class TestStreamsCount:
    """What is counted of streams, against workloads whose every count is known."""

    def test_text_and_audio(self, clips):
        with PerformanceOptimizedSTT(device="cpu") as stt:
            audio = [with_pauses(clips[start : start + 3]) for start in (0, 3, 6)]
            logs = [Log() for _ in audio]
            for each, log in zip(audio, logs, strict=True):
                stream = stt.stream(callback=log)
                for start in range(0, len(each), RATE // 10):
                    stream.push(each[start : start + RATE // 10])
                stream.finalize().result(60)
                log.wait(Closed)
            stream = stt.stream()
            stream.push(silence(2))
            stream.cancel()
            eventually(lambda: not stt.statistics().streams.open)
            s = stt.statistics()
        finals = sum(len(log.of(Final)) for log in logs)
        assert finals >= 9
        counts = s.streams.counts
        assert counts["finals"] == finals == s.streams.ttfs.count
        assert (s.streams.started, s.streams.closed, s.streams.open) == (4, 4, 0)
        assert (counts["finalized"], counts["cancelled"], counts["failed"]) == (3, 1, 0)
        words = [word for log in logs for final in log.of(Final) for word in final.text.split()]
        assert counts["final_words"] == len(words)
        samples = sum(len(each) for each in audio)
        assert s.streams.audio_out_s == samples / RATE
        assert s.streams.audio_in_s == (samples + 2 * RATE) / RATE
        assert s.utterances.windows == finals
        assert s.utterances.stages["mel"].count >= finals
        attempts = finals + s.utterances.retried
        assert s.utterances.stages["decode"].count == attempts
        assert (s.requests["accepted"], s.audio_in_s, s.audio_out_s) == (0, 0, 0)
        assert (s.errors, set(s.sheds.values()) - {0}) == ({}, set())

    def test_other_rates_count_as_seconds(self):
        with PerformanceOptimizedSTT(device="cpu") as stt:
            stream = stt.stream(sample_rate=8000, encoding="mulaw")
            stream.push(b"\xff" * 8000)
            stream.finalize().result(60)
            s = stt.statistics().streams
        assert s.audio_in_s == s.audio_out_s == pytest.approx(1, abs=0.01)

    def test_what_was_shed_and_what_failed(self, clips, monkeypatch):
        config = OptimizationConfig(max_concurrent_utterances=1, max_queued_requests=1)
        with PerformanceOptimizedSTT(config, device="cpu") as stt:
            log = Log()
            with held(monkeypatch) as gate:
                future = stt.transcribe_async(clips[1], "en")
                stream = stt.stream(callback=log, language="en", max_buffered_s=1)
                for _ in range(3):
                    with pytest.raises(Overloaded):
                        stt.transcribe_async(clips[1], "en")
                for _ in range(2):
                    with pytest.raises(Overloaded):
                        stt.stream()
                # What it cannot look at, as no more windows of it have room, waits.
                assert gate.reached.wait(60)
                with pytest.raises(Overloaded, match="wait, more than"):
                    fill(stream, with_pauses([clips[1]]))
                stream.cancel()
            future.result(60)
            log.wait(Closed)

            def broken(*args, **options):
                raise RuntimeError("out of order")

            with monkeypatch.context() as patch:
                patch.setattr(type(stt.model), "encode", broken)
                with pytest.raises(ModelError, match="out of order"):
                    stt.transcribe_async(clips[1], "en").result(60)
                # With no silence at its end, it asks the model for nothing but its final.
                stream = stt.stream(language="en", partials=False)
                stream.push(trimmed(clips[1]))
                with pytest.raises(ModelError, match="out of order"):
                    stream.finalize().result(60)
            assert_at_rest(stt)
            s = stt.statistics()
        shed = dict(s.sheds)
        del shed["partials"]  # which are a matter of time
        assert shed == {"requests": 3, "streams": 2, "chunks": 1, "jobs": 0}
        assert s.errors == {"ModelError": 2}
        assert s.streams.errors == {"ModelError": 1}
        assert s.streams.counts["failed"] == 1
        assert s.requests["failed"] == 1
        assert s.dispatcher.failed == 2

    def test_cancels(self, clips, monkeypatch):
        with PerformanceOptimizedSTT(OptimizationConfig(model_workers=1), device="cpu") as stt:
            with held(monkeypatch) as gate:
                first = stt.transcribe_async(clips[1], "en")
                assert gate.reached.wait(60)
                others = [stt.transcribe_async(clips[1], "en") for _ in range(4)]
                eventually(lambda: sum(stt.statistics().dispatcher.queued.values()) == 4)
                for future in others:
                    assert future.cancel()
            assert first.result(60).text == "Two five one."
            assert_at_rest(stt)
            s = stt.statistics()
            assert (s.requests["cancelled"], s.dispatcher.cancelled) == (4, 4)
            assert s.audio_in_s == pytest.approx(5 * s.audio_out_s)
            assert s.audio_out_s == len(clips[1]) / RATE

    def test_second_attempts(self, clips):
        with PerformanceOptimizedSTT(device="cpu") as stt:
            # Nothing is as probable as this.
            future = stt.transcribe_async(clips[1], "en", log_prob_threshold=0.0)
            assert future.result(60).text
            s = stt.statistics()
        assert (s.utterances.windows, s.utterances.retried, s.dispatcher.completed) == (1, 1, 2)
        assert s.utterances.stages["decode"].count == 2

    def test_batches_and_what_would_have_paid(self, clips, monkeypatch):
        config = OptimizationConfig(model_workers=1, max_batch_size=4)
        with PerformanceOptimizedSTT(config, device="cpu") as stt:
            with held(monkeypatch, first=1) as gate:
                futures = [stt.transcribe_async(clips[1], "en")]
                assert gate.reached.wait(60)
                futures += [stt.transcribe_async(clips[1], "en") for _ in range(5)]
                eventually(lambda: sum(stt.statistics().dispatcher.queued.values()) == 5)
            for future in futures:
                future.result(60)
            s = stt.statistics()
        # Once its encoding is done, the first takes three more, and two are left.
        assert s.dispatcher.batch_sizes == {4: 1, 2: 1}
        assert (s.dispatcher.batch_room, s.batch_fill, s.mean_batch_size) == (8, 0.75, 3)

    def test_buffers_are_hits_from_the_second_time_on(self, clips):
        config = OptimizationConfig(enable_async_processing=False, model_workers=1)
        with PerformanceOptimizedSTT(config, device="cpu") as stt:
            stt.transcribe_async(clips[1], "en").result(60)
            first = stt.statistics().audio_buffers
            for _ in range(3):
                stt.transcribe_async(clips[1], "en").result(60)
            s = stt.statistics().audio_buffers
        assert first.misses > 0
        assert s.misses == first.misses
        assert s.hits - first.hits == 3 * (first.hits + first.misses)
        assert s.hit_rate == s.hits / (s.hits + s.misses)


def fill(stream, samples):
    """Push until the stream takes no more, giving it time to look at what it can."""
    while True:
        stream.push(samples)
        eventually(lambda: stream._is_working is False)


def test_a_model_without_a_gpu_has_nothing_there(engine):
    assert load_model(device="cpu").handover is None
    assert engine.statistics().gpu is None
    assert engine.health().facts.gpu_pool is None
