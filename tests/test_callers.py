"""Callers of one `WhisperModel` that share batches: company, options, errors, cancelling."""

import sys
import threading
import time
from concurrent.futures import CancelledError, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest

from speechrnt import BatchedInferencePipeline, ModelError, WhisperModel
from speechrnt.models import Model

RATE = 16000


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A model in tiny's shape with random weights."""
    directory = tmp_path_factory.mktemp("tiny")
    sys.path.insert(0, str(Path(__file__).parent.parent / "perf"))
    try:
        import random_whisper
    finally:
        sys.path.pop(0)
    random_whisper.write_model("tiny", directory)
    return directory


@pytest.fixture(scope="module")
def model():
    return WhisperModel(device="cpu")


def said(model, audio, **options):
    """All that is said of a recording, without the sampling that nobody can repeat."""
    options = {"temperature": 0.0, "language": "en", **options}
    return [asdict(segment) for segment in model.transcribe(audio, **options)[0]]


def text(segments):
    return [(each["tokens"], each["start"], each["end"]) for each in segments]


def batches(model):
    return dict(model._dispatcher.statistics().batch_sizes)


def settled(model):
    """Find that nothing waits or runs, and nobody leads."""
    now = model._dispatcher.statistics()
    assert (now.running, sum(now.queued.values()), model._dispatcher._leaders) == (0, 0, 0)
    assert now.submitted == now.completed + now.failed + now.cancelled
    return now


def together(model, monkeypatch, calls):
    """Make calls at once: the first one to encode waits until all others wait for it."""
    dispatcher, encode = model._dispatcher, Model.encode
    has_begun = threading.Lock()

    def wait_for_company(self, features):
        if has_begun.acquire(blocking=False):
            end = time.monotonic() + 60
            while sum(dispatcher.statistics().queued.values()) < len(calls) - 1:
                assert time.monotonic() < end
                time.sleep(0.001)
        return encode(self, features)

    monkeypatch.setattr(Model, "encode", wait_for_company)
    with ThreadPoolExecutor(len(calls)) as pool:
        futures = [pool.submit(call) for call in calls]
        for future in futures:
            future.exception()
    monkeypatch.undo()
    return futures


def test_a_lone_caller_decodes_window_by_window_on_its_own_thread(clips, monkeypatch):
    model = WhisperModel(device="cpu")
    said(model, clips[0])  # tqdm starts a thread the first time
    before, callers = threading.active_count(), []
    generate = Model.generate

    def recorded(*arguments, **options):
        callers.append(threading.current_thread())
        return generate(*arguments, **options)

    monkeypatch.setattr(Model, "generate", recorded)
    for clip in clips[:3]:
        said(model, clip)
    assert batches(model) == {1: 4}
    assert {*callers} == {threading.current_thread()}
    assert threading.active_count() == before
    settled(model)


@pytest.mark.parametrize("word_timestamps", [False, True])
def test_company_changes_no_bit_on_int8(model, clips, monkeypatch, word_timestamps):
    options = {"audio_context": 10, "word_timestamps": word_timestamps}
    expected = [said(model, clip, **options) for clip in clips[:6]]
    before = batches(model)
    calls = [lambda clip=clip: said(model, clip, **options) for clip in clips[:6]]
    futures = together(model, monkeypatch, calls)
    assert [future.result() for future in futures] == expected
    grown = {size: n - before.get(size, 0) for size, n in batches(model).items()}
    assert grown[4] == 1
    settled(model)


@pytest.mark.parametrize("compute_type", ["int8", "float32"])
def test_company_changes_no_text_of_other_models(tiny, clips, monkeypatch, compute_type):
    monkeypatch.setattr("speechrnt.callers._CACHE_BYTES", 1 << 30)  # share in any case
    model = WhisperModel(tiny, device="cpu", compute_type=compute_type)
    options = {"max_new_tokens": 20}
    expected = [said(model, clip, **options) for clip in clips[:3]]
    calls = [lambda clip=clip: said(model, clip, **options) for clip in clips[:3]]
    actual = [future.result() for future in together(model, monkeypatch, calls)]
    assert max(batches(model)) == 3
    assert [text(each) for each in actual] == [text(each) for each in expected]
    if compute_type == "int8":
        assert actual == expected


