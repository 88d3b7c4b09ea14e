"""All streams of an engine: names, limits, reads without locks, and what an idle stream holds."""

import contextlib
import gc
import threading
import tracemalloc

import pytest
from streaming_helpers import WAIT_S, Log, settle, silence
from waiting import eventually

from speechrnt import ModelError, OptimizationConfig, Overloaded, PerformanceOptimizedSTT
from speechrnt.events import Closed
from speechrnt.stream_registry import StreamRegistry

IDLE_STREAMS = 1000
MOST_IDLE_BYTES = 16 * 1024


class Dispatcher:
    backlog_s = 0.0


class Stub:
    """What the registry knows of a stream."""

    def __init__(self, name):
        self.utterance_id = name
        self.is_stalled = False


@pytest.fixture
def registry():
    return StreamRegistry(3, Dispatcher())


class TestNames:
    def test_those_that_are_made_up_are_free(self, registry):
        registry.start("utterance-1", Stub)
        assert registry.start(None, Stub).utterance_id == "utterance-2"

    def test_a_name_is_taken_while_its_stream_is_made(self, registry):
        def make(name):
            with pytest.raises(ValueError, match="open already"):
                registry.start("a", Stub)
            return Stub(name)

        registry.start("a", make)

    def test_a_stream_that_cannot_be_made_leaves_nothing(self, registry):
        for _ in range(5):
            with pytest.raises(ZeroDivisionError):
                registry.start("a", lambda _: 1 / 0)
        assert registry.statistics().open == 0
        registry.start("a", Stub)

    def test_many_threads_ask_for_one_name(self):
        registry = StreamRegistry(100, Dispatcher())
        barrier, won = threading.Barrier(16), []

        def start():
            barrier.wait()
            with contextlib.suppress(ValueError):
                won.append(registry.start("a", Stub))

        threads = [threading.Thread(target=start) for _ in range(16)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(won) == 1
        assert registry.get("a") is won[0]


class TestLimit:
    def test_no_more_than_allowed(self, registry):
        streams = [registry.start(None, Stub) for _ in range(3)]
        with pytest.raises(Overloaded, match="3 streams are open"):
            registry.start(None, Stub)
        registry.forget(streams[0], lambda: None)
        registry.start(None, Stub)
        statistics = registry.statistics()
        assert (statistics.started, statistics.refused, statistics.closed) == (4, 1, 1)
        assert statistics.open == 3

    def test_the_name_is_free_when_the_user_is_told(self, registry):
        stream = registry.start("a", Stub)
        registry.forget(stream, lambda: registry.start("a", Stub))
        assert registry.get("a") is not stream

    def test_close_waits_until_the_users_are_told(self):
        registry = StreamRegistry(3, Dispatcher())
        stream = registry.start("a", Stub)
        stream.end = lambda: None
        telling, go, order = threading.Event(), threading.Event(), []

        def tell():
            telling.set()
            assert go.wait(WAIT_S)
            order.append("told")

        forgetting = threading.Thread(target=registry.forget, args=[stream, tell])
        forgetting.start()
        assert telling.wait(WAIT_S)
        closing = threading.Thread(target=lambda: (registry.close(False), order.append("closed")))
        closing.start()
        eventually(lambda: registry.closed)
        go.set()
        closing.join()
        forgetting.join()
        assert order == ["told", "closed"]
        with pytest.raises(ModelError, match="closed"):
            registry.start("b", Stub)

    def test_close_waits_for_streams_that_are_being_made(self):
        registry = StreamRegistry(3, Dispatcher())
        making, go = threading.Event(), threading.Event()

        def make(name):
            making.set()
            assert go.wait(WAIT_S)
            stream = Stub(name)
            stream.end = lambda: registry.forget(stream, lambda: None)
            return stream

        starting = threading.Thread(target=registry.start, args=["a", make])
        starting.start()
        assert making.wait(WAIT_S)
        closing = threading.Thread(target=registry.close, args=[False])
        closing.start()
        eventually(lambda: registry.closed)
        go.set()
        for thread in (starting, closing):
            thread.join(WAIT_S)
            assert not thread.is_alive()
        assert registry.statistics().open == 0


class TestReads:
    def test_they_take_no_lock(self):
        # A reader that took one would hang.
        with PerformanceOptimizedSTT() as stt:
            stream = stt.stream("a")
            registry = stt._streams
            locks = [
                *(registry._changed, registry.counters._lock),
                *(registry.counters.ttfs._lock, registry.counters.partial_lag._lock),
                *(stream._lock, stream._push_lock, stream._utterance._lock, stream._events._lock),
            ]
            read = []

            def reader():
                read.append(registry.get("a").snapshot)
                read.append(registry.statistics())
                read.append(registry.stalled)
                read.append(registry.use)

            for lock in locks:
                lock.acquire()
            thread = threading.Thread(target=reader, daemon=True)
            thread.start()
            thread.join(WAIT_S)
            for lock in locks:
                lock.release()
            assert len(read) == 4

    def test_counts_are_of_one_moment_and_grow(self):
        registry = StreamRegistry(3, Dispatcher())
        counters, done = registry.counters, threading.Event()

        def write():
            while not done.is_set():
                counters.add("finals")
                counters.ttfs.add(0.5)

        writers = [threading.Thread(target=write) for _ in range(3)]
        for writer in writers:
            writer.start()
        last = 0
        for _ in range(2000):
            statistics = registry.statistics()
            assert statistics.counts["finals"] >= last
            last = statistics.counts["finals"]
            assert statistics.ttfs.count == sum(statistics.ttfs.buckets.values())
        done.set()
        for writer in writers:
            writer.join()
        statistics = registry.statistics()
        assert statistics.ttfs.count == statistics.counts["finals"]


class TestIdleStreams:
    """A thousand open streams that have heard silence, and hear nothing more."""

    @pytest.fixture
    def stt(self):
        config = OptimizationConfig(
            max_concurrent_utterances=IDLE_STREAMS + 1, cleanup_interval_s=0.05
        )
        with PerformanceOptimizedSTT(config) as stt:
            yield stt

    def open_idle(self, stt, count, log=None):
        streams = [stt.stream(callback=log, idle_timeout_s=None) for _ in range(count)]
        for stream in streams:
            for _ in range(6):
                stream.push(silence(0.1))
        for stream in streams:
            settle(stream)
        return streams

    def test_each_takes_at_most_16_kib_beyond_its_audio(self, stt, record_property):
        self.open_idle(stt, 1)[0].cancel()  # what is made once
        tracemalloc.start()
        try:
            gc.collect()
            before, _ = tracemalloc.get_traced_memory()
            streams = self.open_idle(stt, IDLE_STREAMS)
            # Maintenance has them give back what they do not need.
            eventually(lambda: all(stream._is_compact for stream in streams))
            for stream in streams:
                settle(stream)
            gc.collect()
            after, _ = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        audio = sum(stream._samples.nbytes for stream in streams)
        per_stream = (after - before - audio) / IDLE_STREAMS
        record_property("bytes_per_idle_stream", per_stream)
        assert per_stream <= MOST_IDLE_BYTES
        # Of the audio, no more than what may yet belong to a window.
        for stream in streams:
            assert stream._samples.nbytes <= 4 * (9 + 1) * 512
        assert stt.statistics().audio_buffers.in_use == 0
        assert stt.statistics().dispatcher.submitted == 0
        for stream in streams:
            stream.cancel()
        eventually(lambda: stt.statistics().streams.open == 0)

    def test_they_are_finalized_when_the_engine_is_closed(self):
        log = Log()
        with PerformanceOptimizedSTT(OptimizationConfig(max_concurrent_utterances=50)) as stt:
            self.open_idle(stt, 50, log)
        assert [event.reason for event in log.of(Closed)] == ["finalized"] * 50
