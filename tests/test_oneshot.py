"""One-shot requests on the real model: any length, any kind of audio, and cancelled anywhere."""

import io
import random
import re
from concurrent.futures import CancelledError, Future, wait

import jiwer
import numpy as np
import pytest
from engine_helpers import assert_at_rest, held, occupied, spied, with_pauses
from waiting import eventually

from speechrnt import (
    Audio,
    AudioNotFoundError,
    OptimizationConfig,
    PerformanceOptimizedSTT,
    _mel_task,
    oneshot,
)
from speechrnt.models import Model
from speechrnt.oneshot import Request


def words(text):
    return re.sub(r"[^\w ]", "", text.lower())


def word_error_rate(expected, text):
    return jiwer.wer(words(expected), words(text))


def all_of(result):
    """All that a result says, but for the time it took."""
    segments = [(s.start, s.end, s.text, s.tokens, s.avg_logprob) for s in result.segments]
    return result.text, result.language, result.language_probability, segments, result.duration


@pytest.fixture(autouse=True)
def at_rest(engine):
    yield
    assert_at_rest(engine)


@pytest.fixture(scope="module")
def alone(engine, clips, manifest):
    """What each recording gives when it is the only one, in its language."""
    return [
        engine.transcribe_async(clip, each["lang"]).result()
        for clip, each in zip(clips, manifest, strict=True)
    ]


@pytest.fixture(scope="module")
def english(clips, manifest):
    """A minute and a half of English, and what is said."""
    indices = [index for index, each in enumerate(manifest) if each["lang"] == "en"] * 2
    return [clips[index] for index in indices], " ".join(manifest[i]["text"] for i in indices)


def request_of(engine, audio, language="en", flushes=(), **options):
    plan = engine._checked_plan(language, options)
    over = []
    request = Request(engine._pipeline, plan, audio, on_over=over.append, flushes=flushes)
    request.read()
    return request, over


def test_every_recording_is_understood(alone, manifest):
    expected = " ".join(each["text"] for each in manifest)
    assert word_error_rate(expected, " ".join(result.text for result in alone)) <= 0.02


def test_languages_are_detected(engine, clips, manifest):
    results = [engine.transcribe_async(clip) for clip in clips]
    assert [f.result().language for f in results] == [each["lang"] for each in manifest]
    assert all(0.5 < f.result().language_probability <= 1 for f in results)


def test_a_given_language_is_sure(alone):
    assert {result.language_probability for result in alone} == {1.0}


def test_the_result_is_the_same_under_load(engine, clips, manifest, alone):
    order = [*range(len(clips))] * 3
    random.Random(1).shuffle(order)
    futures = [(i, engine.transcribe_async(clips[i], manifest[i]["lang"])) for i in order]
    for index, future in futures:
        assert all_of(future.result()) == all_of(alone[index])


def test_the_result_is_the_same_from_every_kind_of_audio(engine, samples, manifest, clips, alone):
    path = samples / manifest[3]["file"]
    integers = np.round(clips[3] * 32768).astype(np.int16)
    for audio in (
        path,
        str(path),
        io.BytesIO(path.read_bytes()),
        clips[3].copy(),
        clips[3].astype(np.float64),
        integers,
        integers.tobytes(),
        bytearray(integers.tobytes()),
        memoryview(integers.tobytes()),
        Audio.from_array(clips[3]),
    ):
        assert all_of(engine.transcribe_async(audio, "en").result()) == all_of(alone[3])


def test_an_array_may_change_as_soon_as_the_call_returns(engine, clips, alone, monkeypatch):
    audio = clips[3].copy()
    with held(monkeypatch, "_cut_slice", Request):
        future = engine.transcribe_async(audio, "en")
        audio[:] = 0
    assert all_of(future.result()) == all_of(alone[3])


def test_a_long_recording_with_pauses_is_understood(engine, english):
    parts, text = english
    audio = with_pauses(parts)
    result = engine.transcribe_async(audio, "en").result()
    assert len(audio) > 90 * 16_000
    assert word_error_rate(text, result.text) <= 0.03
    assert [segment.id for segment in result.segments] == [*range(1, len(result.segments) + 1)]
    assert result.duration == len(audio) / 16_000
    end = 0.0
    for segment in result.segments:
        assert end <= segment.start < segment.end <= result.duration
        end = segment.end


@pytest.mark.parametrize("options", [{"vad": False}, {"endpoint_s": 10}])
def test_a_long_recording_without_a_pause_is_cut_at_quiet_places(engine, english, options):
    parts, text = english
    result = engine.transcribe_async(np.concatenate(parts), "en", **options).result()
    assert len(result.segments) >= 8
    assert word_error_rate(text, result.text) <= 0.12


def test_a_long_recording_gives_the_same_every_time(engine, english):
    audio = with_pauses(english[0][:12])
    results = [engine.transcribe_async(audio) for _ in range(4)]
    assert len({repr(all_of(future.result())) for future in results}) == 1