def test_full_context_is_shared_where_it_pays(tiny, clips, monkeypatch):
    # The weights of float32 are four times as large, and not read once for each window.
    sizes = {}
    for compute_type in ("int8", "float32"):
        model = WhisperModel(tiny, device="cpu", compute_type=compute_type)
        calls = [lambda m=model: said(m, clips[0], max_new_tokens=5)] * 3
        for future in together(model, monkeypatch, calls):
            assert future.result()
        sizes[compute_type] = max(batches(model))
    assert sizes == {"int8": 1, "float32": 3}


def test_other_options_share_no_batch(model, clips, monkeypatch):
    every = [
        {},
        {"beam_size": 2},
        {"length_penalty": 0.5},
        {"initial_prompt": "Good morning."},
        {"without_timestamps": True},
        {"max_initial_timestamp": 0.0},
        {"suppress_tokens": [17]},
        {"max_new_tokens": 9},
        {"prefix": "Turn"},
    ]
    expected = [said(model, clips[3], **options) for options in every]
    before = batches(model)
    calls = [lambda options=options: said(model, clips[3], **options) for options in every]
    assert [each.result() for each in together(model, monkeypatch, calls)] == expected
    assert batches(model) == {**before, 1: before[1] + len(every)}


def test_languages_share_a_batch_and_are_detected_in_it(model, clips, manifest, monkeypatch):
    options = {"audio_context": 10, "multilingual": True}
    expected = [said(model, clip, **options) for clip in clips[:4]]
    before = batches(model)
    calls = [lambda clip=clip: said(model, clip, **options) for clip in clips[:4]]
    assert [each.result() for each in together(model, monkeypatch, calls)] == expected
    assert batches(model)[4] == before.get(4, 0) + 1
    detected = [lambda clip=clip: model.transcribe(clip)[1].language for clip in clips[:8]]
    languages = [each.result() for each in together(model, monkeypatch, detected)]
    assert languages == [each["lang"] for each in manifest[:8]]


def test_sampling_is_done_alone(model, clips, monkeypatch):
    before = batches(model)
    calls = [lambda: said(model, clips[3], audio_context=10, temperature=0.4)] * 4
    for future in together(model, monkeypatch, calls):
        future.result()
    assert batches(model) == {**before, 1: before[1] + 4}


def test_files_join_the_chunks_of_a_pipeline(model, clips, monkeypatch):
    """Chunks and windows of the same kind; here those of models that are good at full context."""
    monkeypatch.setattr("speechrnt.callers._CACHE_BYTES", 1 << 30)
    model = WhisperModel(device="cpu")
    pipeline = BatchedInferencePipeline(model)
    audio = np.concatenate(clips[:4])
    cuts = [{"start": 0.0, "end": 2.0}, {"start": 2.0, "end": 4.5}]
    chunks = {"without_timestamps": True, "language": "en"}

    def piped():
        segments, _ = pipeline.transcribe(audio, clip_timestamps=cuts, **chunks)
        return [asdict(each) for each in segments]

    def plain():
        return said(model, clips[3], audio_context="full", without_timestamps=True)

    expected = [piped(), plain(), plain(), piped()]
    before = batches(model)
    together_said = together(model, monkeypatch, [piped, plain, plain, piped])
    assert [each.result() for each in together_said] == expected
    assert max(batches(model)) > 2
    assert sum(batches(model).values()) < sum(before.values()) + 4


