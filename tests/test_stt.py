"""The engine as its users see it: many at once, from coroutines, its end, forks, and bad input."""

import asyncio
import gc
import os
import random
import subprocess
import sys
import threading
import weakref
from concurrent.futures import CancelledError, ThreadPoolExecutor, as_completed

import numpy as np
import pytest
from engine_helpers import assert_at_rest, held, occupied, with_pauses
from waiting import eventually

from speechrnt import (
    AudioFileError,
    AudioNotFoundError,
    DeadlineExceeded,
    InvalidAudioError,
    ModelError,
    ModelNotFoundError,
    OptimizationConfig,
    OptionError,
    PerformanceOptimizedSTT,
    Priority,
    SpeechRNTError,
)
from speechrnt.latency import STAGES
from speechrnt.oneshot import Request

SAID = "Two five one."  # in the second recording


@pytest.fixture(autouse=True)
def at_rest(engine):
    yield
    assert_at_rest(engine)


def new_engine(**changes):
    return PerformanceOptimizedSTT(OptimizationConfig(**changes), device="cpu")


def engine_threads():
    return [t.name for t in threading.enumerate() if t.name.startswith("speechrnt")]


def test_64_mixed_requests_at_once_are_right(engine, clips, manifest):
    rng = random.Random(5)
    requests = []
    for n in range(64):
        index = rng.randrange(len(clips))
        translates = rng.random() < 0.3
        requests.append(
            {
                "audio": with_pauses([clips[index]] * rng.choice([1, 1, 3]), 1.0),
                "language": rng.choice([None, manifest[index]["lang"]]),
                "task": "translate" if translates else "transcribe",
                "beam_size": rng.choice([1, 5]),
                "vad": rng.random() < 0.9,
                "priority": Priority(rng.randrange(4)),
                "client": rng.choice([None, "a", n]),
                "deadline": rng.choice([None, 600]),
            }
        )
    alone = [engine.transcribe_async(**request).result().text for request in requests]
    futures = [engine.transcribe_async(**request) for request in requests]
    assert [future.result().text for future in futures] == alone
    assert all(alone)


