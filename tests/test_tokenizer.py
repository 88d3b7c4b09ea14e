"""Token ids: those of faster-whisper, on the embedded vocabulary and on OpenAI's."""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import faster_whisper.tokenizer
import numpy as np
import pytest
import tokenizers
from faster_whisper.transcribe import get_suppressed_tokens
from hypothesis import given
from hypothesis import strategies as st

from speechrnt.errors import ModelLoadError, OptionError
from speechrnt.hub import EMBEDDED_MODELS
from speechrnt.tokenizer import LANGUAGES, TASKS, Tokenizer

PICO = EMBEDDED_MODELS["pico"] / "tokenizer.json"
OPENAI = Path(__file__).parents[2] / "shared" / "whisper-vocabulary" / "tokenizer.json"

SPECIAL = [
    *["sot", "eot", "sot_prev", "sot_lm", "transcribe", "translate", "no_speech"],
    *["no_timestamps", "timestamp_begin"],
]

TEXTS = [
    "",
    " ",
    " Two five one.",
    "Öffne das Fenster.",
    " ¿Qué hora es? ¡Ya!",
    "こんにちは、世界",
    "नमस्ते",
    "👩‍👩‍👧 family",
    "a\n b\t\tc",
    "<|endoftext|> and <|0.00|> said aloud",
    "♪♪♪ - 'tis [music] --> (laughs)",
    "e\u0301 is not é",
]


def load(path) -> tokenizers.Tokenizer:
    return tokenizers.Tokenizer.from_file(str(path))


@pytest.fixture(scope="module", params=[PICO, OPENAI], ids=["pico", "openai"])
def vocabulary(request) -> tokenizers.Tokenizer:
    if not request.param.is_file():
        pytest.skip("needs OpenAI's vocabulary in ../shared/whisper-vocabulary")
    return load(request.param)


@pytest.fixture(scope="module")
def ours(vocabulary) -> Tokenizer:
    return Tokenizer(vocabulary, multilingual=True)


@pytest.fixture(scope="module")
def theirs(vocabulary) -> faster_whisper.tokenizer.Tokenizer:
    return faster_whisper.tokenizer.Tokenizer(vocabulary, True, "transcribe", "en")


@pytest.fixture(scope="module")
def pico() -> Tokenizer:
    return Tokenizer(load(PICO), multilingual=True)


@pytest.fixture
def without():
    """A function that returns the embedded vocabulary without some of its special tokens."""

    def remove(*names: str, **renamed: str) -> tokenizers.Tokenizer:
        document = json.loads(PICO.read_text(encoding="utf-8"))
        gone = {f"<|{name}|>" for name in names}
        kept = [token for token in document["added_tokens"] if token["content"] not in gone]
        for token in kept:
            name = token["content"][2:-2]
            token["content"] = f"<|{renamed.get(name, name)}|>"
        return tokenizers.Tokenizer.from_str(json.dumps({**document, "added_tokens": kept}))

    return remove


@pytest.mark.parametrize("name", SPECIAL)
def test_special_ids_are_those_of_faster_whisper(ours, theirs, name):
    assert isinstance(getattr(ours, name), int)
    assert getattr(ours, name) == getattr(theirs, name)


def test_languages_are_those_of_faster_whisper():
    assert faster_whisper.tokenizer._LANGUAGE_CODES == LANGUAGES


def test_the_languages_are_those_in_the_vocabulary(ours, vocabulary):
    there = [code for code in LANGUAGES if vocabulary.token_to_id(f"<|{code}|>") is not None]
    assert list(ours.languages) == there
    assert len(there) == (4 if vocabulary.get_vocab_size() < 3000 else 99)


@pytest.mark.parametrize("task", TASKS)
def test_every_language_opens_a_transcript_as_in_faster_whisper(ours, vocabulary, task):
    for language in ours.languages:
        other = faster_whisper.tokenizer.Tokenizer(vocabulary, True, task, language)
        assert ours.sot_sequence(language, task) == other.sot_sequence
        assert len(other.sot_sequence) == 3


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("language", ["en", "de", "no such"])
def test_an_english_only_model_opens_a_transcript_without_language_and_task(
    vocabulary, language, task
):
    ours = Tokenizer(vocabulary, multilingual=False)
    theirs = faster_whisper.tokenizer.Tokenizer(vocabulary, False)
    assert ours.languages == ("en",)
    assert ours.sot_sequence(language, task) == theirs.sot_sequence == [ours.sot]