def test_what_fails_fails_alone(model, clips, monkeypatch):
    options = {"audio_context": 10}
    expected = said(model, clips[3], **options)
    encode = Model.encode

    def fussy(self, features):
        if not np.ptp(features):  # of silence
            raise RuntimeError("no such features")
        return encode(self, features)

    monkeypatch.setattr(Model, "encode", fussy)

    def good():
        return said(model, clips[3], **options)

    def guilty():
        return said(model, np.zeros_like(clips[3]), **options)

    futures = together(model, monkeypatch, [good, guilty, good, guilty, good])
    for future, call in zip(futures, [good, guilty, good, guilty, good], strict=True):
        if call is good:
            assert future.result() == expected
        else:
            with pytest.raises(ModelError, match="no such features"):
                future.result()
    settled(model)
    assert good() == expected


class Held:
    """Keeps the first encoding under way until it is told to go on."""

    def __init__(self, monkeypatch, then=lambda: None):
        self.has_begun, self.may_go_on = threading.Event(), threading.Event()
        encode = Model.encode

        def hold(model, features):
            if not self.has_begun.is_set():
                self.has_begun.set()
                assert self.may_go_on.wait(60)
                then()
            return encode(model, features)

        monkeypatch.setattr(Model, "encode", hold)


def waiting(model, n):
    end = time.monotonic() + 60
    while sum(model._dispatcher.statistics().queued.values()) != n:
        assert time.monotonic() < end
        time.sleep(0.001)


def test_a_window_that_waits_is_taken_back_when_it_is_cancelled(model, clips, monkeypatch):
    expected = said(model, clips[3])
    cancelled_before = settled(model).cancelled
    held = Held(monkeypatch)
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(said, model, clips[3])
        assert held.has_begun.wait(60)
        segments, _ = model.transcribe(clips[3], language="en")
        second = pool.submit(next, segments)
        waiting(model, 1)
        segments.cancel()
        with pytest.raises(CancelledError):
            second.result(60)
        held.may_go_on.set()
        assert first.result(60) == expected
    with pytest.raises(CancelledError):
        next(segments)
    assert settled(model).cancelled == cancelled_before + 1


def test_who_is_interrupted_leaves_the_others_their_windows(model, clips, monkeypatch):
    expected = said(model, clips[3])

    def interrupt():
        raise KeyboardInterrupt

    held = Held(monkeypatch, interrupt)
    with ThreadPoolExecutor(3) as pool:
        first = pool.submit(said, model, clips[3])
        assert held.has_begun.wait(60)
        others = [pool.submit(said, model, clips[3]) for _ in range(2)]
        waiting(model, 2)
        held.may_go_on.set()
        with pytest.raises(KeyboardInterrupt):
            first.result(60)
        assert [each.result(60) for each in others] == [expected] * 2
    settled(model)


def test_threads_that_call_cancel_and_unload_lose_nothing(model, clips):
    kinds = [{"audio_context": 10}, {"audio_context": 10, "beam_size": 2}, {"language": None}]
    expected = [[said(model, clip, **kind) for kind in kinds] for clip in clips[:4]]
    dice = np.random.default_rng(3)
    plans = [(int(a), int(b), bool(c)) for a, b, c in dice.integers(0, (4, 3, 2), (48, 3))]

    def work(plan):
        clip, kind, is_cancelled = plan
        if not is_cancelled:
            assert said(model, clips[clip], **kinds[kind]) == expected[clip][kind]
            return
        options = {"temperature": 0.0, "language": "en", **kinds[kind]}
        segments, _ = model.transcribe(clips[clip], **options)
        threading.Timer(0.005 * clip, segments.cancel).start()
        with suppress(CancelledError):
            list(segments)

    with ThreadPoolExecutor(8) as pool:
        unloading = pool.submit(lambda: [model.unload_model() for _ in range(5)])
        for done in [pool.submit(work, plan) for plan in plans]:
            done.result(120)
        unloading.result(120)
    settled(model)


def test_a_model_that_nobody_uses_is_collected(tiny):
    import gc
    import weakref

    model = WhisperModel(tiny, device="cpu")
    said(model, np.zeros(RATE, np.float32), max_new_tokens=2, audio_context=2)
    reference = weakref.ref(model._dispatcher)
    del model
    gc.collect()
    assert reference() is None
