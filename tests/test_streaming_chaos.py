"""Many streams at once, some of them bad: the others' text is the same, and their turn comes."""

import asyncio
import contextlib
import threading
import time

import numpy as np
import pytest
from streaming_helpers import (
    RATE,
    WAIT_S,
    Log,
    looked_after_by_hand,
    one_shot,
    said,
    silence,
)
from waiting import eventually

from speechrnt import (
    InvalidAudioError,
    Overloaded,
    UtteranceClosed,
)
from speechrnt.events import Closed, Final
from speechrnt.job_queue import ROUND_S
from speechrnt.system import usable_cores

LANGUAGES = ("en", "de", "es", "fr")
CHUNK = RATE // 5


class Good:
    """Well-behaved streams, that push their audio by turns."""

    def __init__(self, stt, recordings, count):
        self._stt = stt
        self._audio = [
            (recordings.joined(LANGUAGES[i % 4], 2, 0.6, i // 4), LANGUAGES[i % 4])
            for i in range(count)
        ]
        self._expected = [said(one_shot(stt, *each)) for each in self._audio]

    def run(self, pause_s=0.01):
        """Run them, and check what they say; return their streams."""
        streams = [self._stt.stream(language=language) for _, language in self._audio]
        for at in range(0, max(len(samples) for samples, _ in self._audio), CHUNK):
            for stream, (samples, _) in zip(streams, self._audio, strict=True):
                stream.push(samples[at : at + CHUNK])
            time.sleep(pause_s)
        futures = [stream.finalize() for stream in streams]
        for future, expected in zip(futures, self._expected, strict=True):
            assert said(future.result(WAIT_S)) == expected
        return streams


def test_64_streams_at_once_end_with_their_own_text(stt, recordings):
    Good(stt, recordings, 64).run()


class TestBadStreams:
    """Each kind of bad stream beside eight good ones."""

    @pytest.fixture
    def good(self, stt, recordings):
        return Good(stt, recordings, 8)

    @pytest.fixture
    def beside(self, stt, good):
        """Run the good streams while a function goes on and on beside them."""

        @contextlib.contextmanager
        def beside(function, threads=1):
            done, errors = threading.Event(), []

            def run():
                try:
                    while not done.is_set():
                        function()
                except Exception as error:
                    errors.append(error)

            running = [threading.Thread(target=run) for _ in range(threads)]
            for thread in running:
                thread.start()
            try:
                good.run()
                yield
            finally:
                done.set()
                for thread in running:
                    thread.join()
            assert errors == []

        return beside

    def test_a_flood(self, stt, recordings, beside):
        speech = recordings.joined("en", 4, 0.55)
        flood = stt.stream(language="en", max_buffered_s=20.0)

        def push():
            # Far more than a hundred times real time.
            try:
                flood.push(speech)
            except Overloaded:
                time.sleep(0.001)

        with beside(push):
            assert flood.snapshot.received_s - flood.snapshot.processed_s <= 20 + len(speech) / RATE
        assert stt.statistics().streams.counts["refused_chunks"] > 0
        flood.cancel()

    def test_samples_that_are_not_finite(self, stt, beside):
        stream = stt.stream(encoding="f32")

        def push():
            for bad in (np.full(1600, np.nan, np.float32), np.full(1600, np.inf)):
                with pytest.raises(InvalidAudioError):
                    stream.push(bad)
                with pytest.raises(InvalidAudioError):
                    stream.push(bad.astype("<f4").tobytes())
            time.sleep(0.001)

        with beside(push):
            pass
        assert stream.finalize().result(WAIT_S).duration == 0

    def test_streams_that_are_never_finalized(self, stt, recordings, beside):
        speech = recordings.joined("en", 1, 0.0)

        def forget():
            # One that is not scheduled for so long may find its stream closed.
            with contextlib.suppress(Overloaded, UtteranceClosed):
                stt.stream(idle_timeout_s=0.3).push(speech)
            time.sleep(0.02)

        with beside(forget):
            pass
        eventually(lambda: stt.statistics().streams.open == 0)

    def test_a_consumer_that_blocks(self, stt, recordings, beside):
        release = threading.Event()
        speech = recordings.joined("en", 3, 0.6)
        streams = [
            stt.stream(callback=lambda _: release.wait(WAIT_S), language="en") for _ in range(4)
        ]
        futures = []

        def push():
            if not futures:
                for stream in streams:
                    stream.push(speech)
                    futures.append(stream.finalize())
            time.sleep(0.01)

        with beside(push):
            pass
        # Their own text is there, too.
        expected = one_shot(stt, speech, "en").text
        assert [future.result(WAIT_S).text for future in futures] == [expected] * 4
        release.set()

    def test_callbacks_that_raise(self, stt, recordings, beside):
        before = stt.statistics().streams.counts["callback_errors"]
        speech = recordings.joined("en", 1, 0.6)

        def run():
            stream = stt.stream(callback=lambda _: 1 / 0, language="en")
            stream.push(speech)
            assert stream.finalize().result(WAIT_S).text

        with beside(run):
            pass
        assert stt.statistics().streams.counts["callback_errors"] > before

    def test_a_storm_of_disconnects(self, stt, recordings, beside):
        speech = recordings.joined("en", 2, 0.6)
        rng = np.random.default_rng(0)

        def run():
            try:
                stream = stt.stream(language="en", partial_interval_s=0.05)
            except Overloaded:
                time.sleep(0.005)
                return
            stream.push(speech[: rng.integers(len(speech))])
            if rng.random() < 0.5:
                stream.finalize()
            time.sleep(rng.random() * 0.02)
            stream.cancel()

        with beside(run):
            pass
        eventually(lambda: stt.statistics().streams.open == 0)

    def test_coroutines_that_go_away(self, stt, recordings, beside):
        speech = recordings.joined("en", 1, 0.6)

        async def leave():
            stream = stt.stream(language="en")
            async with stream:
                await stream.apush(speech)
                async for _ in stream:
                    break

        with beside(lambda: asyncio.run(leave())):
            pass

    def test_all_of_them(self, stt, recordings, good):
        speech = recordings.joined("en", 4, 0.55)
        rng = np.random.default_rng(1)
        kinds = {
            "flood": {"max_buffered_s": 5.0, "idle_timeout_s": 0.5},
            "raise": {"callback": lambda _: 1 / 0, "idle_timeout_s": 0.3},
            "forget": {"idle_timeout_s": 0.2},
        }
        done = threading.Event()

        def misbehave(seed):
            rng = np.random.default_rng(seed)
            while not done.is_set():
                kind = str(rng.choice(list(kinds)))
                with contextlib.suppress(Overloaded, UtteranceClosed):
                    stream = stt.stream(language="en", **kinds[kind])
                    for _ in range(rng.integers(1, 6)):
                        stream.push(speech[: rng.integers(1, len(speech))])
                    with contextlib.suppress(InvalidAudioError):
                        stream.push(np.array([np.nan]))
                    if rng.random() < 0.5:
                        stream.cancel()
                time.sleep(0.01)

        threads = [threading.Thread(target=misbehave, args=[rng.integers(99)]) for _ in range(3)]
        for thread in threads:
            thread.start()
        try:
            good.run()
        finally:
            done.set()
            for thread in threads:
                thread.join()
        eventually(lambda: stt.statistics().streams.open == 0)


class TestShare:
    """Whose turn it is, by the costs that the queue counts with and not by the clock."""

    def waits(self, stt, clients, function):
        """Return what the jobs of others cost that went before each job of some clients.

        And what the dearest job cost.
        """
        dispatcher = stt._dispatcher
        admitted, waits = [], []  # client and cost of each job; costs
        lock = threading.Lock()
        admit, submit = dispatcher._admit, dispatcher.submit

        def note_submit(job):
            with lock:
                job.seen = len(admitted)
            submit(job)

        def note_admit(job):
            with lock:
                if job.client in clients:
                    before = admitted[job.seen :]
                    waits.append(sum(cost for client, cost in before if client not in clients))
                admitted.append((job.client, job.cost_s))
            return admit(job)

        dispatcher.submit, dispatcher._admit = note_submit, note_admit
        try:
            function()
        finally:
            del dispatcher.submit, dispatcher._admit
        assert waits
        return waits, max(cost for _, cost in admitted)

    @pytest.mark.parametrize("n_floods", [1, 4])
    def test_a_flood_goes_before_nobody_by_more_than_its_share(self, stt, recordings, n_floods):
        speech, own = recordings.joined("en", 20, 0.55), recordings.joined("de", 1, 0.0)
        floods = [stt.stream(language="en", partials=False) for _ in range(n_floods)]
        good = stt.stream(language="de", partials=False)
        clients = {good._utterance._client}

        def run():
            for flood in floods:
                flood.push(speech)
            eventually(lambda: stt.statistics().dispatcher.submitted > before + 2 * n_floods)
            for _ in range(5):
                good.push(own)
                good.flush()
                time.sleep(0.02)
            good.finalize().result(WAIT_S)

        before = stt.statistics().dispatcher.submitted
        try:
            waits, dearest = self.waits(stt, clients, run)
        finally:
            for flood in floods:
                flood.cancel()
        # The batch that each worker is making up, and of each other stream a round and as much as
        # this one has had.
        workers = stt.config.model_threads("cpu", usable_cores())[0]
        share = ROUND_S + 6 * dearest
        batches = workers * stt.config.max_batch_size * dearest
        assert max(waits) <= n_floods * share + batches, (waits, dearest)

    def test_silence_costs_no_job_and_no_memory(self, stt):
        before = stt.statistics().dispatcher.submitted
        rng = np.random.default_rng(0)
        streams = [stt.stream() for _ in range(16)]
        for stream in streams:
            looked_after_by_hand(stt, stream)
        held = []
        for _ in range(60):
            noise = rng.normal(0, 0.002, RATE).astype(np.float32)
            for stream in streams:
                stream.push(noise)
            eventually(
                lambda: all(s.snapshot.processed_s == s.snapshot.received_s for s in streams)
            )
            held.append(sum(stream._samples.nbytes for stream in streams))
        assert max(held[3:]) <= held[2]
        assert [stream.finalize().result(WAIT_S).text for stream in streams] == [""] * 16
        assert stt.statistics().dispatcher.submitted == before


def test_events_of_64_streams_are_their_own(stt, recordings):
    logs = []
    for index in range(64):
        log = Log()
        stream = stt.stream(f"stream {index}", callback=log, language="en")
        stream.push(recordings.joined("en", 1, 0.0, index))
        stream.push(silence(0.7))
        stream.finalize()
        logs.append(log)
    for index, log in enumerate(logs):
        log.wait(Closed)
        assert {event.utterance_id for event in log.events} == {f"stream {index}"}
        expected = one_shot(stt, recordings.joined("en", 1, 0.7, index), "en").text
        assert " ".join(final.text for final in log.of(Final) if final.text) == expected
