"""Freeing a model's weights: verified, between calls, and undone by the next one."""

import gc
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from waiting import eventually

import speechrnt
from speechrnt.errors import ModelError, OptionError
from speechrnt.residency import Residency

RATE = 16000


@pytest.fixture
def model():
    return speechrnt.WhisperModel(device="cpu")


@pytest.fixture(scope="module")
def clip(samples):
    return speechrnt.decode_audio(samples / "s03_en.wav")


def text(model, audio):
    return "".join(segment.text for segment in model.transcribe(audio, language="en")[0])


def test_unloaded_weights_are_back_when_they_are_needed(model, clip):
    expected = text(model, clip)
    for _ in range(2):
        model.unload_model()
        assert not model.model_is_loaded
        assert not model.model.model_is_loaded
        assert text(model, clip) == expected
        assert model.model_is_loaded
    model.unload_model()
    model.unload_model()
    model.load_model()
    model.load_model()
    assert model.model.model_is_loaded


@pytest.mark.parametrize("seconds", [2, 5])
def test_unloaded_weights_are_back_for_a_context_that_was_never_decoded(model, clip, seconds):
    """CTranslate2 tells hardly anything of a model whose weights are not there."""
    model.unload_model()
    piece = clip[: seconds * RATE]
    assert text(model, piece)
    assert model.model_is_loaded


def test_unloading_right_after_a_result_works_every_time(model, clip):
    """CTranslate2 alone does nothing for a moment after each call, and does not say so."""
    features = np.zeros((1, 80, 300), dtype=np.float32)
    for _ in range(30):
        model._model.encode(features)
        model.unload_model()
        assert not model.model.model_is_loaded


def test_unloading_waits_for_the_calls_under_way(model):
    with model._model.residency, pytest.raises(TimeoutError, match="still in use"):
        model.unload_model(timeout=0.05)
    assert model.model_is_loaded
    model.unload_model(timeout=60)
    assert not model.model_is_loaded


def test_calls_made_while_unloading_waits_come_after_it(model):
    """Or else several workers, of whom one is always busy, would never let it come about."""
    residency = model._model.residency

    def use():
        with residency:
            pass

    with ThreadPoolExecutor(2) as executor:
        with residency:
            unloading = executor.submit(model.unload_model, timeout=60)
            eventually(lambda: residency._unloading)
            using = executor.submit(use)
            with pytest.raises(TimeoutError):
                using.result(timeout=0.2)
        unloading.result(timeout=60)
        using.result(timeout=60)
    assert model.model_is_loaded


def test_calls_go_on_where_unloading_is_given_up(model, clip):
    with model._model.residency, pytest.raises(TimeoutError):
        model.unload_model(timeout=0)
    assert text(model, clip)


def test_unloading_in_the_middle_of_work_changes_no_text(model, clip):
    expected = text(model, clip)
    stop = threading.Event()

    def disturb():
        count = 0
        while not stop.is_set():
            model.unload_model()
            count += 1
            time.sleep(0.01)
        return count

    with ThreadPoolExecutor(4) as pool:
        disturber = pool.submit(disturb)
        texts = [pool.submit(text, model, clip) for _ in range(12)]
        try:
            assert {each.result() for each in texts} == {expected}
        finally:
            stop.set()
        assert disturber.result() > 0


def test_idle_models_are_unloaded(model, clip):
    model.unload_when_idle(0.1)
    expected = text(model, clip)
    eventually(lambda: not model.model_is_loaded)
    assert text(model, clip) == expected
    eventually(lambda: not model.model_is_loaded)
    model.unload_when_idle(None)
    eventually(lambda: model._model.residency._keeper is None)
    model.load_model()
    assert model.model_is_loaded


def test_a_watched_model_can_be_dropped():
    model = speechrnt.WhisperModel(device="cpu")
    model.unload_when_idle(60)
    gone = weakref.ref(model._model)
    keeper = model._model.residency._keeper
    del model
    gc.collect()
    eventually(lambda: gone() is None)
    keeper.join(60)
    assert not keeper.is_alive()


@pytest.mark.parametrize("seconds", [-1, "1", True, float("nan")])
def test_bad_idle_times_are_refused(model, seconds):
    with pytest.raises(OptionError, match="seconds"):
        model.unload_when_idle(seconds)


def test_a_model_on_the_cpu_cannot_move_there(model):
    for unload in (model.unload_model, lambda to_cpu: model.unload_when_idle(1, to_cpu)):
        with pytest.raises(OptionError, match="to_cpu"):
            unload(True)
    assert model.model_is_loaded


class Stubborn:
    """A CTranslate2 model that is used by somebody else, too, or cannot load any more."""

    model_is_loaded = True

    def unload_model(self, to_cpu):
        pass


def test_weights_that_stay_are_an_error(monkeypatch):
    monkeypatch.setattr(speechrnt.residency, "_SETTLING_S", 0.02)
    residency = Residency(Stubborn(), "stubborn")
    with pytest.raises(ModelError, match="keeps the model"):
        residency.unload()
    assert residency.is_loaded


def test_after_an_interrupted_load_the_weights_can_be_freed(model, monkeypatch):
    residency, whisper = model._model.residency, model.model

    def interrupted(load):
        load()
        raise KeyboardInterrupt

    model.unload_model()
    with monkeypatch.context() as patch:
        patch.setattr("speechrnt.openmp.load", interrupted)
        with pytest.raises(KeyboardInterrupt):
            model.load_model()
    assert residency.is_loaded
    assert whisper.model_is_loaded
    model.unload_model()
    assert not whisper.model_is_loaded
