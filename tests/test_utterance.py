"""Windows to text: prompts, languages, second attempts, limits, order; and the plans for them."""

import threading
from functools import reduce
from types import SimpleNamespace

import numpy as np
import pytest
from engine_helpers import assert_at_rest, held, spied, with_pauses
from waiting import eventually

from speechrnt import (
    OptimizationConfig,
    OptionError,
    PerformanceOptimizedSTT,
    UtteranceOptions,
)
from speechrnt.features import WINDOW_FRAMES
from speechrnt.models import Capabilities, Model
from speechrnt.plan import make_plan
from speechrnt.results import Segment
from speechrnt.segmentation import WindowCut
from speechrnt.utterance import Final, Utterance, add_text

REPETITIVE, GOOD, OTHER = "no " * 60, "Turn on the kitchen lights.", "Call Robert today."


@pytest.fixture(autouse=True)
def at_rest(engine):
    yield
    assert_at_rest(engine)


@pytest.fixture
def say(engine, monkeypatch):
    """Have the decoder say what it is told, call after call, and note what it is asked."""
    tokenizer = engine.model.tokenizer

    def start(*results):
        waiting, calls = list(results), []

        def generate(self, encoding, prompts, **options):
            outputs = []
            for prompt in prompts:
                text, logprob, *no_speech = waiting.pop(0)
                calls.append((prompt, options))
                tokens = tokenizer.encode(" " + text) if text else []
                score = logprob * (len(tokens) + 1) / max(len(tokens), 1)
                outputs.append(
                    SimpleNamespace(
                        sequences_ids=[tokens],
                        scores=[score],
                        no_speech_prob=no_speech[0] if no_speech else 0.0,
                    )
                )
            return outputs

        monkeypatch.setattr(Model, "generate", generate)
        return calls

    yield start
    monkeypatch.undo()


def transcribe(engine, audio, language="en", **options):
    return engine.transcribe_async(audio, language, **options).result(60)


def test_a_good_transcript_is_searched_once(engine, clips, say):
    calls = say((GOOD, -0.2))
    assert transcribe(engine, clips[3]).text == GOOD
    assert len(calls) == 1


@pytest.mark.parametrize("bad", [(REPETITIVE, -0.1), (OTHER, -1.5)])
def test_a_transcript_that_looks_wrong_is_searched_again_harder(engine, clips, say, bad):
    before = engine.statistics().utterances
    calls = say(bad, (GOOD, -0.5))
    assert transcribe(engine, clips[3], beam_size=2).text == GOOD
    first, second = (options for _, options in calls)
    assert first["beam_size"] == 2
    assert second["beam_size"] == 5
    assert second["repetition_penalty"] > 1 == first["repetition_penalty"]
    assert second["no_repeat_ngram_size"] > 0 == first["no_repeat_ngram_size"]
    assert "sampling_temperature" not in second
    now = engine.statistics().utterances
    assert (now.windows, now.retried) == (before.windows + 1, before.retried + 1)


def test_there_is_no_third_attempt(engine, clips, say):
    calls = say((REPETITIVE, -0.1), (REPETITIVE, -0.1))
    assert transcribe(engine, clips[3]).text == REPETITIVE.strip()
    assert len(calls) == 2


@pytest.mark.parametrize(
    ("first", "second", "text"),
    [
        ((OTHER, -1.2), (GOOD, -1.1), GOOD),  # the more probable
        ((OTHER, -1.2), (GOOD, -1.3), OTHER),
        ((REPETITIVE, -0.1), (GOOD, -3.0), GOOD),  # rather improbable than repetitive
        ((OTHER, -1.2), (REPETITIVE, -0.1), OTHER),
        ((OTHER, -1.2), (OTHER, -1.2), OTHER),
    ],
)
def test_the_better_attempt_is_taken(engine, clips, say, first, second, text):
    say(first, second)
    assert transcribe(engine, clips[3]).text == text


def test_the_second_attempt_does_not_encode_again(engine, clips, say, monkeypatch):
    say((OTHER, -1.5), (GOOD, -0.5))
    with spied(monkeypatch, "encode") as calls:
        transcribe(engine, clips[3])
    assert len(calls) == 1


def test_without_thresholds_nothing_looks_wrong(engine, clips, say):
    calls = say((REPETITIVE, -5.0, 0.99))
    options = dict.fromkeys(
        ("compression_ratio_threshold", "log_prob_threshold", "no_speech_threshold")
    )
    assert transcribe(engine, clips[3], **options).text == REPETITIVE.strip()
    assert len(calls) == 1