def test_requests_from_many_threads(engine, clips, manifest):
    expected = [engine.transcribe_async(clip, "en").result().text for clip in clips]
    got = {}

    def work(index):
        got[index] = engine.transcribe_async(clips[index], "en").result().text

    threads = [threading.Thread(target=work, args=(index,)) for index in range(len(clips))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [got[index] for index in range(len(clips))] == expected


def test_coroutines_await_results(engine, clips):
    async def main():
        return await asyncio.gather(*(engine.transcribe(clips[1], "en") for _ in range(8)))

    assert {result.text for result in asyncio.run(main())} == {SAID}


def test_cancelling_a_coroutine_cancels_its_request(engine, clips, monkeypatch):
    before = engine.statistics().requests["cancelled"]

    async def main():
        with held(monkeypatch) as gate:
            task = asyncio.ensure_future(engine.transcribe(clips[1], "en"))
            assert await asyncio.to_thread(gate.reached.wait, 60)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert engine.statistics().requests["cancelled"] == before + 1

    asyncio.run(main())


def test_a_coroutine_gets_the_errors_of_its_request(engine):
    with pytest.raises(AudioNotFoundError):
        asyncio.run(engine.transcribe("no such file.wav"))
    with pytest.raises(OptionError):
        asyncio.run(engine.transcribe("no such file.wav", beam_size=0))


def test_an_engine_in_a_coroutine(clips):
    async def main():
        async with new_engine() as stt:
            result = await stt.transcribe(clips[1], "en")
        with pytest.raises(ModelError, match="closed"):
            await stt.transcribe(clips[1], "en")
        return result

    assert asyncio.run(main()).text == SAID


def test_closing_finishes_what_is_under_way(clips):
    before = engine_threads()
    stt = new_engine()
    futures = [stt.transcribe_async(clip) for clip in clips[:12]]
    stt.close()
    assert all(future.result(0).text for future in futures)
    assert engine_threads() == before
    stt.close()
    with pytest.raises(ModelError, match="closed"):
        stt.transcribe_async(clips[1])
    with pytest.raises(ModelError, match="closed"):
        stt.warm_up()
    now = stt.statistics()
    assert (now.live, now.requests["completed"], now.audio_buffers.in_use) == (0, 12, 0)
    assert now.audio_buffers.reserved_bytes == 0


def test_closing_with_cancel_cancels_what_is_under_way(clips, monkeypatch):
    stt = new_engine(model_workers=1)
    with held(monkeypatch) as gate:
        futures = [stt.transcribe_async(clip) for clip in clips[:12]]
        assert gate.reached.wait(60)
        thread = threading.Thread(target=stt.close, args=(True,))
        thread.start()
        for future in futures:
            with pytest.raises(CancelledError):
                future.result(60)
        assert thread.is_alive()  # the model's call has begun, and is waited for
    thread.join(60)
    assert not thread.is_alive()
    assert stt.statistics().requests["cancelled"] == 12
    assert stt.statistics().audio_buffers.in_use == 0


def test_closing_with_cancel_cancels_a_request_that_is_being_made(clips, monkeypatch):
    stt = new_engine()
    with ThreadPoolExecutor(2) as threads, held(monkeypatch):
        with held(monkeypatch, "__init__", owner=Request) as being_made:
            asking = threads.submit(stt.transcribe_async, clips[1], "en")
            assert being_made.reached.wait(60)
            closing = threads.submit(stt.close, cancel=True)
            eventually(lambda: stt.health().facts.closed)
        with pytest.raises(CancelledError):
            asking.result(60).result(60)
    closing.result(60)
    assert_at_rest(stt)
    assert stt.statistics().requests["cancelled"] == 1


def test_several_threads_may_close(clips):
    stt = new_engine()
    future = stt.transcribe_async(with_pauses(clips[3:9]))
    threads = [threading.Thread(target=stt.close, args=(n == 2,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads)
    assert future.done()


def test_an_engine_that_is_left_by_an_exception_does_not_wait(clips, monkeypatch):
    futures = []

    def leave():
        with held(monkeypatch, first=1) as gate, new_engine(model_workers=1) as stt:
            futures.extend(stt.transcribe_async(clip) for clip in clips[:12])
            assert gate.reached.wait(60)
            # When the first call is done, the others have been cancelled.
            threading.Timer(0.05, gate.opened.set).start()
            raise KeyError

    with pytest.raises(KeyError):
        leave()
    assert sum(future.cancelled() for future in futures) == 12
    assert all(future.done() for future in futures)


def test_a_callback_cannot_close_the_engine_and_is_told(engine, clips):
    outcome = []

    def close(_):
        try:
            engine.close()
        except RuntimeError as error:
            outcome.append(str(error))

    with_callback = threading.Event()
    future = engine.transcribe_async(clips[1], "en")
    future.add_done_callback(close)
    future.add_done_callback(lambda _: with_callback.set())
    assert with_callback.wait(60)
    if not outcome:  # it was done before, so that this thread made the callback
        pytest.fail("the engine was closed")
    assert "callback" in outcome[0]
    assert engine.transcribe_async(clips[1], "en").result().text == SAID


def test_callbacks_may_ask_for_more(engine, clips):
    results, done = [], threading.Event()

    def more(future):
        results.append(future.result().text)
        if len(results) < 5:
            engine.transcribe_async(clips[1], "en").add_done_callback(more)
        else:
            done.set()

    engine.transcribe_async(clips[1], "en").add_done_callback(more)
    assert done.wait(60)
    assert results == [SAID] * 5


@pytest.mark.parametrize("asynchronous", [True, False])
@pytest.mark.parametrize("was_used", [True, False])
def test_an_engine_that_nobody_refers_to_ends(clips, was_used, asynchronous):
    gc.collect()
    before = engine_threads()
    stt = new_engine(enable_async_processing=asynchronous)
    future = None
    if was_used:
        future = stt.transcribe_async(clips[1], "en")
        future.result()
        stt.stream(callback=lambda event: None).cancel()
        assert_at_rest(stt)
    watched = weakref.ref(stt)
    del stt
    eventually(lambda: gc.collect() >= 0 and watched() is None, "collection")
    eventually(lambda: engine_threads() == before, "the end of the threads")
    del future  # a result that is kept keeps no engine


def test_a_request_under_way_keeps_its_engine(clips, monkeypatch):
    before = engine_threads()
    with held(monkeypatch) as gate:
        stt = new_engine()
        futures = [stt.transcribe_async(clip, "en") for clip in clips[1:6]]
        assert gate.reached.wait(60)
        del stt
        gc.collect()
    assert futures[0].result(60).text == SAID
    assert all(future.result(60).text for future in futures)
    del futures
    eventually(lambda: gc.collect() >= 0 and engine_threads() == before, "the end of the threads")


def run(program):
    return subprocess.run(
        [sys.executable, "-W", "error", "-W", "ignore::DeprecationWarning", "-c", program],
        check=True,
        timeout=300,
        capture_output=True,
        text=True,
    )


PRELUDE = """
import os, sys, threading
import numpy as np
from speechrnt import ModelError, OptimizationConfig, PerformanceOptimizedSTT, load_audio
audio = load_audio({path!r}).samples
stt = PerformanceOptimizedSTT(OptimizationConfig({config}), device="cpu")
"""


@pytest.mark.parametrize("config", ["", "enable_async_processing=False"])
def test_the_interpreter_exits_after_what_is_under_way(samples, config):
    program = PRELUDE.format(path=str(samples / "s01_en.wav"), config=config)
    program += """
futures = [stt.transcribe_async(audio, "en") for _ in range(40)]
import atexit
@atexit.register
def check():
    pass
for future in futures:
    future.add_done_callback(lambda future: sys.stdout.write(future.result().text + "\\n"))
"""
    done = run(program)
    assert done.stdout.splitlines() == [SAID] * 40
    assert done.stderr == ""


def test_the_interpreter_exits_by_an_exception(samples):
    program = PRELUDE.format(path=str(samples / "s01_en.wav"), config="")
    program += "futures = [stt.transcribe_async(audio, 'en') for _ in range(40)]\nsys.exit(3)\n"
    with pytest.raises(subprocess.CalledProcessError) as error:
        run(program)
    assert (error.value.returncode, error.value.stderr) == (3, "")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_a_forked_child_is_told_and_exits_and_the_parent_goes_on(samples):
    program = PRELUDE.format(path=str(samples / "s01_en.wav"), config="")
    program += """
futures = [stt.transcribe_async(audio, "en") for _ in range(20)]
pid = os.fork()
if not pid:
    for call in (
        lambda: stt.transcribe_async(audio), stt.warm_up, stt.statistics, stt.health, stt.stream,
    ):
        try:
            call()
        except ModelError as error:
            assert "parent process" in str(error), error
        else:
            os._exit(1)
    stt.close()
    del stt
    sys.exit(7)
code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
assert code == 7, code
assert {future.result().text for future in futures} == {"Two five one."}
"""
    run(program)


BAD_AUDIO = [
    (None, InvalidAudioError, "NoneType"),
    (17, InvalidAudioError, "int"),
    ([0.1, 0.2], InvalidAudioError, "list"),
    (np.zeros((2, 100), dtype=np.float32), InvalidAudioError, "shape"),
    (np.zeros(100, dtype=np.complex64), InvalidAudioError, "dtype"),
    (np.zeros(100, dtype=np.uint8), InvalidAudioError, "dtype"),
    (np.array([0, np.nan], dtype=np.float32), InvalidAudioError, "nan"),
    (np.array([0, np.inf], dtype=np.float32), InvalidAudioError, "inf"),
    (np.array([0, 1e30], dtype=np.float32), InvalidAudioError, "sample 1"),
    (b"abc", InvalidAudioError, "whole number"),
    (b"RIFF\0\0\0\0WAVE", InvalidAudioError, "BytesIO"),
    ("no such file.wav", AudioNotFoundError, "no such file"),
    (__file__, AudioFileError, "test_stt"),
]


@pytest.mark.parametrize(("audio", "error", "match"), BAD_AUDIO)
def test_audio_that_cannot_be_used_is_one_clear_error(engine, clips, audio, error, match):
    is_file = isinstance(audio, str)
    if is_file:
        future = engine.transcribe_async(audio, "en")
        with pytest.raises(error, match=match):
            future.result(60)
    else:
        before = engine.statistics().requests
        with pytest.raises(error, match=match):
            engine.transcribe_async(audio, "en")
        assert engine.statistics().requests == before
    assert engine.transcribe_async(clips[1], "en").result().text == SAID


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"language": "xx"}, "xx"),
        ({"language": 7}, "language"),
        ({"task": "sing"}, "task"),
        ({"beem_size": 5}, "beem_size: no such option; there are audio_context, beam_size"),
        ({"on_over": print}, "on_over"),
        ({"priority": 9}, "priority"),
        ({"priority": "HIGH"}, "priority"),
        ({"priority": [1]}, "priority"),
        ({"deadline": 0}, "deadline"),
        ({"deadline": -1.0}, "deadline"),
        ({"deadline": float("nan")}, "deadline"),
        ({"deadline": float("inf")}, "deadline"),
        ({"deadline": True}, "deadline"),
        ({"deadline": "soon"}, "deadline"),
        ({"client": ["a"]}, "client"),
        ({"client": ("a", [])}, "client"),
    ],
)
def test_what_cannot_be_asked_for_is_one_clear_error(engine, clips, options, match):
    before = engine.statistics().requests
    with pytest.raises(OptionError, match=match):
        engine.transcribe_async(clips[1], **options)
    assert engine.statistics().requests == before
    assert engine.transcribe_async(clips[1], "en").result().text == SAID


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"config": {"max_batch_size": 4}}, OptionError),
        ({"model": "no-such-model-anywhere/x/y"}, ModelNotFoundError),
        ({"device": "tpu"}, OptionError),
        ({"compute_type": "int3"}, OptionError),
        ({"num_workers": 2}, OptionError),
        ({"cpu_threads": 2}, OptionError),
        ({"no_such_option": 1}, SpeechRNTError),
    ],
)
def test_an_engine_that_cannot_be_made_leaves_nothing_behind(arguments, error):
    before = engine_threads()
    with pytest.raises(error):
        PerformanceOptimizedSTT(**{"device": "cpu", **arguments})
    assert engine_threads() == before


