"""Streams: what their user calls, in every state."""

import asyncio
import gc
import math
import os
import threading
import time
import weakref
from concurrent.futures import CancelledError, wait

import engine_helpers
import numpy as np
import pytest
from streaming_helpers import (
    WAIT_S,
    Log,
    one_shot,
    paused,
    said,
    settle,
    silence,
)
from waiting import eventually

from speechrnt import (
    InvalidAudioError,
    ModelError,
    OptimizationConfig,
    OptionError,
    Overloaded,
    PerformanceOptimizedSTT,
    UtteranceClosed,
    UtteranceError,
)
from speechrnt.events import (
    Closed,
    Final,
)


class TestCancel:
    def test_at_every_state(self, stt, recordings):
        samples = recordings.joined("en", 2, 0.6)
        expected = one_shot(stt, samples, "en").text
        cancelled = finished = 0
        for step in range(24):
            stream = stt.stream(language="en", partial_interval_s=0.05)
            future = None
            if step >= 2:
                stream.push(samples[: step * 3000] if step < 12 else samples)
            if step >= 14:
                future = stream.finalize()
            time.sleep(step % 6 * 0.02)
            stream.cancel()
            eventually(lambda stream=stream: stream.snapshot.state == "closed")
            if future is not None:
                try:
                    assert future.result(WAIT_S).text == expected
                    finished += 1
                except CancelledError:
                    cancelled += 1
        assert finished + cancelled == 10
        eventually(lambda: stt.statistics().streams.open == 0)
        eventually(lambda: stt.statistics().audio_buffers.in_use == 0)

    def test_the_future_cancels_the_stream(self, stt, recordings, log, monkeypatch):
        stream = stt.stream(callback=log, language="en")
        with engine_helpers.held(monkeypatch):
            stream.push(recordings.joined("en", 1, 0.0))
            future = stream.finalize()
            assert future.cancel()
        assert log.wait(Closed).reason == "cancelled"

    def test_whoever_waits_for_the_future_is_told(self, stt, recordings, monkeypatch):
        stream = stt.stream(language="en")
        with engine_helpers.held(monkeypatch):
            stream.push(recordings.joined("en", 1, 0.0))
            future = stream.finalize()
            threading.Timer(0.05, stream.cancel).start()
            done, _ = wait([future], WAIT_S)
        assert done == {future}
        assert future.cancelled()


class TestUpdate:
    def test_what_comes_after_it_is_transcribed_otherwise(self, stt, recordings, log):
        english, german = recordings.joined("en", 1, 0.0), recordings.joined("de", 1, 0.0)
        stream = stt.stream(callback=log, language="en")
        stream.push(english)
        stream.flush()
        stream.update(language="de", beam_size=1)
        stream.push(german)
        stream.finalize().result(WAIT_S)
        log.wait(Closed)
        first, last = log.of(Final)
        assert (first.language, last.language) == ("en", "de")
        assert first.text == one_shot(stt, english, "en").text
        assert last.text == one_shot(stt, german, "de", beam_size=1).text

    def test_a_detected_language_outlives_other_options(self, stt, recordings, log):
        for pause in (0.0, 0.3):
            stream = stt.stream(callback=log)
            stream.push(recordings.joined("de", 2, 0.1))
            stream.flush()
            time.sleep(pause)
            stream.update(beam_size=2)
            stream.push(recordings.joined("en", 1, 0.0))
            stream.finalize().result(WAIT_S)
        eventually(lambda: len(log.of(Closed)) == 2)
        assert [final.language for final in log.of(Final)] == ["de"] * 4

    def test_what_cannot_be_changed(self, stt):
        stream = stt.stream(language="en")
        for options in ({"vad": False}, {"endpoint_s": 1.0}, {"vad_threshold": 0.3}):
            with pytest.raises(OptionError, match="cannot be changed"):
                stream.update(**options)
        with pytest.raises(OptionError, match="no such option"):
            stream.update(partials=False)
        with pytest.raises(OptionError, match="language"):
            stream.update(language="xx")
        stream.cancel()
        with pytest.raises(UtteranceClosed):
            stream.update(beam_size=1)