def test_the_size_counts_every_id(ours, vocabulary):
    assert ours.vocabulary_size == ours.timestamp_begin + 1501
    assert vocabulary.id_to_token(ours.vocabulary_size - 1) == "<|30.00|>"


def test_annotations_are_those_of_faster_whisper(ours, theirs):
    assert sorted(ours.non_speech_tokens) == list(theirs.non_speech_tokens)
    assert len(ours.non_speech_tokens) > 20


@pytest.mark.parametrize("tokens", [[-1], [-1, 5, 300], [7], [300, 7, 7], [-1, -1]])
def test_suppressed_tokens_are_those_of_faster_whisper(ours, theirs, tokens):
    assert ours.suppressed_tokens(tokens) == get_suppressed_tokens(theirs, list(tokens))
    assert ours.suppressed_tokens(tuple(tokens)) == ours.suppressed_tokens(tokens)


@pytest.mark.parametrize("tokens", [None, [], ()])
def test_without_a_list_nothing_is_suppressed(ours, tokens):
    assert ours.suppressed_tokens(tokens) == ()


@pytest.mark.parametrize("text", TEXTS)
def test_texts_are_encoded_as_in_faster_whisper(ours, theirs, text):
    ids = ours.encode(text)
    assert ids == theirs.encode(text)
    assert ours.decode(ids) == theirs.decode(ids)


@given(st.text(max_size=60))
def test_any_text_is_encoded_as_in_faster_whisper(ours, theirs, text):
    ids = ours.encode(text)
    assert ids == theirs.encode(text)
    assert ours.decode(ids) == theirs.decode(ids)


@pytest.mark.parametrize("text", [" Two five one.", "Öffne das Fenster.", "こんにちは", "👩‍👩‍👧"])
def test_decoding_returns_the_text_that_was_encoded(ours, text):
    assert ours.decode(ours.encode(text)) == text
    assert ours.decode_with_timestamps(ours.encode(text)) == text


@given(st.data())
def test_any_ids_are_decoded_as_in_faster_whisper(ours, theirs, data):
    ids = data.draw(st.lists(st.integers(0, ours.vocabulary_size - 1), max_size=30))
    assert ours.decode(ids) == theirs.decode(ids)
    assert ours.decode_with_timestamps(ids) == theirs.decode_with_timestamps(ids)


def test_special_tokens_and_timestamps_are_left_out_of_the_text(ours):
    begin, text = ours.timestamp_begin, ours.encode(" Two five")
    ids = [*ours.sot_sequence("en", "transcribe"), begin, *text, begin + 60, begin + 1500, ours.eot]
    assert ours.decode(ids) == " Two five"
    assert ours.decode(iter(ids)) == " Two five"
    assert ours.decode_with_timestamps(ids) == "<|0.00|> Two five<|1.20|><|30.00|>"
    assert ours.decode_with_timestamps(iter(ids)) == "<|0.00|> Two five<|1.20|><|30.00|>"
    assert ours.decode([]) == ours.decode_with_timestamps([]) == ""


# Errors


@pytest.mark.parametrize("language", ["xx", "EN", "english", "", None, "<|en|>", "ja"])
def test_an_unknown_language_is_an_option_error_that_lists_the_others(pico, language):
    with pytest.raises(OptionError) as caught:
        pico.sot_sequence(language, "transcribe")
    assert str(caught.value) == (
        f"language: {language!r} is not one this model knows; use one of de, en, es, fr, or None "
        "to detect it"
    )


@pytest.mark.parametrize("task", ["", "Translate", None, "lang_id"])
@pytest.mark.parametrize("multilingual", [True, False])
def test_an_unknown_task_is_an_option_error(task, multilingual):
    tokenizer = Tokenizer(load(PICO), multilingual)
    with pytest.raises(OptionError) as caught:
        tokenizer.sot_sequence("en", task)
    assert str(caught.value) == f"task: {task!r} is unknown; use one of transcribe, translate"


