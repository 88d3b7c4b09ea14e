"""Words and their times against faster-whisper's, with a model that says anything."""

import dataclasses
import random
from dataclasses import asdict
from types import SimpleNamespace

import faster_whisper
import numpy as np
import pytest
from faster_whisper.tokenizer import Tokenizer as PeerTokenizer

import speechrnt
from speechrnt.callers import CallerDispatcher
from speechrnt.hub import EMBEDDED_MODELS
from speechrnt.results import Word
from speechrnt.words import AlignedWord, Passage, hallucination, merge_punctuation, split_words

PICO = str(EMBEDDED_MODELS["pico"])
RATE = 16000


@pytest.fixture(scope="module")
def both():
    return faster_whisper.WhisperModel(PICO, device="cpu"), speechrnt.WhisperModel(device="cpu")


class Anything:
    """A CTranslate2 model whose answers are random, but the same for the same questions.

    Its transcripts have timestamps in all orders and places, its alignments go forward.
    """

    n_mels = 80
    is_multilingual = True
    device = "cpu"
    compute_type = "int8"
    num_workers = 1

    def __init__(self, seed, tokenizer, max_calls):
        self.seed, self.tokenizer, self.max_calls = seed, tokenizer, max_calls
        self.calls = 0

    def dice(self, *question):
        self.calls += 1
        if self.calls > self.max_calls:
            raise TimeoutError("does not get on")
        return random.Random(repr((self.seed, question)))

    def encode(self, features, to_cpu=False):
        array = np.array(features)
        return SimpleNamespace(frames=int(np.count_nonzero(array.any(axis=(0, 1)))))

    def detect_language(self, encoding):
        # The peer detects the language from one frame more than it decodes.
        dice = self.dice("language", encoding.frames // 5)
        ranked = dice.sample(["en", "de", "fr", "es"], 4)
        return [[(f"<|{code}|>", 0.4 - i / 10) for i, code in enumerate(ranked)]]

    def generate(self, encoding, prompts, **options):
        dice = self.dice("text", prompts[0], options.get("sampling_temperature"))
        begin, end = self.tokenizer.timestamp_begin, encoding.frames // 2
        words = self.tokenizer.encode(" Turn on the “light”, ¿qué? Ja. (No) - 25!")
        tokens, times = [], sorted(dice.randint(0, end) for _ in range(dice.choice([0, 2, 4, 5])))
        for i, time in enumerate(times):
            if i % 2 or dice.random() < 0.9:
                tokens.append(begin + time)
            if not i % 2:
                tokens += [dice.choice(words) for _ in range(dice.choice([0, 1, 3, 9]))]
        if not times:
            tokens = [dice.choice(words) for _ in range(dice.randint(0, 9))]
        return [
            SimpleNamespace(
                sequences_ids=[tokens],
                scores=[-dice.random() * dice.choice([0.1, 2])],
                no_speech_prob=dice.random(),
            )
        ]

    def align(self, encoding, opening, texts, frames, median_filter_width):
        [text] = texts
        [frames] = frames if isinstance(frames, list) else [frames]
        dice = self.dice("times", text, opening)
        pairs, token, frame = [(0, 0)], 0, 0
        while token < len(text):
            step = dice.choice([(1, 0), (1, 1), (0, 1)])
            token += step[0]
            frame = min(frame + step[1] * dice.choice([1, 3, 20, 150]), max(frames // 2 - 1, 0))
            pairs.append((token, frame))
        probabilities = [dice.choice([0.01, 0.9]) * dice.random() for _ in text]
        return [SimpleNamespace(alignments=pairs, text_token_probs=probabilities)]


def transcribed(model, audio, **options):
    segments, info = model.transcribe(audio, **options)
    return [asdict(segment) for segment in segments], info.language


@pytest.fixture
def with_anything(both, monkeypatch):
    """A function that lets both sides transcribe with the same random model."""
    peer, ours = both
    monkeypatch.setattr(faster_whisper.transcribe, "get_ctranslate2_storage", lambda array: array)
    monkeypatch.setattr(
        speechrnt.models.ctranslate2, "StorageView", SimpleNamespace(from_array=lambda array: array)
    )
    real = ours._model

    def run(seed, audio, **options):
        fakes = [Anything(seed, real.tokenizer, max_calls) for max_calls in (400, 10_000)]
        monkeypatch.setattr(peer, "model", fakes[0])
        model = dataclasses.replace(real, whisper=fakes[1])
        monkeypatch.setattr(ours, "_model", model)
        monkeypatch.setattr(ours, "_dispatcher", CallerDispatcher(model))
        actual = transcribed(ours, audio, audio_context="full", **options)
        try:
            return transcribed(peer, audio, **options), actual
        except TimeoutError:
            return None, actual  # the peer stays where it is, for ever

    return run


@pytest.mark.parametrize("seed", range(60))
def test_the_same_as_the_peer_whatever_the_model_says(with_anything, seed):
    dice = random.Random(seed)
    audio = np.full(int(dice.choice([0.5, 4, 29.9, 30, 47, 95]) * RATE), 0.1, dtype=np.float32)
    options = {
        "word_timestamps": True,
        "temperature": 0.0,
        "language": dice.choice([None, "en"]),
        "multilingual": dice.random() < 0.3,
        "hallucination_silence_threshold": dice.choice([None, 0.1, 0.5, 2.0]),
        "no_speech_threshold": dice.choice([None, 0.95]),
        "condition_on_previous_text": dice.random() < 0.5,
        "clip_timestamps": dice.choice(["0", "0,1,1.5,3,3,40", "2.5"]),
    }
    expected, actual = with_anything(seed, audio, **options)
    assert actual == expected or expected is None


def test_the_random_model_reaches_the_rare_rules(with_anything, monkeypatch):
    """The test above would not find what it never comes to."""
    found = set()
    for name in ("hallucination", "leading_silence"):
        rule = getattr(speechrnt.sequential, name)

        def noted(*arguments, _name=name, _rule=rule):
            result = _rule(*arguments)
            if result is not None:
                found.add(_name)
            return result

        monkeypatch.setattr(speechrnt.sequential, name, noted)
    audio = np.full(47 * RATE, 0.1, dtype=np.float32)
    for seed in range(20):
        with_anything(seed, audio, word_timestamps=True, hallucination_silence_threshold=0.5)
    assert found == {"hallucination", "leading_silence"}


@pytest.mark.parametrize("language", ["en", "de", "zh", "th"])
def test_words_are_split_as_by_the_peer(both, language):
    peer, ours = both
    tokenizer = ours._model.tokenizer
    theirs = PeerTokenizer(peer.hf_tokenizer, True, task="transcribe", language=language)
    dice = random.Random(1)
    for _ in range(300):
        tokens = [dice.randrange(tokenizer.eot) for _ in range(dice.randint(0, 12))]
        tokens.append(tokenizer.eot)
        expected = theirs.split_to_word_tokens(list(tokens))
        assert split_words(tokenizer, tokens, language) == expected


def test_half_a_character_waits_for_the_other_half(both):
    tokenizer = both[1]._model.tokenizer
    text = " ¿Qué? “日本” ♪"
    words, ids = split_words(tokenizer, tokenizer.encode(text), "zh")
    assert "".join(words) == text
    assert "�" not in "".join(words)
    assert [tokenizer.decode(each) for each in ids] == words


def test_marks_join_the_words_they_belong_to():
    texts = [" (", "yes", ")", " no", ".", '"', " “", " so"]
    words = [AlignedWord(text, [i], i, i + 1, 0.5) for i, text in enumerate(texts)]
    merge_punctuation(words, "(“", '.)"')
    assert [word.text for word in words] == ["", " (yes)", "", ' no."', "", "", "", " “ so"]
    assert [word.tokens for word in words if word.text] == [[0, 1, 2], [3, 4, 5], [6, 7]]


def test_a_probable_passage_is_no_hallucination():
    words = [Word(10 + i, 10.5 + i, f" w{i}", 0.9) for i in range(3)]
    passage = Passage(10.0, 12.5, [], words)
    arguments = {
        "threshold": 1.0,
        "window_start": 0.0,
        "window_duration": 30.0,
        "window_end": 30.0,
        "speech_end": 0.0,
    }
    assert hallucination([passage], **arguments) is None
    for word in words:
        word.probability = 0.1
    assert hallucination([passage], **arguments) == 0


class TestWords:
    def test_words_are_in_order_and_make_up_the_text(self, both, samples, manifest):
        for clip in manifest[:6]:
            segments, _ = both[1].transcribe(samples / clip["file"], word_timestamps=True)
            for segment in segments:
                assert "".join(word.word for word in segment.words) == segment.text
                times = [t for word in segment.words for t in (word.start, word.end)]
                assert times == sorted(times)
                assert all(type(t) is float for t in times)
                assert all(0 <= word.probability <= 1 for word in segment.words)

    def test_audio_shorter_than_a_frame_of_the_encoder_has_no_words(self, both):
        """There, CTranslate2 aligns nothing, and faster-whisper raises an IndexError."""
        audio = np.full(RATE // 100, 0.1, dtype=np.float32)
        options = {"no_speech_threshold": None, "word_timestamps": True, "language": "en"}
        for segment in both[1].transcribe(audio, audio_context="full", **options)[0]:
            assert segment.words == []
