"""The sequential algorithm's fallback and memory, with a decoder that says what it is told."""

from types import SimpleNamespace

import numpy as np
import pytest

from speechrnt.callers import Caller, CallerDispatcher
from speechrnt.decoding import MAX_LENGTH, MAX_PROMPT_TOKENS
from speechrnt.features import FullContextWindows, ReducedContextWindows
from speechrnt.hub import EMBEDDED_MODELS
from speechrnt.mel_frames import MelFrames
from speechrnt.models import Capabilities, load_model
from speechrnt.sequential import SequentialDecoder

REPETITIVE, VARIED = "no " * 60, "Turn on the kitchen lights."


class Script:
    """A model whose decoder gives, call after call, texts and log probabilities from a list."""

    name, n_mels, shape = "script", 80, None
    whisper = SimpleNamespace(device="cpu", num_workers=1)

    def __init__(self, tokenizer, *results):
        self.tokenizer = tokenizer
        self.capabilities = Capabilities()
        self.results = list(results)
        self.prompts = []
        self.temperatures = []

    def check_process(self):
        pass

    def fitting_batch(self, wanted, frames):
        return wanted

    def encode(self, features):
        return features

    def generate(self, encoding, prompts, **options):
        self.prompts += prompts
        self.temperatures.append(options.get("sampling_temperature", 0.0))
        text, logprob = self.results.pop(0)
        tokens = self.tokenizer.encode(text)
        score = logprob * (len(tokens) + 1) / len(tokens)
        return [SimpleNamespace(sequences_ids=[tokens], scores=[score], no_speech_prob=0.0)]


class Timed(Script):
    """One that places the text of every window between two times of 20 ms."""

    def __init__(self, tokenizer, start, end, texts):
        super().__init__(tokenizer, *[(text, -0.1) for text in texts])
        self.times = start, end

    def generate(self, *arguments, **options):
        [result] = super().generate(*arguments, **options)
        start, end = (self.tokenizer.timestamp_begin + time for time in self.times)
        tokens = [start, *result.sequences_ids[0], end, end]
        return [SimpleNamespace(sequences_ids=[tokens], scores=[-0.1], no_speech_prob=0.0)]


@pytest.fixture(scope="module")
def tokenizer():
    return load_model(EMBEDDED_MODELS["pico"], "cpu").tokenizer


def options(**changes):
    return SimpleNamespace(
        **{
            "beam_size": 5,
            "best_of": 5,
            "patience": 1,
            "length_penalty": 1,
            "repetition_penalty": 1,
            "no_repeat_ngram_size": 0,
            "log_prob_threshold": -1.0,
            "no_speech_threshold": 0.6,
            "compression_ratio_threshold": 2.4,
            "condition_on_previous_text": True,
            "prompt_reset_on_temperature": 0.5,
            "temperatures": (0.0, 0.2, 0.4),
            "initial_prompt": None,
            "suppress_blank": True,
            "suppress_tokens": (),
            "without_timestamps": False,
            "max_initial_timestamp": 1.0,
            "word_timestamps": False,
            "multilingual": False,
            "prefix": None,
            "hotwords": None,
            "max_new_tokens": None,
            "hallucination_silence_threshold": None,
            **changes,
        }
    )


def caller_of(model):
    return Caller(CallerDispatcher(model))


def run(model, windows=1, **changes):
    features = np.zeros((80, windows * 3000 + 1), dtype=np.float32)
    decoder = SequentialDecoder(
        caller_of(model), FullContextWindows(features), options(**changes), "transcribe", False
    )
    return list(decoder.segments("en", lambda seconds: None))


def test_the_first_good_transcript_is_taken(tokenizer):
    model = Script(tokenizer, (REPETITIVE, -0.1), (VARIED, -0.5))
    [segment] = run(model)
    assert (segment.text, segment.temperature) == (VARIED, 0.2)
    assert model.temperatures == [0.0, 0.2]


def test_of_bad_transcripts_the_most_probable_is_taken(tokenizer):
    model = Script(tokenizer, ("One.", -1.5), ("Two.", -1.2), ("Three.", -1.4))
    [segment] = run(model)
    assert segment.text == "Two."
    assert segment.avg_logprob == pytest.approx(-1.2)
    # It counts as the last one where it comes to forgetting.
    assert segment.temperature == 0.4


def test_an_improbable_transcript_is_better_than_a_repetitive_one(tokenizer):
    model = Script(tokenizer, (REPETITIVE, -0.1), (VARIED, -3.0), (REPETITIVE, -0.2))
    [segment] = run(model)
    assert segment.text == VARIED