def test_a_request_that_is_late_is_an_error_and_no_silence(engine, clips, monkeypatch):
    with held(monkeypatch) as gate:
        occupied(engine, gate, clips[1])
        late = engine.transcribe_async(clips[3], "en", deadline=0.001)
        in_time = engine.transcribe_async(clips[1], "en", deadline=600)
        eventually(lambda: sum(engine.statistics().dispatcher.queued.values()) == 2)
    with pytest.raises(DeadlineExceeded):
        late.result(60)
    assert in_time.result(60).text == SAID


def test_futures_work_with_what_waits_for_futures(engine, clips):
    futures = [engine.transcribe_async(clips[1], "en") for _ in range(6)]
    futures[3].cancel()
    assert len(list(as_completed(futures, timeout=60))) == 6


def test_statistics_are_those_of_a_known_workload(clips, manifest):
    with new_engine() as stt:
        empty = stt.statistics()
        assert not any(empty.requests.values())
        assert (empty.live, empty.audio_in_s, empty.utterances.windows) == (0, 0, 0)
        futures = [stt.transcribe_async(clip) for clip in clips[:10]]
        silent = stt.transcribe_async(np.zeros(32_000, dtype=np.float32))
        for future in futures:
            future.result()
        assert silent.result().text == ""
        with pytest.raises(AudioNotFoundError):
            stt.transcribe_async("no such file.wav").result()
        with pytest.raises(OptionError):
            stt.transcribe_async(clips[0], beam_size=0)
        now = stt.statistics()
        assert now.requests == {
            "accepted": 12,
            "completed": 11,
            "failed": 1,
            "cancelled": 0,
            "rejected": 0,
        }
        assert now.live == 0
        assert now.audio_out_s == pytest.approx(sum(len(clip) for clip in clips[:10]) / 16_000 + 2)
        assert now.audio_in_s == pytest.approx(now.audio_out_s)
        n_segments = sum(len(future.result().segments) for future in futures)
        assert now.utterances.windows == n_segments + now.utterances.silent
        assert now.dispatcher.submitted == now.utterances.windows + now.utterances.retried
        batches = now.dispatcher.batch_sizes
        assert sum(n * count for n, count in batches.items()) == now.dispatcher.completed
        for stage in STAGES:
            assert now.stages[stage].count == 11
            spent = sum(getattr(f.result().timings, stage) for f in [*futures, silent])
            assert now.stages[stage].sum_s == pytest.approx(spent)
        assert now.audio_buffers.in_use == 0
        assert now.scheduler.submitted > 0


