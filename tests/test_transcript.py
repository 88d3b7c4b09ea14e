"""What an utterance says, collected in a record of the pool and read from it again."""

import math
import threading

import pytest

from speechrnt import load_model
from speechrnt.latency import StageTimings
from speechrnt.pools import TranscriptionResultPool
from speechrnt.results import Segment
from speechrnt.segmentation import WindowCut
from speechrnt.transcript import Transcript
from speechrnt.utterance import Final

HOUR = 3600 * 16_000


@pytest.fixture(scope="module")
def tokenizer():
    return load_model(device="cpu", cpu_threads=1).tokenizer


@pytest.fixture
def pool():
    pool = TranscriptionResultPool()
    yield pool
    assert pool.statistics().in_use == 0


def final(tokenizer, text, number=1, language="en", probability=1.0, start=0, end=16_000):
    segment = None
    if text is not None:
        tokens = tokenizer.encode(text)
        segment = Segment(
            id=number,
            seek=start // 160,
            start=start / 16_000,
            end=end / 16_000,
            text=tokenizer.decode(tokens),
            tokens=tokens,
            avg_logprob=-1 / 3,
            compression_ratio=math.pi,
            no_speech_prob=1e-9,
            words=None,
            temperature=0.0,
        )
    return Final(segment, language, probability, WindowCut(start, end, start, end, "end", False))


def finish(transcript, language=None):
    return transcript.finish(language, 1.5, StageTimings(total=2.0), ("odd",))


def test_segments_come_back_as_they_were(pool, tokenizer):
    transcript = Transcript(pool, tokenizer)
    finals = [
        final(tokenizer, " Call Robert today.", 1, start=160 * 7, end=16_001),
        final(tokenizer, " Turn on the lights.", 2, start=4 * HOUR + 1, end=4 * HOUR + 16_003),
    ]
    for each in (finals[0], final(tokenizer, None), finals[1]):
        transcript.add(each)
    assert transcript.n_finals == 3
    got = finish(transcript)
    transcript.release()
    assert got.segments == tuple(each.segment for each in finals)
    assert got.text == "Call Robert today. Turn on the lights."
    assert (got.duration, got.timings.total, got.warnings) == (1.5, 2.0, ("odd",))


def test_a_record_is_taken_with_the_first_word(pool, tokenizer):
    transcript = Transcript(pool, tokenizer)
    transcript.add(final(tokenizer, None))
    assert pool.statistics().in_use == 0
    got = finish(transcript)
    assert (got.text, got.segments, got.language) == ("", (), "en")
    transcript.add(final(tokenizer, " One."))
    transcript.add(final(tokenizer, " Two."))
    assert pool.statistics().in_use == 1
    transcript.release()
    transcript.release()
    assert pool.statistics().in_use == 0
    transcript.add(final(tokenizer, " late"))
    assert pool.statistics().in_use == 0


def test_scripts_without_spaces_are_joined_without(pool, tokenizer):
    transcript = Transcript(pool, tokenizer)
    for text in ("一。", " 二。"):
        transcript.add(final(tokenizer, text, language="zh"))
    assert finish(transcript).text == "一。二。"
    transcript.release()


@pytest.mark.parametrize(("given", "language", "probability"), [(None, "", 0.0), ("de", "de", 1.0)])
def test_without_windows_the_language_is_the_one_given(
    pool, tokenizer, given, language, probability
):
    got = finish(Transcript(pool, tokenizer), given)
    assert (got.language, got.language_probability) == (language, probability)


def test_the_language_is_that_of_the_most_audio(pool, tokenizer):
    transcript = Transcript(pool, tokenizer)
    for language, probability, length in [("en", 0.9, 3), ("de", 0.6, 2), ("de", 0.7, 2)]:
        transcript.add(final(tokenizer, None, 1, language, probability, 0, length))
    got = finish(transcript)
    assert (got.language, got.language_probability) == ("de", 0.7)


def test_releasing_while_another_thread_adds(pool, tokenizer):
    finals = [final(tokenizer, " One.") for _ in range(50)]
    for _ in range(50):
        transcript = Transcript(pool, tokenizer)
        thread = threading.Thread(target=lambda t=transcript: [t.add(each) for each in finals])
        thread.start()
        transcript.release()
        thread.join()
        assert pool.statistics().in_use == 0
