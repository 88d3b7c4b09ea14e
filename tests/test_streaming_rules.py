"""Streams: one test for each corner case that streaming servers are known to get wrong."""

import threading
import time

import engine_helpers
import numpy as np
import pytest
from streaming_helpers import (
    RATE,
    WAIT_S,
    Log,
    cut,
    looked_after_by_hand,
    one_shot,
    paused,
    push_slowly,
    said,
    settle,
    silence,
    streamed,
)
from waiting import eventually

from speechrnt import (
    InvalidAudioError,
    ModelError,
    Overloaded,
    Priority,
    UtteranceClosed,
)
from speechrnt.events import (
    Closed,
    Error,
    Final,
    Overload,
    Partial,
    SpeechStarted,
)

LANGUAGES = ("en", "de", "es", "fr")


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
        looked_after_by_hand(stt, stream)  # which would have it give back what it does not need
        sizes = set()
        for _ in range(1000):
            stream.push(silence(0.1))
            settle(stream)
            sizes.add(stream._samples.nbytes)
            assert len(stream._arrivals) < 200
        assert sizes == {4 * 8192}
        stream.cancel()

    def test_13_a_stream_that_nobody_looks_after_is_finalized(self, stt, recordings, log, counted):
        stream = stt.stream(callback=log, language="en", idle_timeout_s=60)
        stream.push(recordings.joined("en", 1, 0.0))
        stream._last_push -= 60
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
        with paused(stream):
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
        with paused(stream):
            for _ in range(10_000):
                stream.push(silence(1 / RATE))
            assert len(stream._audio) < 10
        stream.cancel()

    def test_14_audio_of_which_nothing_comes_is_an_error_event(self, stt, log, counted):
        stream = stt.stream(callback=log)
        look = looked_after_by_hand(stt, stream)
        with paused(stream):
            stream.push(silence(1.0))
            look(0, 29)
            assert not stream.is_stalled
            look(31, 32, 60)
            error = log.wait(Error)
            assert (error.code, error.recoverable) == ("stalled", True)
            assert counted("stalled") == 1
        settle(stream)
        look(100, 200)
        assert counted("stalled") == 1
        stream.cancel()

    def test_14_a_window_that_the_model_does_not_come_to_is_one_too(
        self, stt, recordings, log, monkeypatch
    ):
        stream = stt.stream(callback=log, language="en", partials=False)
        look = looked_after_by_hand(stt, stream)
        with engine_helpers.held(monkeypatch):
            stream.push(recordings.joined("en", 1, 1.0))
            eventually(lambda: stream._pending)
            look(0, 31)
            assert log.wait(Error).code == "stalled"
        assert stream.finalize().result(WAIT_S).text

    def test_15_time_that_runs_out_is_no_silence(self, stt, recordings, counted, monkeypatch):
        # Partials have deadlines, and finals none: those that expire leave no trace in the text.
        monkeypatch.setattr("speechrnt.streaming._PARTIAL_DEADLINE_S", 0.01)
        samples = recordings.joined("en", 2, 0.6)
        stream = stt.stream(language="en", partial_interval_s=0.05)
        with engine_helpers.held(monkeypatch) as gate:
            engine_helpers.occupied(stt, gate, samples)
            for piece in np.array_split(samples[:RATE], 10):
                stream.push(piece)
            eventually(lambda: stream._drop_partial)
            time.sleep(0.02)
        eventually(lambda: counted("expired_partials"))
        stream.push(samples[RATE:])
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
        before = stt.statistics().scheduler.executed
        stream = stt.stream(priority=Priority.HIGH)
        stream.push(silence(30.0))
        stream.finalize().result(WAIT_S)
        stt._scheduler.drain()
        tasks = stt.statistics().scheduler.executed[Priority.HIGH] - before[Priority.HIGH]
        assert 1 <= tasks < 20  # of 940 frames

    def test_22_a_stream_without_audio_costs_nothing(self, stt):
        stt._scheduler.drain()
        before, maintenance = stt.statistics().scheduler.executed, stt._maintenance
        streams = [stt.stream() for _ in range(20)]
        rounds = maintenance.rounds
        eventually(lambda: maintenance.rounds >= rounds + 5)
        after = stt.statistics().scheduler.executed
        assert all(after[each] == before[each] for each in Priority if each != Priority.LOW)
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
        push_slowly(stream, samples, are_told=False)
        result = stream.finalize().result(WAIT_S)
        release.set()
        log.wait(Closed)
        assert " ".join(final.text for final in log.of(Final)) == result.text
        assert len(log.of(Partial)) <= 1

    def test_24_a_final_does_not_wait_for_partials(self, stt, recordings, log, monkeypatch):
        samples = recordings.joined("en", 2, 0.1)
        stream = stt.stream(callback=log, language="en", partial_interval_s=0.05)
        with engine_helpers.held(monkeypatch):
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