def test_of_repetitive_transcripts_the_most_probable_is_taken(tokenizer):
    model = Script(tokenizer, (REPETITIVE, -0.3), (REPETITIVE + "Yes.", -0.1), (REPETITIVE, -0.2))
    [segment] = run(model)
    assert segment.text.endswith("Yes.")


@pytest.mark.parametrize(("threshold", "remembered"), [(0.1, False), (0.2, True), (0.3, True)])
def test_the_transcript_is_forgotten_above_the_reset_temperature(tokenizer, threshold, remembered):
    model = Script(tokenizer, (REPETITIVE, -0.1), (VARIED, -0.5), ("Two.", -0.1))
    run(model, windows=2, prompt_reset_on_temperature=threshold)
    assert (tokenizer.sot_prev in model.prompts[-1]) is remembered


def test_the_transcript_of_earlier_windows_is_the_prompt(tokenizer):
    model = Script(tokenizer, ("One.", -0.1), ("Two.", -0.1), ("Three.", -0.1))
    segments = run(model, windows=3)
    assert [segment.seek for segment in segments] == [0, 3000, 6000]
    sequence = tokenizer.sot_sequence("en", "transcribe")
    said = [token for segment in segments[:2] for token in segment.tokens]
    assert model.prompts[2] == [tokenizer.sot_prev, *said, *sequence]


def test_prompts_keep_to_their_limit(tokenizer):
    model = Script(tokenizer, (VARIED, -0.1))
    run(model, initial_prompt=[5] * 1000)
    assert len(model.prompts[0]) == 1 + MAX_PROMPT_TOKENS + 3


def test_long_hotwords_leave_room_for_the_transcript(tokenizer):
    """faster-whisper's prompt outgrows the decoder here, and CTranslate2 raises an error."""
    model = Script(tokenizer, (VARIED, -0.1))
    run(model, initial_prompt=[5] * 1000, hotwords="alarm kitchen " * 200)
    [prompt] = model.prompts
    assert len(prompt) == MAX_LENGTH - 128
    hotwords = tokenizer.encode(" " + ("alarm kitchen " * 200).strip())[:MAX_PROMPT_TOKENS]
    assert prompt[1 : 1 + MAX_PROMPT_TOKENS] == hotwords
    assert 5 in prompt


def test_earlier_text_makes_room_for_the_tokens_asked_for(tokenizer):
    model = Script(tokenizer, (VARIED, -0.1))
    run(model, initial_prompt=[5] * 1000, max_new_tokens=400)
    assert len(model.prompts[0]) == MAX_LENGTH - 400


def test_hotwords_stand_before_every_window_and_a_prefix_in_the_first(tokenizer):
    model = Script(tokenizer, *[("Seven.", -0.1)] * 3)
    run(model, windows=3, hotwords="alarm", prefix="Turn", condition_on_previous_text=False)
    sequence = tokenizer.sot_sequence("en", "transcribe")
    hotwords = [tokenizer.sot_prev, *tokenizer.encode(" alarm")]
    first = [*sequence, tokenizer.timestamp_begin, *tokenizer.encode(" Turn")]
    assert model.prompts == [first, hotwords + sequence, hotwords + sequence]


def test_times_beyond_a_short_window_do_not_skip_audio(tokenizer):
    """faster-whisper goes on where the last timestamp is, even if the window ended before."""
    model = Timed(tokenizer, 0, 600, ["Seven."] * 3)
    features = np.zeros((80, 3001), dtype=np.float32)
    windows = FullContextWindows(features, 1000)
    decoder = SequentialDecoder(caller_of(model), windows, options(), "transcribe", False)
    segments = list(decoder.segments("en", lambda seconds: None))
    assert [segment.seek for segment in segments] == [0, 1000, 2000]


def test_times_are_kept_within_the_recording_not_within_the_window(tokenizer):
    """In a short context, a model may well place a time in the margin."""
    model = Timed(tokenizer, 0, 750, ["Seven."] * 3)
    samples = np.zeros(25 * 16_000, dtype=np.float32)
    blocks = (samples[start : start + 16_000] for start in range(0, len(samples), 16_000))
    windows = ReducedContextWindows(MelFrames(blocks, 80), longest_s=10.0, margin_s=0.5)
    decoder = SequentialDecoder(caller_of(model), windows, options(), "transcribe", True)
    segments = list(decoder.segments("en", lambda seconds: None))
    starts = [segment.seek / 100 for segment in segments]
    assert len(starts) == 3
    assert 19 < starts[2] <= 20
    for segment, start in zip(segments, starts, strict=True):
        assert segment.end == pytest.approx(min(start + 15, 25.0))