def test_parts_that_are_flushed_apart_say_what_they_say_alone(engine, clips):
    pause = np.zeros(16_000, dtype=np.float32)
    first = np.concatenate([clips[1], clips[3][:20_000]])  # ends inside a word
    second = np.concatenate([clips[3][20_000:], pause])
    request, over = request_of(engine, np.concatenate([first, second]), flushes=(len(first),))
    texts = [engine.transcribe_async(part, "en").result().text for part in (first, second)]
    assert request.future.result().text == " ".join(texts)
    assert over == [request]


@pytest.mark.parametrize("flushes", [(0,), (10**9,), (1, 2, 3)])
def test_flushes_at_the_edges_change_nothing(engine, clips, alone, flushes):
    request, _ = request_of(engine, clips[3], flushes=flushes)
    assert request.future.result().text == alone[3].text


@pytest.mark.parametrize(
    "audio",
    [
        np.zeros(0, dtype=np.float32),
        np.zeros(1, dtype=np.float32),
        np.zeros(160_000, dtype=np.float32),
        b"",
        b"\0\0",
    ],
    ids=["empty", "one sample", "silence", "no bytes", "two bytes"],
)
@pytest.mark.parametrize("vad", [True, False])
@pytest.mark.parametrize("language", ["en", None])
def test_nothing_said_gives_no_text(engine, audio, vad, language):
    result = engine.transcribe_async(audio, language, vad=vad).result()
    assert result.duration == (len(audio) if isinstance(audio, np.ndarray) else len(audio) / 2) / (
        16_000
    )
    if vad or len(audio) < 160:
        assert (result.text, result.segments) == ("", ())
        assert result.language == (language or "")


def test_silence_costs_no_model_time(engine):
    before = engine.statistics().dispatcher.submitted
    engine.transcribe_async(np.zeros(60 * 16_000, dtype=np.float32)).result()
    assert engine.statistics().dispatcher.submitted == before


def test_the_language_is_detected_once_and_then_settled(engine, english, monkeypatch):
    audio = with_pauses(english[0])
    with spied(monkeypatch, "detect_languages") as calls:
        result = engine.transcribe_async(audio).result()
    # Short windows settle nothing; the first of two seconds does.
    settles = next(n for n, part in enumerate(english[0], start=1) if len(part) > 2.2 * 16_000)
    assert 1 <= len(calls) <= settles + 1
    assert (result.language, len(result.segments) > 20) == ("en", True)


def test_what_changes_its_language_early_is_of_the_language_of_the_most_audio(engine, clips):
    audio = with_pauses([clips[2], clips[3], clips[4]])  # a short German one first
    assert engine.transcribe_async(audio).result().language == "en"


def test_a_recording_does_not_fill_the_queue(engine, english, monkeypatch):
    """Windows in flight are bounded, however long the recording, and so are the buffers."""
    audio = with_pauses(english[0] * 4)
    bound = engine._pipeline.windows_in_flight
    with held(monkeypatch) as gate:
        request, _ = request_of(engine, audio)
        assert gate.reached.wait(60)
        eventually(lambda: request._utterance.in_flight >= bound and not request._is_reading)
        assert request._utterance.in_flight <= bound + 2
        now = engine.statistics()
        assert sum(now.dispatcher.queued.values()) + now.dispatcher.running <= bound
        assert now.audio_buffers.in_use <= bound + 8
        assert request._has_more
    assert len(request.future.result().segments) > 100


def test_stages_are_timed(engine, english):
    timings = engine.transcribe_async(with_pauses(english[0][:8])).result().timings
    stages = vars(timings)
    assert all(seconds >= 0 for seconds in stages.values())
    for stage in ("ingest", "mel", "encode", "decode", "text", "total"):
        assert stages[stage] > 0
    assert timings.delivery < timings.total


def cancelled(engine, future, before, running=0):
    """Check that a future was cancelled, and that whoever waits for it is told."""
    with pytest.raises(CancelledError):
        future.result(60)
    assert wait([future], timeout=60).done
    assert_at_rest(engine)
    now = engine.statistics()
    assert now.requests["cancelled"] == before.requests["cancelled"] + 1
    assert now.requests["completed"] == before.requests["completed"]
    assert now.dispatcher.completed == before.dispatcher.completed + running


def test_cancelled_before_it_is_read(engine, samples, monkeypatch):
    before = engine.statistics()
    with held(monkeypatch, "_read", Request):
        future = engine.transcribe_async(samples / "s03_en.wav", "en")
        with spied(monkeypatch, "load_audio", oneshot) as loaded:
            assert future.cancel()
    cancelled(engine, future, before)
    assert not loaded


def test_cancelled_while_it_is_read(engine, samples, monkeypatch):
    before = engine.statistics()
    with held(monkeypatch, "load_audio", oneshot) as gate:
        future = engine.transcribe_async(samples / "s03_en.wav", "en")
        assert gate.reached.wait(60)
        assert future.cancel()
    cancelled(engine, future, before)