def test_timings_are_plausible(engine, clips):
    timings = vars(engine.transcribe_async(clips[3]).result().timings)
    assert set(timings) == set(STAGES)
    assert all(seconds >= 0 for seconds in timings.values())
    # One window: its stages follow each other.
    assert 0 < sum(timings[s] for s in STAGES if s != "total") <= timings["total"] * 1.01


def test_warming_up_for_options_measures_the_contexts_that_they_lead_to():
    with new_engine(max_batch_size=2) as stt:
        with pytest.raises(OptionError, match="no such option"):
            stt.warm_up(audio_contexts="full")
        with pytest.raises(OptionError, match="language"):
            stt.warm_up(language="xx")
        assert stt.costs == {}
        stt.warm_up(language="de", audio_context="full", beam_size=1)
        assert list(stt.costs) == [3000]


def test_warming_up_measures_every_context_and_changes_no_text(clips):
    with new_engine(max_batch_size=4, model_workers=1) as stt:
        assert stt.costs == {}
        text = stt.transcribe_async(clips[1], "en").result().text
        stt.warm_up()
        plan = stt._checked_plan(None, {})
        assert sorted(stt.costs) == list(plan.contexts)
        assert stt.transcribe_async(clips[1], "en").result().text == text == SAID
        assert_at_rest(stt)


def test_two_engines_work_side_by_side(clips):
    with new_engine() as one, new_engine() as other:
        futures = [stt.transcribe_async(clips[1], "en") for stt in (one, other) * 4]
        assert {future.result().text for future in futures} == {SAID}