def test_what_is_improbable_and_no_speech_is_silence(engine, clips, say):
    before = engine.statistics().utterances.silent
    calls = say((GOOD, -1.5, 0.9))
    result = transcribe(engine, clips[3])
    assert (result.text, result.segments, result.language) == ("", (), "en")
    assert len(calls) == 1
    assert engine.statistics().utterances.silent == before + 1


def test_what_is_probable_is_no_silence_whatever_the_probability_of_no_speech(engine, clips, say):
    say((GOOD, -0.5, 0.9))
    assert transcribe(engine, clips[3]).text == GOOD


def test_an_empty_transcript_is_silence(engine, clips, say):
    say(("", -0.1))
    assert transcribe(engine, clips[3]).segments == ()


def test_an_error_of_the_second_attempt_leaves_the_first(engine, clips, say, monkeypatch):
    calls = say((OTHER, -1.5))  # and then an IndexError
    assert transcribe(engine, clips[3]).text == OTHER
    assert len(calls) == 1


def test_thresholds_force_second_attempts_that_give_the_same_every_time(engine, clips):
    audio = with_pauses(clips[3:9])
    before = engine.statistics().utterances
    texts = {
        transcribe(engine, audio, None, log_prob_threshold=0.0, no_speech_threshold=None).text
        for _ in range(3)
    }
    now = engine.statistics().utterances
    assert len(texts) == 1
    assert now.retried - before.retried == now.windows - before.windows > 0


