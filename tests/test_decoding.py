"""Prompts, scores and timestamps, on token ids made by hand."""

import zlib
from types import SimpleNamespace

import numpy as np
import pytest

from speechrnt.decoding import (
    MAX_PROMPT_TOKENS,
    build_prompt,
    compression_ratio,
    max_new_tokens,
    parse_result,
    search_arguments,
    split_by_timestamps,
)
from speechrnt.hub import EMBEDDED_MODELS
from speechrnt.models import load_model

T0 = 1000  # <|0.00|> in the hand-made transcripts


@pytest.fixture(scope="module")
def model():
    return load_model(EMBEDDED_MODELS["pico"], "cpu")


@pytest.fixture(scope="module")
def tokenizer(model):
    return model.tokenizer


class TestBuildPrompt:
    def build(self, tokenizer, previous=(), **options):
        arguments = {"without_timestamps": False, **options}
        return build_prompt(tokenizer, "de", "translate", list(previous), **arguments)

    def sequence(self, tokenizer):
        return tokenizer.sot_sequence("de", "translate")

    def test_nothing_before(self, tokenizer):
        assert self.build(tokenizer) == self.sequence(tokenizer)

    def test_previous_text_is_introduced(self, tokenizer):
        expected = [tokenizer.sot_prev, 5, 6, *self.sequence(tokenizer)]
        assert self.build(tokenizer, [5, 6]) == expected

    def test_the_end_of_a_long_text_is_kept(self, tokenizer):
        prompt = self.build(tokenizer, range(500))
        assert prompt[1 : MAX_PROMPT_TOKENS + 1] == list(range(500 - MAX_PROMPT_TOKENS, 500))
        assert len(prompt) == 1 + MAX_PROMPT_TOKENS + 3

    @pytest.mark.parametrize("most", [0, 1, 12])
    def test_fewer_tokens_on_request(self, tokenizer, most):
        prompt = self.build(tokenizer, range(500), max_prompt_tokens=most)
        before = prompt[: -len(self.sequence(tokenizer))]
        assert before == ([tokenizer.sot_prev, *range(500 - most, 500)] if most else [])

    def test_no_timestamps_comes_last(self, tokenizer):
        assert self.build(tokenizer, without_timestamps=True)[-1] == tokenizer.no_timestamps


class TestSearchArguments:
    def test_temperature_zero_is_beam_search(self):
        assert search_arguments(0.0, 5, 2.0, 3) == {"beam_size": 5, "patience": 2.0}

    def test_other_temperatures_sample_the_best_of_several(self):
        arguments = search_arguments(0.4, 5, 2.0, 3)
        assert arguments["sampling_temperature"] == 0.4
        assert (arguments["beam_size"], arguments["num_hypotheses"]) == (1, 3)
        assert arguments["sampling_topk"] == 0


@pytest.mark.parametrize("text", ["a", "one two three", "no " * 50, "ä" * 30])
def test_compression_ratio(text):
    encoded = text.encode()
    assert compression_ratio(text) == len(encoded) / len(zlib.compress(encoded))


def test_compression_ratio_of_nothing_is_zero():
    assert compression_ratio("") == 0


class TestParseResult:
    def parse(self, tokenizer, tokens, score, length_penalty=1.0, prompt_length=3):
        raw = SimpleNamespace(sequences_ids=[tokens], scores=[score], no_speech_prob=0.25)
        return parse_result(raw, tokenizer, prompt_length, 0.0, length_penalty)

    def test_the_end_of_text_counts_in_the_average(self, tokenizer):
        # Four tokens with a mean of -1.5 have a sum of -6, which five tokens share.
        assert self.parse(tokenizer, [1, 2, 3, 4], -1.5).avg_logprob == pytest.approx(-6 / 5)

    def test_length_penalty_is_undone(self, tokenizer):
        result = self.parse(tokenizer, [1, 2, 3, 4], -3.0, length_penalty=0.5)
        assert result.avg_logprob == pytest.approx(-3 * 4**0.5 / 5)

    def test_an_empty_transcript(self, tokenizer):
        result = self.parse(tokenizer, [], -0.5)
        assert (result.text, result.avg_logprob, result.compression_ratio) == ("", 0.0, 0.0)

    def test_an_empty_transcript_with_a_negative_penalty_is_not_trusted(self, tokenizer):
        assert self.parse(tokenizer, [], -0.0, length_penalty=-1.0).avg_logprob == -np.inf

    @pytest.mark.parametrize(("prompt_length", "limit"), [(3, 224), (228, 221)])
    def test_cut_off_at_the_limit(self, tokenizer, prompt_length, limit):
        options = {"prompt_length": prompt_length}
        assert self.parse(tokenizer, [1] * limit, -1.0, **options).is_cut_off
        assert not self.parse(tokenizer, [1] * (limit - 1), -1.0, **options).is_cut_off


@pytest.mark.parametrize("length", [3, 4, 100, 224, 225, 226, 227, 228, 300])
def test_max_new_tokens_is_where_ctranslate2_stops(model, tokenizer, length):
    encoding = model.encode(np.zeros((1, 80, 100), dtype=np.float32))
    sequence = tokenizer.sot_sequence("en", "transcribe")
    before = [tokenizer.sot_prev, *[5] * (length - len(sequence) - 1)][: length - len(sequence)]
    [result] = model.generate(
        encoding, [before + sequence], beam_size=1, suppress_tokens=[tokenizer.eot]
    )
    assert len(result.sequences_ids[0]) == max_new_tokens(length)


def at(seconds):
    return T0 + round(seconds * 50)


class TestSplitByTimestamps:
    def split(self, *tokens, frames=3000):
        slices, advance = split_by_timestamps(list(tokens), T0, frames, frames / 100)
        return [(round(s.start, 2), round(s.end, 2), s.tokens) for s in slices], advance

    def test_no_timestamps(self):
        assert self.split(1, 2, frames=700) == ([(0, 7.0, [1, 2])], 700)

    def test_only_the_first_timestamp(self):
        tokens = [at(0), 1, 2]
        assert self.split(*tokens, frames=700) == ([(0, 7.0, tokens)], 700)

    def test_first_and_last(self):
        tokens = [at(0), 1, 2, at(3.2)]
        assert self.split(*tokens) == ([(0, 3.2, tokens)], 3000)

    def test_ends_in_a_pair_so_the_next_window_starts_there(self):
        first, second = [at(0.4), 1, at(2)], [at(2.5), 2, 3, at(4)]
        # The lone timestamp that opens an unfinished segment is dropped.
        slices, advance = self.split(*first, *second, at(4))
        assert slices == [(0.4, 2.0, first), (2.5, 4.0, second)]
        assert advance == 400

    def test_unfinished_tail_is_left_to_the_next_window(self):
        first = [at(0), 1, at(2)]
        slices, advance = self.split(*first, at(2), 5, 6)
        assert (slices, advance) == ([(0, 2.0, first)], 200)

    def test_ends_in_one_timestamp_so_the_window_is_done(self):
        first, second = [at(0), 1, at(2)], [at(2), 2, at(5)]
        slices, advance = self.split(*first, *second, frames=800)
        assert (slices, advance) == ([(0, 2.0, first), (2.0, 5.0, second)], 800)

    def test_nothing(self):
        assert self.split() == ([(0, 30.0, [])], 3000)
