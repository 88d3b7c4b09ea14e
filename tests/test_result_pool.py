"""The pool of transcription results: records, their lists, and what may go into them."""

import math
from unittest.mock import ANY

import pytest

from speechrnt.errors import HandleError, OptionError
from speechrnt.pools import (
    ResultSegment,
    TranscriptionResultPool,
)


class TestTranscriptionResultPool:
    def test_a_result_holds_what_it_is_given(self):
        pool = TranscriptionResultPool()
        with pool.acquire() as result:
            result.text = "Grüße, 世界"
            result.tokens = range(5)
            result.add_segment(0.5, 1.25, 1, 3, avg_logprob=-0.25, no_speech_prob=0.125)
            result.add_segment(1.25, 1.25)
            result.language = "de"
            result.confidence = 0.5
            result.span = 10, 12.5
            result.timings = 0.25, 0.5
            result.is_final = True
            assert result.text == "Grüße, 世界"
            assert result.tokens == [0, 1, 2, 3, 4]
            assert result.segments[0][:6] == (0.5, 1.25, 1, 3, -0.25, 0.125)
            assert math.isnan(result.segments[0].compression_ratio)
            assert result.segments[0].seek == 0
            assert result.segments[1][:4] == (1.25, 1.25, 0, 0)
            assert result.language == "de"
            assert result.confidence == 0.5
            assert result.span == (10.0, 12.5)
            assert result.timings == (0.25, 0.5)
            assert result.is_final is True

    def test_what_is_appended_is_kept_to_the_bit(self):
        parts = [
            (" Grüße.", [50364, 7, 11], 0.1, 14_399.9, {"seek": 1_439_990, "avg_logprob": -1 / 3}),
            ("", [], 14_399.9, 14_399.9, {}),
            (" 世界" * 500, range(4000), 0, 1e-9, {"no_speech_prob": 1 / 3}),
            (" Ende.", [2**31 - 1], 1, 2, {"compression_ratio": 2.4}),
        ]
        with TranscriptionResultPool().acquire() as result:
            for text, tokens, start, end, more in parts:
                result.append(text, tokens, start, end, **more)
            assert result.text == "".join(text for text, *_ in parts)
            tokens = result.tokens
            for (_, ids, start, end, more), segment in zip(parts, result.segments, strict=True):
                first = segment.first_token
                assert tokens[first : first + segment.n_tokens] == list(ids)
                assert (segment.start, segment.end) == (start, end)
                for name, value in more.items():
                    assert getattr(segment, name) == value
            assert result.segments[1] == ResultSegment(14_399.9, 14_399.9, 3, 0, *[ANY] * 3, 0)

    @pytest.mark.parametrize(
        ("arguments", "error"),
        [
            (("\ud800", [1], 0, 1), UnicodeEncodeError),
            ((None, [1], 0, 1), TypeError),
            (("text", [2**31], 0, 1), OverflowError),
            (("text", 5, 0, 1), TypeError),
            (("text", [1], 2, 1), OptionError),
            (("text", [1], math.nan, 1), OptionError),
        ],
    )
    def test_what_cannot_be_appended_changes_nothing(self, arguments, error):
        with TranscriptionResultPool().acquire() as result:
            result.append("text", [1, 2], 0, 1)
            before = result.text, result.tokens, len(result.segments)
            with pytest.raises(error):
                result.append(*arguments)
            assert (result.text, result.tokens, len(result.segments)) == before

    def test_the_next_one_starts_empty(self):
        pool = TranscriptionResultPool()
        with pool.acquire() as result:
            self.test_a_result_holds_what_it_is_given()
            result.text = "old"
            result.tokens = [1]
            result.add_segment(0, 1)
            result.language = "xx"
            result.confidence = 1
            result.is_final = True
        with pool.acquire() as result:
            assert (result.text, result.tokens, result.segments) == ("", [], [])
            assert (result.language, result.confidence, result.is_final) == (None, None, False)
            assert (result.span, result.timings) == ((0.0, 0.0), (0.0, 0.0))
        assert pool.statistics().misses == 1

    def test_what_was_read_outlives_the_lease(self):
        pool = TranscriptionResultPool()
        with pool.acquire() as result:
            result.text, result.tokens = "first", [1, 2]
            text, tokens = result.text, result.tokens
        with pool.acquire() as result:
            result.text, result.tokens = "other", [3, 4]
        assert (text, tokens) == ("first", [1, 2])

    @pytest.mark.parametrize(
        ("name", "value", "error"),
        [
            ("text", None, TypeError),
            ("text", b"bytes", TypeError),
            ("text", "\ud800", UnicodeEncodeError),
            ("tokens", [1, 2**31], OverflowError),
            ("tokens", [1, "2"], TypeError),
            ("tokens", 5, TypeError),
            ("language", "a language with a long name", OptionError),
            ("language", "e\0n", OptionError),
            ("language", 5, TypeError),
            ("confidence", 1.5, OptionError),
            ("confidence", -0.1, OptionError),
            ("confidence", "sure", TypeError),
            ("span", (2, 1), OptionError),
            ("span", (-1, 1), OptionError),
            ("span", (math.nan, 1), OptionError),
            ("span", 5, TypeError),
            ("timings", (-1, 1), OptionError),
            ("timings", (0, math.nan), OptionError),
        ],
    )
    def test_bad_values_change_nothing(self, name, value, error):
        with TranscriptionResultPool().acquire() as result:
            result.text, result.tokens = "text", [1, 2]
            result.language, result.confidence = "en", 0.5
            result.span, result.timings = (1, 2), (3, 4)
            before = getattr(result, name)
            with pytest.raises(error):
                setattr(result, name, value)
            assert getattr(result, name) == before

    @pytest.mark.parametrize(
        "segment",
        [(2, 1), (-1, 1), (math.nan, 1), (0, 1, 0, 4), (0, 1, -1, 1), (0, 1, 0, -1), (0, 1, 4, 0)],
    )
    def test_bad_segment(self, segment):
        with TranscriptionResultPool().acquire() as result:
            result.tokens = [1, 2, 3]
            with pytest.raises(OptionError):
                result.add_segment(*segment)
            assert result.segments == []

    def test_everything_after_release(self):
        result = TranscriptionResultPool().acquire()
        result.release()
        names = ["text", "tokens", "segments", "language", "confidence", "is_final", "span"]
        for name in [*names, "timings"]:
            with pytest.raises(HandleError):
                getattr(result, name)
        with pytest.raises(HandleError):
            result.text = "late"
        with pytest.raises(HandleError):
            result.tokens = [1]
        with pytest.raises(HandleError):
            result.add_segment(0, 1)
        with pytest.raises(HandleError):
            result.append("late", [1], 0, 1)

    def test_long_results(self):
        pool = TranscriptionResultPool()
        for _ in range(2):
            with pool.acquire() as result:
                result.text = "x" * 10**6
                result.tokens = range(10**5)
                for i in range(10**4):
                    result.add_segment(i, i + 1)
                assert len(result.text) == 10**6
                assert result.tokens[-1] == 10**5 - 1
                assert result.segments[-1].end == 10**4
