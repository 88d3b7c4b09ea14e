"""Streams: text equal to that of the recording, and events that can be relied on."""

import asyncio
import gc
import math
import os
import threading
import time
import weakref
from concurrent.futures import CancelledError, wait
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from streaming_helpers import (
    RATE,
    WAIT_S,
    Log,
    Recordings,
    one_shot,
    push_slowly,
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
    Priority,
    UtteranceClosed,
    UtteranceError,
)
from speechrnt.events import (
    Closed,
    Committed,
    Error,
    Final,
    Overload,
    Partial,
    SpeechEnded,
    SpeechStarted,
)

LANGUAGES = ("en", "de", "es", "fr")


@pytest.fixture(scope="module")
def stt():
    config = OptimizationConfig(max_concurrent_utterances=128, cleanup_interval_s=0.05)
    with PerformanceOptimizedSTT(config) as stt:
        yield stt
        eventually(lambda: stt.statistics().streams.open == 0)
        assert stt.statistics().audio_buffers.in_use == 0


@pytest.fixture(scope="module")
def recordings(samples, manifest):
    return Recordings(samples, manifest)


@pytest.fixture
def log():
    return Log()


@pytest.fixture
def counted(stt):
    """A function that tells by how much the counts of streams have changed."""
    before = stt.statistics().streams.counts
    return lambda name: stt.statistics().streams.counts[name] - before[name]


def streamed(stt, pieces, language=None, **options):
    """Push pieces, ``None`` being a flush, and return what finalize gives."""
    stream = stt.stream(language=language, **options)
    for piece in pieces:
        if piece is None:
            stream.flush()
        else:
            while True:
                try:
                    stream.push(piece)
                    break
                except Overloaded:
                    time.sleep(0.01)
    return stream.finalize().result(WAIT_S)


def cut(samples, places):
    places = [0, *sorted(places), len(samples)]
    return [samples[a:b] for a, b in pairwise(places)]


class Blocked:
    """Keeps the model's workers from encoding for a while."""

    def __init__(self, stt):
        self._kind = type(stt.model)
        self._encode = self._kind.encode
        self._go = threading.Event()

    def __enter__(self):
        def encode(model, features):
            assert self._go.wait(WAIT_S)
            return self._encode(model, features)

        self._kind.encode = encode

    def __exit__(self, *_):
        self._go.set()
        self._kind.encode = self._encode


@contextmanager
def held(stream):
    """Keep a stream from looking at its audio for a while."""
    with stream._lock:
        assert not stream._is_working
        stream._is_working = True
    try:
        yield
    finally:
        with stream._lock:
            stream._is_working = False
        stream._wake()


def watch(stream, *later_s):
    """Have the watchdog look at a stream at some times, alone."""
    stream._options = replace(stream._options, idle_timeout_s=None)
    # The engine's own looks come at other times.
    stream.check, check = lambda *_: None, type(stream).check
    for seconds in later_s:
        check(stream, 1e6 + seconds, 30.0)