def test_cancelled_while_its_features_are_computed(engine, clips, monkeypatch):
    before = engine.statistics()
    spawn, spawned = _mel_task.spawn, []
    with monkeypatch.context() as patch:
        patch.setattr(_mel_task, "spawn", lambda *args: spawned.append(args))
        future = engine.transcribe_async(clips[3], "en")
        eventually(lambda: spawned)
        assert future.cancel()
    spawn(*spawned.pop())  # now
    cancelled(engine, future, before)


def test_cancelled_while_it_waits_for_the_model(engine, clips, monkeypatch):
    with held(monkeypatch) as gate:
        others = occupied(engine, gate, clips[1])
        before = engine.statistics()
        future = engine.transcribe_async(clips[3], "en")
        eventually(lambda: sum(engine.statistics().dispatcher.queued.values()) == 1)
        assert future.cancel()
        assert sum(engine.statistics().dispatcher.queued.values()) == 0
    assert {other.result().text for other in others} == {"Two five one."}
    with pytest.raises(CancelledError):
        future.result()
    assert_at_rest(engine)
    assert engine.statistics().dispatcher.cancelled == before.dispatcher.cancelled + 1


def test_cancelled_while_the_model_works_on_it(engine, clips, monkeypatch):
    before = engine.statistics()
    with held(monkeypatch) as gate:
        future = engine.transcribe_async(clips[3], "en")
        assert gate.reached.wait(60)
        assert future.cancel()
        assert future.cancelled()
    cancelled(engine, future, before, running=1)


def test_cancelling_what_is_done_changes_nothing(engine, clips, alone):
    future = engine.transcribe_async(clips[3], "en")
    assert future.result().text == alone[3].text
    before = engine.statistics()
    assert not future.cancel()
    assert future.result().text == alone[3].text
    assert engine.statistics().requests == before.requests


def test_cancelling_at_any_moment_leaves_nothing_behind(engine, english, clips, alone):
    audio = with_pauses(english[0][:6])
    rng = random.Random(3)
    futures = []
    for _ in range(40):
        futures.append(engine.transcribe_async(audio))
        if rng.random() < 0.7:
            rng.choice(futures).cancel()
    good = engine.transcribe_async(clips[3], "en")
    for future in futures:
        if rng.random() < 0.5:
            future.cancel()
    done, waiting = wait(futures, timeout=60)
    assert not waiting
    texts = {future.result().text for future in done if not future.cancelled()}
    assert len(texts) <= 1
    assert all_of(good.result()) == all_of(alone[3])


def test_a_file_that_is_not_there_fails_after_all_is_let_go(engine):
    before = engine.statistics()
    seen = Future()
    future = engine.transcribe_async("no such file.wav")
    future.add_done_callback(lambda _: seen.set_result(engine.statistics()))
    with pytest.raises(AudioNotFoundError, match="no such file"):
        future.result(60)
    now = seen.result(60)
    assert now.requests["failed"] == before.requests["failed"] + 1
    assert now.live == 0


def test_a_model_that_fails_fails_the_request_and_the_next_one_is_well(
    engine, clips, alone, monkeypatch
):
    with monkeypatch.context() as patch:
        patch.setattr(Model, "generate", lambda *_, **__: 1 / 0)
        future = engine.transcribe_async(with_pauses(clips[3:6]), "en")
        with pytest.raises(Exception, match="division by zero"):
            future.result(60)
    assert all_of(engine.transcribe_async(clips[3], "en").result()) == all_of(alone[3])


def test_a_result_that_cannot_be_read_fails_the_request(engine, clips, monkeypatch, caplog):
    with monkeypatch.context() as patch:
        patch.setattr("speechrnt.utterance.parse_result", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            engine.transcribe_async(clips[3], "en").result(60)
    assert "could not be used" in caplog.text


def test_a_result_that_cannot_be_made_fails_the_request(engine, clips, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("speechrnt.transcript.Transcript.finish", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            engine.transcribe_async(clips[3], "en").result(60)


def test_a_damaged_file_gives_what_can_be_read_and_a_warning(engine, samples):
    content = (samples / "s03_en.wav").read_bytes()
    result = engine.transcribe_async(io.BytesIO(content[:-20_000]), "en").result()
    assert "Set the alarm" in result.text
    assert result.warnings


def test_a_long_silence_is_read_without_a_scheduler_in_many_slices(clips, monkeypatch):
    monkeypatch.setattr(oneshot, "_SLICE_BLOCKS", 1)  # a second each
    audio = np.zeros(600 * 16_000, dtype=np.float32)
    audio[-len(clips[1]) :] = clips[1]
    config = OptimizationConfig(enable_async_processing=False)
    with PerformanceOptimizedSTT(config, device="cpu") as stt:
        assert stt.transcribe_async(audio, "en").result().text == "Two five one."