@pytest.mark.parametrize("token", [-1, -2, 2281, 10**20, 1.0, "5", None])
def test_an_id_outside_the_vocabulary_is_an_option_error(pico, token):
    with pytest.raises(OptionError) as caught:
        pico.checked_ids("prompt", [5, token])
    assert str(caught.value) == f"prompt: {token!r} is not a token id below 2281"


@pytest.mark.parametrize("tokens", [5, None, 1.5])
def test_what_is_not_a_list_of_ids_is_an_option_error(pico, tokens):
    with pytest.raises(OptionError, match=f"prompt: must be token ids, not {tokens}"):
        pico.checked_ids("prompt", tokens)


def test_ids_are_checked_and_made_integers(pico):
    ids = pico.checked_ids("prompt", np.array([0, 2280], np.uint16))
    assert ids == [0, 2280]
    assert [type(token) for token in ids] == [int, int]


@pytest.mark.parametrize("tokens", [[-2], [2281], [-1, 99_999]])
def test_suppressing_an_id_outside_the_vocabulary_is_an_option_error(pico, tokens):
    with pytest.raises(OptionError, match=f"suppress_tokens: {tokens[-1]} is not a token id"):
        pico.suppressed_tokens(tokens)


@pytest.mark.parametrize("name", ["startoftranscript", "endoftext", "notimestamps"])
@pytest.mark.parametrize("multilingual", [True, False])
def test_a_vocabulary_without_what_decoding_needs_is_a_load_error(without, name, multilingual):
    with pytest.raises(ModelLoadError, match=rf"no <\|{name}\|>: it is not a Whisper tokenizer"):
        Tokenizer(without(name), multilingual)


@pytest.mark.parametrize("task", TASKS)
def test_a_multilingual_vocabulary_without_a_task_is_a_load_error(without, task):
    with pytest.raises(ModelLoadError, match=rf"no <\|{task}\|>"):
        Tokenizer(without(task), multilingual=True)
    assert getattr(Tokenizer(without(task), multilingual=False), task) is None


def test_a_multilingual_vocabulary_without_languages_is_a_load_error(without):
    languages = ["en", "de", "es", "fr"]
    with pytest.raises(ModelLoadError, match="no language token"):
        Tokenizer(without(*languages), multilingual=True)
    assert Tokenizer(without(*languages[1:]), multilingual=True).languages == ("en",)


def test_tokens_that_decoding_can_do_without_may_be_missing(without, pico):
    tokenizer = Tokenizer(without("startofprev", "startoflm", "nospeech"), multilingual=True)
    assert (tokenizer.sot_prev, tokenizer.sot_lm, tokenizer.no_speech) == (None, None, None)
    suppressed = set(pico.suppressed_tokens([-1]))
    assert set(tokenizer.suppressed_tokens([-1])) == suppressed - {776, 777, 778}


def test_no_speech_may_have_its_older_name(without, pico):
    tokenizer = Tokenizer(without(nospeech="nocaptions"), multilingual=True)
    assert tokenizer.no_speech == pico.no_speech


# Threads


def test_threads_share_a_tokenizer(vocabulary, theirs):
    tokenizer = Tokenizer(vocabulary, multilingual=True)
    start = Barrier(8)

    def use(number):
        start.wait()
        suppressed = tokenizer.suppressed_tokens([-1])
        texts = TEXTS[number:] + TEXTS[:number]
        languages = [tokenizer.sot_sequence(code, "translate") for code in tokenizer.languages]
        return suppressed, [tokenizer.decode(tokenizer.encode(text)) for text in texts], languages

    with ThreadPoolExecutor(8) as threads:
        results = list(threads.map(use, range(8)))
    decoded = [theirs.decode(theirs.encode(text)) for text in TEXTS]
    for number, (suppressed, texts, languages) in enumerate(results):
        assert suppressed == get_suppressed_tokens(theirs, [-1])
        assert texts == decoded[number:] + decoded[:number]
        assert languages == results[0][2]
