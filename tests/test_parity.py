"""The drop-in path against faster-whisper on the same weights: same tokens, text and times."""

import copy
import itertools
from dataclasses import asdict

import ctranslate2
import faster_whisper
import numpy as np
import pytest
from pairwise import rows
from peer_vad import same_probabilities  # noqa: F401 - a fixture

import speechrnt
from speechrnt.hub import EMBEDDED_MODELS

PICO = str(EMBEDDED_MODELS["pico"])
HUMAN = ["jfk.flac", "hotwords.mp3", "multilingual.mp3", "stereo_diarization.wav"]
RATE = 16000

# One clip per language, and what each option changes about its transcript.
CLIPS = ["s00_es.wav", "s02_de.wav", "s03_en.wav", "s07_fr.wav"]
OPTIONS = {
    "greedy": {"beam_size": 1},
    "wide beam": {"beam_size": 8, "patience": 2.0},
    "translate": {"task": "translate"},
    "language given": {"language": "en"},
    "no timestamps": {"without_timestamps": True},
    "text prompt": {"initial_prompt": "Turn on the kitchen lights."},
    "long text prompt": {"initial_prompt": "Two five one. " * 100},
    "token prompt": {"initial_prompt": [40, 50, 60, 70]},
    "nothing suppressed": {"suppress_tokens": None},
    "few suppressed": {"suppress_tokens": [17, 18, 19]},
    "more suppressed": {"suppress_tokens": [-1, 17, 18, 19]},
    "blank allowed": {"suppress_blank": False},
    "length penalty": {"length_penalty": 0.6},
    "repetition penalty": {"repetition_penalty": 1.5},
    "no repeated bigrams": {"no_repeat_ngram_size": 2},
    "first timestamp at 0": {"max_initial_timestamp": 0.0},
    "no thresholds": {
        "compression_ratio_threshold": None,
        "log_prob_threshold": None,
        "no_speech_threshold": None,
    },
}


def load_both(**arguments):
    return (
        faster_whisper.WhisperModel(PICO, device="cpu", **arguments),
        speechrnt.WhisperModel(PICO, device="cpu", **arguments),
    )


@pytest.fixture(scope="module")
def both():
    return load_both()


def outcome(model, audio, **options):
    segments, info = model.transcribe(audio, **options)
    return list(segments), info


def assert_same(both, audio, **options):
    """Transcribe on both sides; compare everything; return our segments."""
    peer, ours = both
    expected, expected_info = outcome(peer, audio, **options)
    actual, info = outcome(ours, audio, audio_context="full", **options)
    assert [asdict(segment) for segment in actual] == [asdict(segment) for segment in expected]
    assert info.duration == expected_info.duration
    assert info.duration_after_vad == expected_info.duration_after_vad
    assert info.language == expected_info.language
    # faster-whisper detects the language from one frame more than it decodes, at the edge of the
    # signal: that shows where there is nothing to recognise.
    if expected_info.language_probability > 0.9:
        assert info.language_probability == pytest.approx(
            expected_info.language_probability, abs=0.05
        )
    return actual


@pytest.fixture(scope="module")
def recordings(samples, manifest):
    return {clip["file"]: speechrnt.decode_audio(samples / clip["file"]) for clip in manifest}