class TestExactness:
    """A stream's text is the recording's, however it was cut and whenever partials ran."""

    @pytest.mark.parametrize("language", LANGUAGES)
    @settings(
        max_examples=6,
        deadline=None,
        derandomize=True,
        suppress_health_check=[HealthCheck.function_scoped_fixture],
    )
    @given(data=st.data())
    def test_random_chunks(self, stt, recordings, language, data):
        samples = recordings.joined(language, 2, 0.7)
        places = data.draw(st.lists(st.integers(0, len(samples)), max_size=60), "cuts")
        interval = data.draw(st.sampled_from([0.05, 0.5, 60.0]), "partial interval")
        detect = data.draw(st.booleans(), "detect the language")
        known = None if detect else language
        result = streamed(stt, cut(samples, places), known, partial_interval_s=interval)
        assert said(result) == said(one_shot(stt, samples, known))

    @settings(
        max_examples=10,
        deadline=None,
        derandomize=True,
        suppress_health_check=[HealthCheck.function_scoped_fixture],
    )
    @given(data=st.data())
    def test_flushes_at_random_samples(self, stt, recordings, data):
        samples = recordings.joined("en", 2, 0.7, skip=data.draw(st.integers(0, 5)))
        flushes = sorted(data.draw(st.lists(st.integers(0, len(samples)), max_size=5), "flushes"))
        vad = data.draw(st.booleans(), "vad")
        pieces = []
        for piece in cut(samples, flushes):
            half = len(piece) // 3
            pieces += [piece[:half], piece[half:], None]
        result = streamed(stt, pieces[:-1], "en", vad=vad)
        assert said(result) == said(one_shot(stt, samples, "en", flushes, vad=vad))

    def test_one_sample_at_a_time(self, stt, recordings):
        samples = recordings.joined("en", 1, 0.0)[: 2 * RATE]
        result = streamed(stt, np.split(samples, len(samples)), "en")
        assert said(result) == said(one_shot(stt, samples, "en"))

    def test_a_minute_without_a_pause(self, stt, recordings):
        samples = recordings.joined("en", 60, 0.0)[: 60 * RATE]
        expected = one_shot(stt, samples, "en")
        assert len(expected.segments) >= 3
        for segment, following in zip(expected.segments, expected.segments[1:], strict=False):
            assert following.start - segment.end < 0.5  # cut for its length
        result = streamed(stt, cut(samples, range(0, len(samples), 1111)), "en")
        assert said(result) == said(expected)

    def test_three_minutes_with_pauses(self, stt, recordings):
        pieces = [
            recordings.joined(LANGUAGES[index % 4], 1, 0.4 + index % 5 * 0.3, index // 4)
            for index in range(80)
        ]
        samples = np.concatenate(pieces)
        assert len(samples) >= 180 * RATE
        expected = one_shot(stt, samples)
        assert len(expected.segments) > 40
        result = streamed(stt, cut(samples, range(0, len(samples), 8000)))
        assert said(result) == said(expected)

    @pytest.mark.parametrize("at", [0.31, 0.5, 0.77])
    def test_the_end_inside_a_word(self, stt, recordings, at):
        samples = recordings.joined("en", 1, 0.0, skip=9)
        samples = samples[: round(at * len(samples))]
        result = streamed(stt, cut(samples, range(0, len(samples), 320)), "en")
        assert said(result) == said(one_shot(stt, samples, "en"))

    def test_telephone_audio(self, stt, recordings):
        samples = recordings.joined("de", 2, 0.6)
        data = (samples[::2] * 2**15).astype("<i2").tobytes()
        expected = one_shot(stt, stt_audio(data, 8000), "de")
        pieces = [data[at : at + 333] for at in range(0, len(data), 333)]
        result = streamed(stt, pieces, "de", sample_rate=8000)
        assert said(result) == said(expected)

    @pytest.mark.parametrize("options", [{"vad": False}, {"beam_size": 1}, {"endpoint_s": 0.2}])
    def test_options(self, stt, recordings, options):
        samples = recordings.joined("es", 3, 0.35)
        result = streamed(stt, cut(samples, range(0, len(samples), 777)), "es", **options)
        assert said(result) == said(one_shot(stt, samples, "es", **options))

    def test_audio_that_comes_in_real_time(self, stt, recordings):
        samples = recordings.joined("fr", 2, 0.6)
        stream = stt.stream()
        for piece in cut(samples, range(0, len(samples), 3200)):
            stream.push(piece)
            time.sleep(len(piece) / RATE)
        assert said(stream.finalize().result(WAIT_S)) == said(one_shot(stt, samples))

    def test_without_threads_of_its_own(self, recordings):
        samples = recordings.joined("en", 3, 0.6)
        config = OptimizationConfig(enable_async_processing=False)
        with PerformanceOptimizedSTT(config) as stt:
            # More than a nested call per task could bear.
            long = np.concatenate([np.zeros(1800 * RATE, np.float32), samples])
            result = streamed(stt, [long], "en", max_buffered_s=600.0)
            assert result.text == one_shot(stt, samples, "en").text


def stt_audio(data, rate):
    from speechrnt import Audio

    return Audio.from_pcm(data, "s16", rate)


_OTHERS = (("de", 0), ("de", 3), ("es", 0), ("es", 3), ("fr", 0))


@pytest.fixture(scope="module")
def followed(stt, recordings):
    """For each utterance: words committed before finalize, its log, and its text."""
    followed = []
    for language, skip in [*(("en", skip) for skip in range(0, 16, 4)), *_OTHERS]:
        log = Log()
        samples = recordings.spoken(language, 4, skip)
        assert len(samples) >= 5 * RATE
        stream = stt.stream(callback=log, language=language)
        push_slowly(stream, samples)
        stable = f"{stream.snapshot.text} {stream.snapshot.stable_text}".split()
        text = stream.finalize().result(WAIT_S).text
        log.wait(Closed)
        followed.append((stable, log, text))
    return followed


class TestAgreement:
    """On utterances of 5 s and more, at a pace at which partials have their time."""

    def test_four_fifths_of_the_words_are_committed_before_the_end(self, followed):
        committed = sum(len(stable) for stable, _, _ in followed)
        words = sum(len(text.split()) for _, _, text in followed)
        assert words > 60
        assert committed >= 0.8 * words, f"{committed} of {words} words"

    def test_what_is_committed_contradicts_one_final_word_in_fifty_at_most(self, followed):
        n_committed = n_contradicted = 0
        for _, log, _ in followed:
            for committed, final in log.windows():
                words = committed.split()
                n_committed += len(words)
                pairs = list(zip(words, final.text.split(), strict=False))
                agreed = next((i for i, (a, b) in enumerate(pairs) if a != b), len(pairs))
                n_contradicted += len(words) - agreed
                assert final.revised == (agreed < len(words))
        assert n_committed > 40
        assert n_contradicted <= 0.02 * n_committed, f"{n_contradicted} of {n_committed} words"

    def test_committed_text_never_changes(self, followed):
        for _, log, _ in followed:
            committed = ""
            for event in log.events:
                if isinstance(event, Committed):
                    committed += event.delta
                elif isinstance(event, Partial):
                    assert event.stable_text == committed
                elif isinstance(event, Final):
                    committed = ""

    def test_contradictions_are_counted(self, stt, followed):
        counts = stt.statistics().streams.counts
        assert 0 < counts["committed_at_final_words"] <= counts["committed_words"]
        revised = sum(final.revised for _, log, _ in followed for final in log.of(Final))
        assert counts["revised_finals"] >= revised
        assert counts["contradicted_words"] >= counts["revised_finals"]


class TestEvents:
    def test_their_order(self, stt, recordings, log):
        stream = stt.stream("order", callback=log, language="en")
        push_slowly(stream, recordings.joined("en", 2, 1.0))
        stream.finalize().result(WAIT_S)
        log.wait(Closed)
        assert log.names[0] == "SpeechStarted"
        assert log.names[-1] == "Closed"
        assert log.names.count("SpeechStarted") == log.names.count("SpeechEnded") == 2
        assert log.names.count("Final") == 2
        assert "Partial" in log.names
        assert all(event.utterance_id == "order" for event in log.events)
        times = [event.audio_s for event in log.of(Partial | Committed)]
        assert times == sorted(times)

    def test_those_of_a_window_come_before_those_of_the_next(self, stt, recordings, log):
        # At once, so that the next window is open long before the last one is final.
        stream = stt.stream(callback=log, language="en", partial_interval_s=0.05)
        samples = recordings.joined("en", 6, 0.6)
        for piece in cut(samples, range(0, len(samples), 4000)):
            stream.push(piece)
        stream.finalize().result(WAIT_S)
        log.wait(Closed)
        start = 0.0
        for event in log.events:
            if isinstance(event, Final):
                start = event.audio_s
            elif isinstance(event, Partial | Committed):
                assert event.audio_s > start

    def test_their_times_are_those_of_the_audio(self, stt, recordings, log):
        speech = recordings.joined("en", 1, 0.0)
        stream = stt.stream(callback=log, language="en")
        push_slowly(stream, np.concatenate([silence(2.0), speech, silence(1.5)]))
        started, ended, final = log.wait(SpeechStarted), log.wait(SpeechEnded), log.wait(Final)
        assert started.start_s == pytest.approx(2.0, abs=0.1)
        assert ended.end_s == pytest.approx(2.0 + len(speech) / RATE, abs=0.25)
        assert final.segment.start == started.start_s
        assert final.segment.end == ended.end_s
        assert not final.from_flush
        stream.cancel()

    def test_a_final_comes_fast_as_it_was_begun_at_the_first_silence(self, stt, recordings, log):
        stream = stt.stream(callback=log, language="en", partials=False)
        before = stt.statistics().dispatcher.submitted
        push_slowly(stream, np.concatenate([recordings.joined("en", 1, 0.0), silence(1.0)]))
        final = log.wait(Final)
        assert final.text
        assert stt.statistics().dispatcher.submitted == before + 1
        assert final.ttfs_s is not None
        stream.cancel()

    def test_speech_that_goes_on_costs_one_guess_and_no_text(self, stt, recordings, log):
        samples = recordings.joined("en", 2, 0.4)
        stream = stt.stream(callback=log, language="en", partials=False)
        push_slowly(stream, samples)
        assert log.of(Final) == []
        assert stream.finalize().result(WAIT_S).text == one_shot(stt, samples, "en").text

    def test_flush_answers_always(self, stt, recordings, log):
        stream = stt.stream(callback=log, language="en")
        stream.flush()
        empty = log.wait(Final)
        assert (empty.text, empty.segment, empty.from_flush) == ("", None, True)
        stream.push(recordings.joined("en", 1, 0.0))
        stream.flush()
        spoken = log.wait(Final, 2)
        assert spoken.text
        assert spoken.from_flush
        stream.flush()
        assert log.wait(Final, 3).text == ""
        assert stream.snapshot.state == "open"
        stream.cancel()

    @pytest.mark.parametrize("n_samples", [1, 100, 159, 160])
    def test_flush_answers_a_window_of_less_than_a_frame(self, stt, log, n_samples):
        stream = stt.stream(callback=log, language="en", vad=False)
        stream.push(np.full(n_samples, 0.1, np.float32))
        stream.flush()
        assert log.wait(Final).from_flush
        assert stream.finalize().result(WAIT_S).duration == n_samples / RATE

    def test_a_coroutine_reads_them(self, stt, recordings):
        async def main():
            stream = stt.stream(language="en")
            kinds = []

            async def read():
                async for event in stream:
                    kinds.append(type(event))

            reader = asyncio.create_task(read())
            async with stream:
                for piece in np.array_split(recordings.joined("en", 1, 0.8), 10):
                    await stream.apush(piece)
            await asyncio.wait_for(reader, WAIT_S)
            return kinds

        kinds = asyncio.run(main())
        assert kinds[-1] is Closed
        assert Final in kinds

    def test_an_exception_in_the_block_cancels(self, stt):
        async def main():
            stream = stt.stream()
            with pytest.raises(KeyError):
                async with stream:
                    raise KeyError
            return [event async for event in stream]

        [closed] = asyncio.run(main())
        assert closed.reason == "cancelled"

    def test_those_of_a_callback_are_not_read(self, stt, log):
        async def main():
            await anext(aiter(stream))

        stream = stt.stream(callback=log)
        with pytest.raises(OptionError, match="callback"):
            asyncio.run(main())
        stream.cancel()

    def test_the_name_is_free_when_closed_is_told(self, stt):
        names, done = [], threading.Event()

        def callback(event):
            if isinstance(event, Closed):
                again = stt.stream("the same name")
                names.append(again.utterance_id)
                again.cancel()
                done.set()

        stt.stream("the same name", callback=callback).finalize()
        assert done.wait(WAIT_S)
        assert names == ["the same name"]


class TestRules:
    """One test for each corner case that streaming servers are known to get wrong."""

    def test_01_no_audio_is_lost_at_the_end(self, stt, recordings):
        # No partial has seen the last two seconds.
        samples = recordings.joined("en", 3, 0.2)
        stream = stt.stream(language="en", partial_interval_s=60.0)
        push_slowly(stream, samples[: -2 * RATE])
        stream.push(samples[-2 * RATE :])
        result = stream.finalize().result(WAIT_S)
        assert result.text == one_shot(stt, samples, "en").text

    def test_02_the_next_speech_does_not_disturb_a_window_that_is_not_final(self, stt, recordings):
        samples = recordings.joined("en", 8, 0.55)
        result = streamed(stt, [samples], "en")
        assert said(result) == said(one_shot(stt, samples, "en"))

    @pytest.mark.parametrize("noise", [0.0, 0.001, 0.02])
    def test_03_what_is_no_speech_never_reaches_the_model(self, stt, log, noise):
        rng = np.random.default_rng(0)
        samples = rng.normal(0, noise, 20 * RATE).astype(np.float32)
        before = stt.statistics().dispatcher.submitted
        stream = stt.stream(callback=log)
        stream.push(samples)
        assert stream.finalize().result(WAIT_S).text == ""
        log.wait(Closed)
        assert log.names == ["Closed"]
        assert stt.statistics().dispatcher.submitted == before

    def test_04_a_window_that_is_cut_for_its_length_leaves_no_sliver(self, stt, recordings):
        samples = recordings.joined("en", 60, 0.0)
        longest = stt._checked_plan("en", {}).segmentation.max_window_s
        end = round((longest + 0.3) * RATE)
        for stop in (end, end + 4000):
            result = streamed(stt, [samples[:stop]], "en")
            first, last = result.segments
            assert first.end - first.start <= longest
            assert last.end - last.start >= 0.99

    def test_05_a_transcript_is_as_long_as_its_audio_lets_it_be(self, stt, recordings):
        # Against the wrong language the model loops or stops; it may not go on for ever.
        samples = recordings.joined("fr", 2, 0.1)
        plan = stt._checked_plan("en", {})
        result = streamed(stt, [samples], "en")
        frames = len(samples) // 160
        most = plan.most_tokens(frames, plan.context(frames))
        assert all(len(segment.tokens) <= most for segment in result.segments)
        assert said(result) == said(one_shot(stt, samples, "en"))

    def test_06_an_open_window_has_a_longest_length(self, stt, recordings):
        stream = stt.stream(language="en", partials=False)
        longest = stt._checked_plan("en", {}).segmentation.max_window_s
        for piece in np.array_split(recordings.joined("en", 40, 0.0), 100):
            stream.push(piece)
            settle(stream)
            assert stream._samples.end - stream._samples.start <= (longest + 1) * RATE
        stream.cancel()

    def test_07_no_word_comes_twice_at_a_seam(self, stt, recordings, log):
        samples = recordings.joined("en", 60, 0.0)[: 45 * RATE]
        stream = stt.stream(callback=log, language="en")
        for piece in cut(samples, range(0, len(samples), RATE)):
            stream.push(piece)
        result = stream.finalize().result(WAIT_S)
        log.wait(Closed)
        finals = " ".join(final.text for final in log.of(Final) if final.text)
        assert finals == result.text == one_shot(stt, samples, "en").text
        for segment, following in zip(result.segments, result.segments[1:], strict=False):
            assert following.start >= segment.end

    def test_08_times_count_samples_across_silences(self, stt, recordings, log):
        speech = recordings.joined("en", 1, 0.0)
        stream = stt.stream(callback=log, language="en")
        for _ in range(4):
            stream.push(np.concatenate([silence(6.0), speech]))
        stream.finalize().result(WAIT_S)
        log.wait(Closed)
        starts = [event.start_s for event in log.of(SpeechStarted)]
        period = 6 + len(speech) / RATE
        assert starts == pytest.approx([6 + index * period for index in range(4)], abs=0.1)

    def test_09_the_last_word_of_a_partial_is_held_back(self, stt, recordings, log):
        samples = recordings.joined("en", 1, 0.0, skip=9)
        stream = stt.stream(callback=log, language="en", partial_interval_s=0.1)
        push_slowly(stream, samples[: len(samples) * 2 // 3])
        partials = log.of(Partial)
        assert partials
        previews = []
        utterance = stream._utterance
        position = stream._partial_at
        utterance.preview(
            samples[stream._cutter.segmenter.window_start : position],
            False,
            previews.append,
            previews.append,
            Priority.LOW,
            time.monotonic() + WAIT_S,
        )
        eventually(lambda: previews)
        assert partials[-1].text == " ".join(previews[0].text.split()[:-1])
        stream.cancel()

    def test_10_half_a_character_is_held_back(self, stt, recordings, monkeypatch):
        stream = stt.stream(language="en")
        samples = recordings.joined("en", 1, 0.0)
        tokenizer = stt.model.tokenizer
        monkeypatch.setattr(
            type(tokenizer), "decode", lambda *_, **__: " half a charac\ufffd\ufffd"
        )
        previews = []
        stream._utterance.preview(
            samples,
            False,
            previews.append,
            previews.append,
            Priority.LOW,
            time.monotonic() + WAIT_S,
        )
        eventually(lambda: previews)
        assert "\ufffd" not in previews[0].text
        stream.cancel()

    def test_11_a_language_that_is_settled_stays(self, stt, recordings, log):
        german, english = recordings.joined("de", 2, 0.1), recordings.joined("en", 1, 0.0)
        stream = stt.stream(callback=log)
        for samples in (german, english):
            stream.push(samples)
            stream.flush()
        result = stream.finalize().result(WAIT_S)
        log.wait(Closed)
        assert [final.language for final in log.of(Final) if final.segment] == ["de", "de"]
        assert result.language == "de"
        assert result.language_probability > 0.5

    def test_12_silence_takes_no_memory(self, stt):
        stream = stt.stream()
        sizes = set()
        for _ in range(1000):
            stream.push(silence(0.1))
            settle(stream)
            sizes.add(stream._samples.nbytes)
            assert len(stream._arrivals) < 200
        assert sizes == {4 * 8192}
        stream.cancel()

    def test_13_a_stream_that_nobody_looks_after_is_finalized(self, stt, recordings, log, counted):
        stream = stt.stream(callback=log, language="en", idle_timeout_s=0.3)
        stream.push(recordings.joined("en", 1, 0.0))
        log.wait(Closed)
        [error] = log.of(Error)
        assert (error.code, error.recoverable) == ("idle", False)
        assert counted("idle") == 1
        assert log.of(Final)[-1].text
        with pytest.raises(UtteranceClosed):
            stream.push(silence(0.1))
        # Its text is still to be had, once.
        assert stream.finalize().result(WAIT_S).text == log.of(Final)[-1].text
        with pytest.raises(UtteranceClosed):
            stream.finalize()

    def test_13_a_stream_ends_at_its_longest_duration(self, stt, recordings, log, counted):
        samples = recordings.joined("en", 2, 0.6)
        stream = stt.stream(callback=log, language="en", max_duration_s=2.0)
        stream.push(samples)
        log.wait(Closed)
        assert [error.code for error in log.of(Error)] == ["too_long"]
        assert counted("too_long") == 1
        result = stream.finalize().result(WAIT_S)
        assert result.duration == 2.0
        assert said(result) == said(one_shot(stt, samples[: 2 * RATE], "en"))

    def test_13_a_stream_has_a_byte_budget(self, stt, counted):
        stream = stt.stream(max_buffered_s=1.0)
        with held(stream):
            assert stream.push(silence(0.6)).buffered_s == pytest.approx(0.6)
            assert stream.push(silence(0.6)).buffered_s == pytest.approx(1.2)
            with pytest.raises(Overloaded, match=r"1\.2 s of audio wait") as caught:
                stream.push(silence(0.1))
            assert caught.value.retry_after_s > 0
            assert counted("refused_chunks") == 1
        settle(stream)
        stream.push(silence(0.1))
        stream.cancel()

    def test_13_samples_that_come_alone_wait_together(self, stt):
        stream = stt.stream()
        with held(stream):
            for _ in range(10_000):
                stream.push(silence(1 / RATE))
            assert len(stream._audio) < 10
        stream.cancel()

    def test_14_audio_of_which_nothing_comes_is_an_error_event(self, stt, log, counted):
        stream = stt.stream(callback=log)
        with held(stream):
            stream.push(silence(1.0))
            watch(stream, 0, 29)
            assert log.events == []
            watch(stream, 31, 32, 60)
            error = log.wait(Error)
            assert (error.code, error.recoverable) == ("stalled", True)
            assert counted("stalled") == 1
        settle(stream)
        watch(stream, 100, 200)
        assert counted("stalled") == 1
        stream.cancel()

    def test_14_a_window_that_the_model_does_not_come_to_is_one_too(self, stt, recordings, log):
        stream = stt.stream(callback=log, language="en", partials=False)
        with Blocked(stt):
            stream.push(recordings.joined("en", 1, 1.0))
            eventually(lambda: stream._pending)
            watch(stream, 0, 31)
            assert log.wait(Error).code == "stalled"
        assert stream.finalize().result(WAIT_S).text

    def test_15_time_that_runs_out_is_no_silence(self, stt, recordings, log):
        # Partials have deadlines, and finals none: those that expire leave no trace in the text.
        samples = recordings.joined("en", 2, 0.6)
        stream = stt.stream(callback=log, language="en", partial_interval_s=0.05)
        with Blocked(stt):
            stream.push(samples[: 2 * RATE])
            time.sleep(2.2)
        stream.push(samples[2 * RATE :])
        assert said(stream.finalize().result(WAIT_S)) == said(one_shot(stt, samples, "en"))

    def test_16_an_error_leaves_no_lock_behind(self, stt, recordings, monkeypatch, log):
        broken = stt.stream(callback=log, language="en", partials=False)
        with monkeypatch.context() as patch:
            patch.setattr(broken._cutter, "push", lambda _: 1 / 0)
            broken.push(silence(1.0))
            log.wait(Closed)
        assert [error.code for error in log.of(Error)] == ["failed"]
        assert log.of(Closed)[0].reason == "failed"
        with pytest.raises(UtteranceClosed):
            broken.push(silence(1.0))
        samples = recordings.joined("en", 1, 0.3)
        assert streamed(stt, [samples], "en").text == one_shot(stt, samples, "en").text

    def test_16_a_model_that_fails_ends_its_stream_with_an_error(
        self, stt, recordings, monkeypatch
    ):
        with monkeypatch.context() as patch:
            patch.setattr(type(stt.model), "encode", lambda *_: 1 / 0)
            stream = stt.stream(language="en", partials=False)
            stream.push(recordings.joined("en", 1, 0.1))
            future = stream.finalize()
            with pytest.raises(ModelError, match="division"):
                future.result(WAIT_S)
        eventually(lambda: stt.statistics().audio_buffers.in_use == 0)

    def test_16_a_guess_that_fails_leaves_nothing_behind(self, stt, recordings, monkeypatch):
        samples = recordings.joined("en", 1, 0.0)
        stream = stt.stream(language="en", partials=False)
        with monkeypatch.context() as patch:
            patch.setattr(type(stt.model), "encode", lambda *_: 1 / 0)
            push_slowly(stream, np.concatenate([samples, silence(0.4)]))
            eventually(lambda: stream._utterance._guess is None)
        assert stt.statistics().audio_buffers.in_use <= 2  # its samples and their features
        stream.push(silence(1.0))
        assert stream.finalize().result(WAIT_S).text == one_shot(stt, samples, "en").text

    def test_17_streams_share_no_state(self, stt, recordings):
        streams = [
            (stt.stream(language=language, beam_size=beam), language, beam)
            for language in LANGUAGES
            for beam in (1, 5)
        ]
        audio = {language: recordings.joined(language, 2, 0.6) for language in LANGUAGES}
        for at in range(0, max(map(len, audio.values())), 4000):
            for stream, language, _ in streams:
                stream.push(audio[language][at : at + 4000])
        for stream, language, beam in streams:
            expected = one_shot(stt, audio[language], language, beam_size=beam)
            assert said(stream.finalize().result(WAIT_S)) == said(expected)

    def test_18_a_disconnect_is_a_cancel_and_raises_nowhere(self, stt, recordings, log):
        stream = stt.stream(callback=log, language="en")
        stream.push(recordings.joined("en", 2, 0.6))
        stream.cancel()
        stream.cancel()
        assert log.wait(Closed).reason == "cancelled"
        for call in (stream.flush, stream.finalize, lambda: stream.push(b"")):
            with pytest.raises(UtteranceClosed, match="closed"):
                call()
        eventually(lambda: stt.statistics().audio_buffers.in_use == 0)

    def test_19_what_is_no_audio_is_refused_and_changes_nothing(self, stt, recordings):
        samples = recordings.joined("en", 1, 0.3)
        stream = stt.stream(language="en")
        bad = [
            np.array([0.1, np.nan], np.float32),
            np.array([np.inf], np.float32),
            np.zeros((2, 2), np.float32),
            np.zeros(4, np.int8),
            "text",
            None,
            [0.0],
        ]
        for piece in np.array_split(samples, len(bad)):
            with pytest.raises(InvalidAudioError):
                stream.push(bad.pop())
            stream.push(piece)
        assert said(stream.finalize().result(WAIT_S)) == said(one_shot(stt, samples, "en"))

    def test_19_what_looks_wrong_is_a_warning(self, stt):
        stream = stt.stream()
        stream.push(np.array([0, 20_000], np.float32))
        [warning] = stream.finalize().result(WAIT_S).warnings
        assert "20000" in warning

    def test_20_no_pace_is_assumed(self, stt, recordings):
        samples = recordings.joined("en", 4, 0.6)
        at_once = streamed(stt, [samples], "en")
        slow = stt.stream(language="en")
        push_slowly(slow, samples, 0.25)
        assert said(slow.finalize().result(WAIT_S)) == said(at_once)

    def test_21_many_frames_are_one_task(self, stt):
        before = sum(stt.statistics().scheduler.executed.values())
        stream = stt.stream()
        stream.push(silence(30.0))
        stream.finalize().result(WAIT_S)
        tasks = sum(stt.statistics().scheduler.executed.values()) - before
        assert tasks < 60  # of 940 frames; maintenance has its share

    def test_22_a_stream_without_audio_costs_nothing(self, stt):
        streams = [stt.stream() for _ in range(20)]
        before = time.process_time()
        time.sleep(0.5)
        assert time.process_time() - before < 0.25
        for stream in streams:
            stream.cancel()

    def test_23_a_consumer_that_is_slow_gets_the_finals_and_what_was_committed(
        self, stt, recordings
    ):
        release, log = threading.Event(), Log()

        def callback(event):
            release.wait(WAIT_S)
            log(event)

        samples = recordings.joined("en", 3, 0.6)
        stream = stt.stream(callback=callback, language="en", partial_interval_s=0.05)
        push_slowly(stream, samples)
        result = stream.finalize().result(WAIT_S)
        release.set()
        log.wait(Closed)
        assert " ".join(final.text for final in log.of(Final)) == result.text
        assert len(log.of(Partial)) <= 1

    def test_24_a_final_does_not_wait_for_partials(self, stt, recordings, log):
        samples = recordings.joined("en", 2, 0.1)
        stream = stt.stream(callback=log, language="en", partial_interval_s=0.05)
        with Blocked(stt):
            stream.push(samples)
            eventually(lambda: stream._drop_partial)
            future = stream.finalize()
            eventually(lambda: stream._pending)
            assert stream._drop_partial is None
        assert future.result(WAIT_S).text == one_shot(stt, samples, "en").text


class TestShedding:
    def test_partials_come_less_often_when_the_model_is_behind(
        self, stt, recordings, log, monkeypatch
    ):
        stream = stt.stream(callback=log, language="en")
        dispatcher = type(stt._dispatcher)
        with monkeypatch.context() as patch:
            patch.setattr(dispatcher, "backlog_s", property(lambda _: 1.0))
            push_slowly(stream, recordings.joined("en", 6, 0.1))
        intervals = [event.partial_interval_s for event in log.of(Overload)]
        assert intervals[:2] == [1.0, 2.0]
        n_partials = len(log.of(Partial))
        assert stream._partial_interval_s > 0.5
        push_slowly(stream, recordings.joined("en", 16, 0.1))
        assert stream._partial_interval_s == 0.5
        assert len(log.of(Partial)) - n_partials > n_partials
        stream.cancel()

    def test_new_streams_are_refused_when_the_model_is_far_behind(self, stt, monkeypatch):
        before = stt.statistics().streams.refused
        with monkeypatch.context() as patch:
            patch.setattr(type(stt._dispatcher), "backlog_s", property(lambda _: 7.0))
            with pytest.raises(Overloaded, match=r"7\.0 s behind") as caught:
                stt.stream()
        assert caught.value.retry_after_s == 7.0
        assert stt.statistics().streams.refused == before + 1
        stt.stream().cancel()

    def test_accepted_audio_has_its_final_whatever_comes(self, stt, recordings, log):
        samples = recordings.joined("en", 2, 0.6)
        streams = [stt.stream(language="en") for _ in range(30)]
        for stream in streams:
            stream.push(samples)
        expected = one_shot(stt, samples, "en").text
        for stream in streams:
            assert stream.finalize().result(WAIT_S).text == expected


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
        eventually(lambda: stt.statistics().audio_buffers.in_use == 0)
        assert stt.statistics().streams.open == 0

    def test_the_future_cancels_the_stream(self, stt, recordings, log):
        stream = stt.stream(callback=log, language="en")
        with Blocked(stt):
            stream.push(recordings.joined("en", 1, 0.0))
            future = stream.finalize()
            assert future.cancel()
        assert log.wait(Closed).reason == "cancelled"

    def test_whoever_waits_for_the_future_is_told(self, stt, recordings):
        stream = stt.stream(language="en")
        with Blocked(stt):
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
        assert stt.statistics().streams.open == before.open
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


class TestSnapshot:
    def test_it_goes_along(self, stt, recordings):
        stream = stt.stream(language="en")
        assert stream.snapshot.state == "open"
        samples = np.concatenate([recordings.spoken("en", 4, 8), silence(1.0)])
        texts = []
        for piece in cut(samples, range(0, len(samples), 4800)):
            push_slowly(stream, piece)
            snapshot = stream.snapshot
            assert snapshot.received_s == snapshot.processed_s
            texts.append(snapshot)
        assert any(snapshot.unstable_text for snapshot in texts)
        assert any(snapshot.stable_text for snapshot in texts)
        expected = one_shot(stt, samples, "en").text
        assert any(s.text and expected.startswith(s.text) and s.text != expected for s in texts)
        stream.finalize().result(WAIT_S)
        last = stream.snapshot
        assert (last.state, last.text) == ("closed", expected)
        assert (last.stable_text, last.unstable_text) == ("", "")
        assert last.received_s == len(samples) / RATE


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
            with held(stream):
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