class TestFacade:
    def test_the_calls_by_name(self, stt, recordings, log):
        samples = recordings.joined("en", 1, 0.2)
        stt.start_streaming_transcription("call-7", log, "en")
        for piece in np.array_split(samples, 7):
            pressure = stt.add_audio_chunk("call-7", piece)
            assert pressure.buffered_s >= 0
            assert pressure.lag_s >= 0
        result = stt.finalize_streaming_transcription("call-7").result(WAIT_S)
        assert said(result) == said(one_shot(stt, samples, "en"))
        with pytest.raises(UtteranceError, match="call-7"):
            stt.add_audio_chunk("call-7", samples)

    def test_duplicate_and_unknown_ids(self, stt):
        stream = stt.stream("one")
        with pytest.raises(UtteranceError, match="'one' is open already"):
            stt.stream("one")
        with pytest.raises(UtteranceError, match="'two' is not open"):
            stt.add_audio_chunk("two", b"")
        with pytest.raises(UtteranceError, match="'two' is not open"):
            stt.finalize_streaming_transcription("two")
        for name in ("", 7, b"one"):
            with pytest.raises(UtteranceError, match="must be a text"):
                stt.stream(name)
        stream.cancel()

    def test_push_and_finalize_after_finalize(self, stt):
        stream = stt.stream()
        future = stream.finalize()
        for call in (lambda: stream.push(b""), stream.finalize, stream.flush):
            with pytest.raises(UtteranceClosed, match="takes no more audio"):
                call()
        assert future.result(WAIT_S).text == ""

    def test_an_empty_utterance(self, stt, log):
        stream = stt.stream(callback=log)
        stream.push(b"")
        stream.push(np.empty(0, np.float32))
        result = stream.finalize().result(WAIT_S)
        assert (result.text, result.segments, result.duration) == ("", (), 0.0)
        log.wait(Closed)
        assert log.names == ["Closed"]

    @pytest.mark.parametrize(
        ("options", "error", "message"),
        [
            ({"sample_rate": 7}, InvalidAudioError, "sample rate"),
            ({"encoding": "opus"}, InvalidAudioError, "encoding"),
            ({"callback": 7}, OptionError, "callable"),
            ({"language": "xx"}, OptionError, "language"),
            ({"partials": 1}, OptionError, "partials"),
            ({"partial_interval_s": math.nan}, OptionError, "partial_interval_s"),
            ({"idle_timeout_s": 0}, OptionError, "idle_timeout_s"),
            ({"max_duration_s": None}, OptionError, "max_duration_s"),
            ({"max_buffered_s": "1"}, OptionError, "max_buffered_s"),
            ({"priority": 17}, OptionError, "priority"),
            ({"colour": 1}, OptionError, "no such option"),
        ],
    )
    def test_options_that_are_none(self, stt, options, error, message):
        before = stt.statistics().streams
        with pytest.raises(error, match=message):
            stt.stream("bad", **options)
        assert stt.statistics().streams.open <= before.open
        stt.stream("bad").finalize().result(WAIT_S)  # the name is free

    def test_a_callback_that_is_none(self, stt):
        with pytest.raises(OptionError, match="callable"):
            stt.start_streaming_transcription("x", None)

    def test_a_closed_engine(self, recordings):
        samples = recordings.joined("en", 1, 0.0)
        with PerformanceOptimizedSTT(OptimizationConfig(max_concurrent_utterances=2)) as stt:
            log = Log()
            stream = stt.stream("a", callback=log, language="en")
            stream.push(samples)
            stt.stream("b")
            with pytest.raises(Overloaded, match="2 streams are open"):
                stt.stream("c")
        # Closing finalizes what is open.
        assert log.of(Final)[-1].text
        assert log.events[-1].reason == "finalized"
        for call in (
            stt.stream,
            lambda: stt.start_streaming_transcription("d", log),
        ):
            with pytest.raises(ModelError, match="closed"):
                call()
        with pytest.raises(UtteranceError):
            stt.add_audio_chunk("a", samples)
        assert stt.statistics().audio_buffers.in_use == 0

    def test_closing_with_cancel(self, recordings):
        stt = PerformanceOptimizedSTT()
        log = Log()
        stream = stt.stream(callback=log, language="en")
        stream.push(recordings.joined("en", 4, 0.6))
        stt.close(cancel=True)
        assert log.events[-1].reason == "cancelled"

    def test_a_callback_cannot_close_the_engine(self, stt):
        errors, done = [], threading.Event()

        def callback(event):
            try:
                stt.close()
            except RuntimeError as error:
                errors.append(error)
            done.set()

        stt.stream(callback=callback).cancel()
        assert done.wait(WAIT_S)
        assert "callback" in str(errors[0])

    @pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
    @pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
    def test_a_forked_child_is_told_so(self, stt):
        stream = stt.stream()
        child = os.fork()
        if not child:
            status = 0
            for call in (lambda: stream.push(b""), stream.flush, stream.finalize, stt.stream):
                try:
                    call()
                except ModelError:
                    status += 1
            os._exit(status)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 4
        stream.cancel()


class TestApush:
    def test_it_waits_for_room(self, stt, recordings):
        samples = recordings.joined("en", 10, 0.6)

        async def main():
            stream = stt.stream(language="en", max_buffered_s=1.0)
            for piece in np.array_split(samples, 200):
                await stream.apush(piece)
            return await asyncio.wrap_future(stream.finalize())

        result = asyncio.run(asyncio.wait_for(main(), WAIT_S))
        assert said(result) == said(one_shot(stt, samples, "en"))

    def test_it_ends_with_the_stream(self, stt):
        async def main():
            stream = stt.stream(max_buffered_s=1.0)
            with paused(stream):
                stream.push(silence(2.0))
                waiting = asyncio.create_task(stream.apush(silence(1.0)))
                await asyncio.sleep(0.01)
                stream.cancel()
            with pytest.raises(UtteranceClosed):
                await waiting

        asyncio.run(asyncio.wait_for(main(), WAIT_S))


def test_a_closed_stream_is_freed(stt, recordings):
    stream = stt.stream(language="en")
    stream.push(recordings.joined("en", 1, 0.0))
    stream.finalize().result(WAIT_S)
    settle(stream)
    gone = weakref.ref(stream)
    del stream

    def is_gone():
        gc.collect()
        return gone() is None

    eventually(is_gone)