@pytest.fixture(scope="module")
def english(recordings):
    """A function that joins English clips, with half a second between them, to a length."""

    def join(seconds):
        pause = np.zeros(RATE // 2, dtype=np.float32)
        names = itertools.cycle(sorted(name for name in recordings if "_en" in name))
        pieces, length = [], 0
        while length < seconds * RATE:
            pieces += [recordings[next(names)], pause]
            length += len(pieces[-2]) + len(pause)
        return np.concatenate(pieces)[: seconds * RATE]

    return join


def test_every_sample_clip(both, samples, manifest):
    for clip in manifest:
        assert assert_same(both, str(samples / clip["file"]), temperature=0.0)


# Each on clips of two languages, which take turns.
TURNS = [
    (name, CLIPS[turn % 4]) for first, name in enumerate(OPTIONS) for turn in (first, first + 1)
]


@pytest.mark.parametrize(("name", "clip"), TURNS)
def test_options(both, recordings, name, clip):
    assert_same(both, recordings[clip], temperature=0.0, **OPTIONS[name])


@pytest.mark.parametrize("file", HUMAN)
def test_human_recordings(both, human_audio, file):
    assert_same(both, str(human_audio / file), temperature=0.0)


@pytest.mark.parametrize("file", HUMAN)
def test_words_of_human_recordings(both, human_audio, same_probabilities, file):  # noqa: F811
    options = {"temperature": 0.0, "word_timestamps": True, "multilingual": True}
    audio = speechrnt.decode_audio(human_audio / file)[: 35 * RATE]
    assert_same(both, audio, hallucination_silence_threshold=0.5, **options)
    assert_same(both, audio, vad_filter=True, hotwords="America", **options)


def test_human_digits(both, human_audio):
    for file in sorted((human_audio / "digits").glob("*_jackson_*.wav")):
        assert_same(both, str(file), temperature=0.0)


# Values that meet each other in pairs. Where a value is used up by the peer, it is copied first.
FACTORS = {
    "clip": ["short", "long", "languages", "pauses", "noise", "silence"],
    "language": [None, "en", "de"],
    "task": ["transcribe", "translate"],
    "beam_size": [5, 1],
    "word_timestamps": [True, False],
    "hallucination_silence_threshold": [None, 0.2, 2.0],
    "prefix": [None, "Turn on"],
    "hotwords": [None, "alarm kitchen"],
    "initial_prompt": [None, "Good morning.", [40, 50]],
    "clip_timestamps": ["0", "0.5,1.5", "1,2,4", [0.3, 2.0, 2.5, 31.0]],
    "max_new_tokens": [None, 5, 40],
    "chunk_length": [None, 10],
    "multilingual": [False, True],
    "vad_filter": [False, True],
    "vad_parameters": [None, {"min_silence_duration_ms": 300, "speech_pad_ms": 100}],
    "language_detection_segments": [1, 3],
    "language_detection_threshold": [0.5, 0.999],
    "without_timestamps": [False, True],
    "condition_on_previous_text": [True, False],
    "no_speech_threshold": [0.6, -1.0, None],
    "log_prob_threshold": [-1.0, -0.05],
    "compression_ratio_threshold": [2.4, 0.5],
    "prompt_reset_on_temperature": [0.5, -1.0],
    "temperature": [0.0, (0.0, 0.0)],
    "max_initial_timestamp": [1.0, 0.0],
    "suppress_tokens": [[-1], None, [-1, 17]],
    "prepend_punctuations": ["\"'“¿([{-", "¿"],
    "append_punctuations": ["\"'.。,，!！?？:：”)]}、", "."],
}


@pytest.fixture(scope="module")
def clips(recordings, english):
    pause = np.zeros(RATE * 5 // 2, dtype=np.float32)
    names = sorted(recordings)
    return {
        "short": recordings["s03_en.wav"],
        "long": english(65),
        "languages": np.concatenate([recordings[name] for name in names[:20]]),
        "pauses": np.concatenate([x for name in names[5:9] for x in (pause, recordings[name])]),
        "noise": NOISE * 0.3,
        "silence": np.zeros(35 * RATE, dtype=np.float32),
    }


@pytest.mark.parametrize("row", rows(FACTORS), ids=lambda row: row["clip"])
def test_every_pair_of_options(both, clips, same_probabilities, row):  # noqa: F811
    options = dict(row)
    audio = clips[options.pop("clip")]
    peer, _ = both
    # The peer keeps the chunk length of the call before.
    peer.feature_extractor = faster_whisper.feature_extractor.FeatureExtractor(**peer.feat_kwargs)
    expected = outcome(peer, audio, **copy.deepcopy(options))
    actual = outcome(both[1], audio, audio_context="full", **options)
    assert [asdict(each) for each in actual[0]] == [asdict(each) for each in expected[0]]
    for name in ("language", "duration", "duration_after_vad"):
        assert getattr(actual[1], name) == getattr(expected[1], name)


NOISE = np.random.default_rng(7).standard_normal(20 * RATE).astype(np.float32)


@pytest.mark.parametrize(
    "audio",
    [
        NOISE * 0.3,
        NOISE[: 5 * RATE] * 0.001,
        np.zeros(3 * RATE, dtype=np.float32),
        np.zeros(45 * RATE, dtype=np.float32),
        np.zeros(0, dtype=np.float32),
        np.zeros(1, dtype=np.float32),
        np.zeros(159, dtype=np.float32),
        np.full(RATE, 0.5, dtype=np.float32),
        np.sign(NOISE),
    ],
    ids=[
        "loud noise",
        "faint noise",
        "silence",
        "long silence",
        "nothing",
        "one sample",
        "less than a frame",
        "constant",
        "clipped noise",
    ],
)
def test_no_speech(both, audio):
    assert_same(both, audio, temperature=0.0)


@pytest.mark.parametrize("seconds", [29, 30, 31, 60, 61])
def test_lengths_around_the_window(both, english, seconds):
    assert assert_same(both, english(seconds), temperature=0.0, language="en")


def test_more_text_than_a_prompt_holds(both, english):
    segments = assert_same(both, english(240), temperature=0.0, language="en")
    assert sum(len(segment.tokens) for segment in segments) > 224


@pytest.mark.parametrize(
    "options",
    [
        {"without_timestamps": True},
        {"condition_on_previous_text": False},
        {"beam_size": 1, "condition_on_previous_text": False, "language": None},
        {"initial_prompt": "Seven three four.", "task": "translate"},
    ],
    ids=["no timestamps", "unconditioned", "greedy, detected", "prompted, translated"],
)
def test_several_windows(both, english, options):
    assert_same(both, english(90), **{"temperature": 0.0, "language": "en", **options})


class TestThresholds:
    """Every branch of the fallback, the no-speech rule and the prompt reset."""

    # Temperatures of 0 take the same way through the fallback as others, without the dice.
    THREE = (0.0, 0.0, 0.0)

    def decodes(self, monkeypatch, both, audio, **options):
        """Compare, and return how often our decoder ran."""
        count = 0
        generate = speechrnt.models.Model.generate

        def counted(*args, **kwargs):
            nonlocal count
            count += 1
            return generate(*args, **kwargs)

        monkeypatch.setattr(speechrnt.models.Model, "generate", counted)
        segments = assert_same(both, audio, **options)
        return segments, count

    @pytest.mark.parametrize(
        "threshold", [{"compression_ratio_threshold": 0.1}, {"log_prob_threshold": -0.001}]
    )
    def test_all_temperatures_rejected(self, monkeypatch, both, recordings, threshold):
        segments, count = self.decodes(
            monkeypatch, both, recordings["s03_en.wav"], temperature=self.THREE, **threshold
        )
        assert count == 3
        assert segments

    def test_both_thresholds_missed(self, monkeypatch, both, recordings):
        _, count = self.decodes(
            monkeypatch,
            both,
            recordings["s03_en.wav"],
            temperature=self.THREE,
            compression_ratio_threshold=0.1,
            log_prob_threshold=-0.001,
        )
        assert count == 3

    def test_silence_stops_the_fallback_and_is_skipped(self, monkeypatch, both, recordings):
        segments, count = self.decodes(
            monkeypatch,
            both,
            recordings["s03_en.wav"],
            temperature=self.THREE,
            log_prob_threshold=-0.001,
            no_speech_threshold=-1.0,
        )
        assert (segments, count) == ([], 1)

    def test_probable_text_is_kept_despite_no_speech(self, both, recordings):
        assert assert_same(
            both, recordings["s03_en.wav"], temperature=0.0, no_speech_threshold=-1.0
        )

    def test_no_speech_without_log_prob_threshold_is_skipped(self, both, recordings):
        options = {"no_speech_threshold": -1.0, "log_prob_threshold": None}
        assert not assert_same(both, recordings["s03_en.wav"], temperature=0.0, **options)

    def test_prompt_reset(self, both, english):
        """Forgetting the transcript changes what follows, and does so on both sides."""
        audio = english(90)
        options = {"temperature": 0.0, "language": "en"}
        kept = assert_same(both, audio, **options)
        forgotten = assert_same(both, audio, prompt_reset_on_temperature=-1.0, **options)
        unconditioned = assert_same(both, audio, condition_on_previous_text=False, **options)
        assert [s.tokens for s in forgotten] == [s.tokens for s in unconditioned]
        assert [s.tokens for s in forgotten] != [s.tokens for s in kept]

    def test_sampling_draws_the_same_candidates(self, recordings):
        # A model's worker takes its seed when it first samples: fresh models, same dice.
        ctranslate2.set_random_seed(1234)
        both = load_both()
        options = {"log_prob_threshold": -0.001, "temperature": (0.0, 0.4, 0.8)}
        for clip in CLIPS:
            for segment in assert_same(both, recordings[clip], **options):
                assert segment.temperature == 0.8


@pytest.mark.parametrize("clip", ["short", "languages", "noise", "silence"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"language_detection_segments": 3, "language_detection_threshold": 0.999},
        {"vad_filter": True, "language_detection_segments": 2},
    ],
)
def test_detect_language(both, clips, same_probabilities, clip, options):  # noqa: F811
    peer, ours = both
    # The peer takes no dict of VAD options here, and no None when it filters.
    expected = peer.detect_language(
        clips[clip], vad_parameters=faster_whisper.vad.VadOptions(), **options
    )
    assert ours.detect_language(clips[clip], **options) == expected
    peer.feature_extractor = faster_whisper.feature_extractor.FeatureExtractor(**peer.feat_kwargs)
    features = peer.feature_extractor(clips[clip])
    detection = {name: value for name, value in options.items() if name != "vad_filter"}
    expected = peer.detect_language(features=features, **detection)
    assert ours.detect_language(features=features, **detection) == expected


@pytest.mark.parametrize("compute_type", ["int8", "float32"])
def test_compute_types(recordings, compute_type):
    both = load_both(compute_type=compute_type)
    for clip in CLIPS:
        assert_same(both, recordings[clip], temperature=0.0)