def test_a_loop_ends_at_the_cap_of_tokens(engine, clips, monkeypatch):
    """Without an end of text the decoder never stops by itself."""
    before = engine.statistics().utterances
    with spied(monkeypatch, "generate") as calls:
        result = transcribe(engine, clips[3], suppress_tokens=[engine.model.tokenizer.eot])
    assert len(calls) == 2  # it was cut off, and so tried again
    [segment] = result.segments
    plan = make_plan(engine.model, UtteranceOptions())
    context = plan.context(len(clips[3]) // 160)
    assert len(segment.tokens) == plan.most_tokens(len(clips[3]) // 160, context) < 150
    assert engine.statistics().utterances.cut_off == before.cut_off + 1


def test_a_looping_window_does_not_change_the_others(engine, clips, manifest, monkeypatch):
    expected = [transcribe(engine, clip, None).text for clip in clips[:10]]
    eot = engine.model.tokenizer.eot
    with held(monkeypatch):
        futures = []
        for clip in clips[:10]:
            engine.transcribe_async(clip, "en", suppress_tokens=[eot])
            futures.append(engine.transcribe_async(clip))
    assert [future.result().text for future in futures] == expected


@pytest.fixture(scope="module")
def unbroken(clips, manifest):
    """Audio that is cut for its length."""
    return np.concatenate(
        [clip for clip, each in zip(clips, manifest, strict=True) if each["lang"] == "en"][:12]
    )


def prompts_of(calls):
    return [prompt for args, _ in calls for prompt in args[2]]


def test_a_window_cut_amid_speech_is_prompted_with_what_came_before(engine, unbroken, monkeypatch):
    with spied(monkeypatch, "generate") as calls:
        result = transcribe(engine, unbroken, vad=False)
    tokenizer = engine.model.tokenizer
    prompts = prompts_of(calls)
    assert len(prompts) == len(result.segments) >= 2
    assert tokenizer.sot_prev not in prompts[0]
    for prompt, before in zip(prompts[1:], result.segments[:-1], strict=True):
        assert prompt[0] == tokenizer.sot_prev
        previous = prompt[1 : prompt.index(tokenizer.sot)]
        assert 0 < len(previous) <= engine.model.capabilities.max_prompt_tokens
        assert previous == before.tokens[len(before.tokens) - len(previous) :]


def test_no_window_is_prompted_if_that_is_not_wanted(engine, unbroken, monkeypatch):
    with spied(monkeypatch, "generate") as calls:
        transcribe(engine, unbroken, vad=False, condition_on_previous_text=False)
    assert all(engine.model.tokenizer.sot_prev not in prompt for prompt in prompts_of(calls))


def test_no_window_after_a_pause_is_prompted(engine, clips, monkeypatch):
    with spied(monkeypatch, "generate") as calls:
        transcribe(engine, with_pauses(clips[3:6]))
    assert all(engine.model.tokenizer.sot_prev not in prompt for prompt in prompts_of(calls))


def test_an_initial_prompt_is_before_every_window(engine, clips, monkeypatch):
    tokenizer = engine.model.tokenizer
    with spied(monkeypatch, "generate") as calls:
        transcribe(engine, with_pauses(clips[3:6]), initial_prompt="Robert. ")
    expected = [tokenizer.sot_prev, *tokenizer.encode(" Robert.")]
    assert all(prompt[: len(expected)] == expected for prompt in prompts_of(calls))


@pytest.mark.parametrize("prompt", ["", "   ", None])
def test_an_empty_prompt_is_none(engine, clips, monkeypatch, prompt):
    with spied(monkeypatch, "generate") as calls:
        transcribe(engine, clips[3], initial_prompt=prompt)
    assert engine.model.tokenizer.sot_prev not in prompts_of(calls)[0]


def test_a_prompt_that_is_too_long_is_cut_with_a_warning(engine, clips, monkeypatch):
    with spied(monkeypatch, "generate") as calls:
        result = transcribe(engine, clips[3], initial_prompt="Call Robert today. " * 50)
    [prompt] = prompts_of(calls)
    assert prompt.index(engine.model.tokenizer.sot) == 13
    assert "12 tokens" in result.warnings[0]


def test_translation_is_asked_for(engine, clips, manifest, monkeypatch):
    with spied(monkeypatch, "generate") as calls:
        result = transcribe(engine, clips[2], "de", task="translate")
    assert engine.model.tokenizer.translate in prompts_of(calls)[0]
    assert result.text == manifest[2]["english"]


def plan_for(engine, **options):
    return make_plan(engine.model, UtteranceOptions(**options))


def test_contexts_are_few_and_hold_the_window_and_its_margin(engine):
    plan = plan_for(engine)
    contexts = plan.contexts
    for frames in range(1, 1001):
        assert frames + plan.margin_frames <= plan.context(frames) in contexts
    assert len(contexts) <= 10
    # CTranslate2 takes encoder frames of this number for raw features.
    assert not {80, 128} & {context // 2 for context in contexts}
    assert plan_for(engine, audio_context="full").contexts == (WINDOW_FRAMES,)


def test_an_undeclared_model_is_given_a_floor_and_a_margin(engine):
    stock = SimpleNamespace(
        tokenizer=engine.model.tokenizer, capabilities=Capabilities(), is_multilingual=True
    )
    assert make_plan(stock, UtteranceOptions()).context(100) == WINDOW_FRAMES
    reduced = make_plan(stock, UtteranceOptions(audio_context="auto"))
    assert reduced.context(100) == 1000
    assert reduced.context(1000) == 1200
    assert not reduced.retry().reduced_context
    assert reduced.segmentation.max_window_s == 28


def test_an_english_only_model_warns_of_other_languages(engine):
    english = SimpleNamespace(
        tokenizer=engine.model.tokenizer, capabilities=Capabilities(), is_multilingual=False
    )
    plan = make_plan(english, UtteranceOptions(language="de", task="translate"))
    assert plan.language == "en"
    assert len(plan.warnings) == 2


def test_longer_windows_may_have_more_tokens(engine):
    for context in ("full", "auto"):
        plan = plan_for(engine, audio_context=context)
        caps = [plan.most_tokens(n, plan.context(n)) for n in range(1, 1000)]
        assert caps == sorted(caps)
        assert all(cap <= 224 for cap in caps)
        # Far beyond the fastest speech.
        assert all(cap >= 20 * n / 100 for n, cap in enumerate(caps, start=1))


@pytest.mark.parametrize("n_previous", [0, 1, 11, 12, 13, 500])
def test_prompts_have_few_lengths_and_room_in_the_model(engine, n_previous):
    previous = list(range(n_previous))
    prompt = plan_for(engine).prompt(previous)
    assert len(prompt) in (0, 12)
    assert list(prompt) == previous[n_previous - len(prompt) :]
    initial = plan_for(engine, initial_prompt="Robert")
    assert len(initial.prompt(previous)) <= 12


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("language", 3),
        ("language", "xx"),
        ("language", ["en"]),
        ("task", "sing"),
        ("task", None),
        ("task", ["transcribe"]),
        ("initial_prompt", 3),
        ("initial_prompt", "\ud800"),
        ("beam_size", 0),
        ("beam_size", 1.5),
        ("beam_size", True),
        ("beam_size", "5"),
        ("patience", float("nan")),
        ("patience", 0.01),
        ("length_penalty", None),
        ("repetition_penalty", 0),
        ("no_repeat_ngram_size", -1),
        ("suppress_blank", 1),
        ("suppress_tokens", "1"),
        ("suppress_tokens", 7),
        ("suppress_tokens", [[1]]),
        ("suppress_tokens", [10**9]),
        ("suppress_tokens", [1.5]),
        ("compression_ratio_threshold", "2"),
        ("log_prob_threshold", float("nan")),
        ("no_speech_threshold", True),
        ("condition_on_previous_text", None),
        ("vad", 0),
        ("vad_threshold", None),
        ("vad_threshold", 1.5),
        ("endpoint_s", 0.0),
        ("endpoint_s", None),
        ("min_speech_s", -1),
        ("audio_context", "half"),
        ("audio_context", ["full"]),
        ("audio_context", np.zeros(2)),
    ],
)
def test_an_option_that_cannot_be_is_named(engine, clips, option, value):
    before = engine.statistics().requests
    name = "text" if str(value) == "\ud800" else option
    with pytest.raises(OptionError, match=name):
        engine.transcribe_async(clips[3], **{option: value})
    assert engine.statistics().requests == before


def final(text, language="en"):
    cut = WindowCut(0, 1, 0, 1, "end", False)
    segment = text if text is None else Segment(1, 0, 0, 1, text, [], 0, 0, 0, None, 0)
    return Final(segment, language, 1.0, cut)


def test_texts_are_joined_as_their_language_does():
    finals = [final(" One."), final(None), final(" "), final(" Two.")]
    assert reduce(add_text, finals, "") == "One. Two."
    assert reduce(add_text, [final("一。", "zh"), final("二。", "zh")], "") == "一。二。"


class Watched:
    """An utterance, and what it tells."""

    def __init__(self, engine, **options):
        self.told = []
        self.over = threading.Event()
        self.utterance = Utterance(
            engine._pipeline,
            plan_for(engine, language="en", **options),
            on_final=lambda final: self.told.append(final.cut.start),
            on_settled=lambda: (self.told.append("settled"), self.over.set()),
            on_failed=lambda error: (self.told.append(error), self.over.set()),
        )

    def add(self, clip, start):
        cut = WindowCut(start, start + len(clip), start, start + len(clip), "endpoint", False)
        self.utterance.add(cut, clip)


def test_finals_come_in_order_whatever_the_order_of_the_model(clips, monkeypatch):
    """The first window waits at one worker of the model while another does the others."""
    with PerformanceOptimizedSTT(OptimizationConfig(model_workers=2), device="cpu") as engine:
        watched = Watched(engine)
        with held(monkeypatch, first=1) as gate:
            watched.add(clips[0], 0)
            assert gate.reached.wait(60)
            for start in range(1, 9):
                watched.add(clips[start], start)
            watched.utterance.finish()
            eventually(lambda: watched.utterance.timings.text > 0)
            assert watched.told == []
        assert watched.over.wait(60)
        assert watched.told == [*range(9), "settled"]


def test_an_utterance_without_windows_settles(engine):
    watched = Watched(engine)
    watched.utterance.finish()
    assert watched.told == ["settled"]


def test_a_window_of_less_than_a_frame_is_nothing(engine, clips):
    watched = Watched(engine)
    watched.add(clips[0][:159], 0)
    assert watched.utterance.in_flight == 0
    watched.utterance.finish()
    assert watched.told == ["settled"]


def test_nothing_is_told_after_a_cancel_and_nothing_is_held(engine, clips, monkeypatch):
    watched = Watched(engine)
    with held(monkeypatch) as gate:
        for start in range(6):
            watched.add(clips[start], start)
        watched.utterance.finish()
        assert gate.reached.wait(60)
        watched.utterance.cancel()
        assert watched.utterance.in_flight == 0
        watched.add(clips[0], 7)
        assert watched.utterance.in_flight == 0
    assert_at_rest(engine)
    assert watched.told == []


def test_a_failure_comes_once_and_last(engine, clips, monkeypatch):
    watched = Watched(engine)
    with monkeypatch.context() as patch:
        patch.setattr(Model, "encode", lambda *_: 1 / 0)
        for start in range(6):
            watched.add(clips[start], start)
        assert watched.over.wait(60)
        assert_at_rest(engine)
    [error] = watched.told
    assert "division" in str(error)


def test_a_callback_that_raises_is_logged_and_the_rest_goes_on(engine, clips, caplog):
    watched = Watched(engine)
    watched.utterance._on_final = lambda final: 1 / 0
    for start in range(3):
        watched.add(clips[start], start)
    watched.utterance.finish()
    assert watched.over.wait(60)
    assert watched.told == ["settled"]
    assert caplog.text.count("a callback of an utterance failed") == 3
