"""Streams: events and snapshots that can be relied on."""

import asyncio
import threading

import numpy as np
import pytest
from streaming_helpers import (
    RATE,
    WAIT_S,
    Log,
    cut,
    one_shot,
    push_slowly,
    silence,
)

from speechrnt import (
    OptionError,
)
from speechrnt.events import (
    Closed,
    Committed,
    Final,
    Partial,
    SpeechEnded,
    SpeechStarted,
)

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
