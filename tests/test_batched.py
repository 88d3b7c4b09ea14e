"""`BatchedInferencePipeline` against faster-whisper's, and where it is better."""

import copy
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict

import faster_whisper
import numpy as np
import pytest
from pairwise import rows
from peer_vad import same_probabilities  # noqa: F401 - a fixture

import speechrnt
from speechrnt.errors import OptionError
from speechrnt.hub import EMBEDDED_MODELS

PICO = str(EMBEDDED_MODELS["pico"])
RATE = 16000
CLIPS = [{"start": 0.0, "end": 3.0}, {"start": 3.5, "end": 9.25}, {"start": 12.0, "end": 30.1}]
FACTORS = {
    "clip": ["short", "long", "noise", "silence", "nothing"],
    "language": [None, "en", "de"],
    "task": ["transcribe", "translate"],
    "beam_size": [5, 1],
    "batch_size": [8, 1, 3],
    "word_timestamps": [True, False],
    "without_timestamps": [True, False],
    "clip_timestamps": [None, CLIPS],
    "vad_parameters": [None, {"min_silence_duration_ms": 200, "max_speech_duration_s": 3}],
    "chunk_length": [None, 10],
    "hotwords": [None, "alarm kitchen"],
    "initial_prompt": [None, " Good morning."],
    "max_new_tokens": [None, 20],
    "multilingual": [False, True],
    "language_detection_segments": [1, 3],
    "language_detection_threshold": [0.5, 0.999],
    "suppress_tokens": [[-1], None],
    "length_penalty": [1, 0.5],
}


@pytest.fixture(scope="module")
def both():
    peer = faster_whisper.WhisperModel(PICO, device="cpu")
    ours = speechrnt.WhisperModel(device="cpu")
    return (
        faster_whisper.BatchedInferencePipeline(peer),
        speechrnt.BatchedInferencePipeline(ours),
    )


@pytest.fixture(scope="module")
def clips(samples, manifest):
    pause = np.zeros(RATE, dtype=np.float32)
    speech = [speechrnt.decode_audio(samples / clip["file"]) for clip in manifest]
    noise = np.random.default_rng(7).standard_normal(20 * RATE).astype(np.float32)
    return {
        "short": speech[3],
        "long": np.concatenate([x for each in speech for x in (each, pause)]),
        "noise": noise * 0.3,
        "silence": np.zeros(35 * RATE, dtype=np.float32),
        "nothing": np.zeros(0, dtype=np.float32),
    }


def outcome(pipeline, audio, **options):
    segments, info = pipeline.transcribe(audio, **options)
    return [asdict(segment) for segment in segments], info


@pytest.mark.parametrize("row", rows(FACTORS), ids=lambda row: row["clip"])
def test_every_pair_of_options(both, clips, same_probabilities, row):  # noqa: F811
    options = dict(row)
    audio = clips[options.pop("clip")]
    if options["clip_timestamps"] and len(audio) < 35 * RATE:
        # The peer fails where the clips are longer than the recording.
        options["clip_timestamps"] = [{"start": 0, "end": len(audio) / RATE}]
    # It changes what it is given.
    expected, expected_info = outcome(both[0], audio, **copy.deepcopy(options))
    actual, info = outcome(both[1], audio, **options)
    if options["multilingual"]:
        # The peer aligns all chunks in one language.
        for each in (*expected, *actual):
            del each["words"], each["start"], each["end"]
    assert actual == expected
    for name in ("language", "language_probability", "duration", "duration_after_vad"):
        assert getattr(info, name) == getattr(expected_info, name)


def test_without_vad_a_short_recording_is_one_chunk(both, clips):
    expected, _ = outcome(both[0], clips["short"], vad_filter=False)
    actual, _ = outcome(both[1], clips["short"], vad_filter=False)
    assert actual == expected


class TestDifferences:
    def test_arguments_are_not_changed(self, both, clips):
        vad = {"max_speech_duration_s": 3, "threshold": 0.4}
        suppressed, temperature = [-1, 5], [0.0, 0.5]
        outcome(
            both[1],
            clips["short"],
            vad_parameters=vad,
            suppress_tokens=suppressed,
            temperature=temperature,
        )
        assert vad == {"max_speech_duration_s": 3, "threshold": 0.4}
        assert (suppressed, temperature) == ([-1, 5], [0.0, 0.5])

    def test_threads_do_not_disturb_each_other(self, both, clips):
        """The peer keeps where speech ended on the pipeline."""
        jobs = [
            {"audio": clips[name], "word_timestamps": True, "language": language}
            for name in ("short", "long")
            for language in ("en", None)
        ]
        expected = [outcome(both[1], **job)[0] for job in jobs]
        with ThreadPoolExecutor(4) as pool:
            futures = [pool.submit(outcome, both[1], **job) for job in jobs * 2]
            assert [future.result()[0] for future in futures] == expected * 2

    def test_token_ids_may_be_the_prompt(self, both, clips):
        """There, the peer raises a TypeError."""
        tokens = both[1].model.hf_tokenizer.encode(" Good.", add_special_tokens=False).ids
        expected, _ = outcome(both[1], clips["short"], initial_prompt=" Good.", language="en")
        actual, _ = outcome(both[1], clips["short"], initial_prompt=tokens, language="en")
        assert actual == expected

    def test_what_has_no_effect_is_said(self, both, clips):
        _, info = outcome(both[1], clips["short"], prefix="Set", no_speech_threshold=0.1)
        assert [warning.split()[0] for warning in info.warnings] == [
            "no_speech_threshold",
            "prefix",
        ]
        assert outcome(both[1], clips["short"])[1].warnings == ()

    def test_the_temperature_is_obeyed(self, both, clips):
        """The peer ignores it."""
        texts = {
            "".join(s["text"] for s in outcome(both[1], clips["noise"], temperature=5.0,
                    language="en", vad_filter=False, best_of=1)[0])
            for _ in range(4)
        }  # fmt: skip
        assert len(texts) > 1

    def test_the_initial_timestamp_is_obeyed(self, both, clips):
        """The peer ignores it."""
        late = np.concatenate([np.zeros(2 * RATE, dtype=np.float32), clips["short"]])
        options = {"vad_filter": False, "without_timestamps": False, "language": "en"}
        begin = both[1].model.hf_tokenizer.token_to_id("<|notimestamps|>") + 1
        for longest in (0.0, 0.5, 10.0):
            segments, _ = outcome(both[1], late, max_initial_timestamp=longest, **options)
            assert (segments[0]["tokens"][0] - begin) * 0.02 <= longest

    def test_clips_may_be_longer_together_than_the_recording(self, both, clips):
        """The peer asserts that they are not."""
        clip = {"start": 0.0, "end": 2.0}
        options = {"clip_timestamps": [clip] * 3, "language": "en"}
        with pytest.raises(AssertionError):
            outcome(both[0], clips["short"], **options)
        segments, _ = outcome(both[1], clips["short"], **options)
        [alone], _ = outcome(both[1], clips["short"], clip_timestamps=[clip], language="en")
        assert [each["text"] for each in segments] == [alone["text"]] * 3

    def test_words_are_aligned_in_the_language_of_their_chunk(
        self, both, samples, manifest, monkeypatch
    ):
        """The peer aligns the words of all chunks of a batch in one language."""
        spoken = ["en", "de", "es", "en"]
        pieces = []
        for number, language in enumerate(spoken):
            of_language = [each["file"] for each in manifest if each["lang"] == language]
            pieces.append(speechrnt.decode_audio(samples / of_language[number]))
        ends = np.cumsum([len(piece) / RATE for piece in pieces])
        clip_timestamps = [
            {"start": end - len(piece) / RATE, "end": end}
            for end, piece in zip(ends, pieces, strict=True)
        ]
        options = {"multilingual": True, "word_timestamps": True, "language": "en"}
        options["clip_timestamps"] = clip_timestamps
        sequences = []
        align = speechrnt.models.Model.align

        def recorded(self, encoding, sequence, *arguments):
            sequences.append(sequence)
            return align(self, encoding, sequence, *arguments)

        audio = np.concatenate(pieces)
        alone, _ = outcome(both[1], audio, batch_size=1, **options)
        monkeypatch.setattr(speechrnt.models.Model, "align", recorded)
        together, _ = outcome(both[1], audio, batch_size=4, **options)
        tokenizer = both[1].model._model.tokenizer
        wanted = [tokenizer.sot_sequence(language, "transcribe") for language in spoken[:3]]
        assert sequences == wanted
        assert [each["words"] for each in together] == [each["words"] for each in alone]
        assert all(each["words"] for each in together)


class TestOptions:
    @pytest.mark.parametrize(
        ("option", "value"),
        [
            ("batch_size", 0),
            ("batch_size", 2.0),
            ("chunk_length", 31),
            ("clip_timestamps", "0,1"),
            ("clip_timestamps", [{"start": 1}]),
            ("clip_timestamps", [{"start": 2, "end": 1}]),
            ("clip_timestamps", [{"start": 0, "end": float("inf")}]),
            ("vad_filter", None),
            ("temperature", []),
            ("language", "zz"),
        ],
    )
    def test_bad_values_are_named(self, both, clips, option, value):
        with pytest.raises(OptionError, match=option):
            both[1].transcribe(clips["short"], **{option: value})
        assert outcome(both[1], clips["short"])[0]

    def test_long_audio_needs_chunks(self, both, clips):
        with pytest.raises(OptionError, match="vad_filter"):
            both[1].transcribe(clips["long"], vad_filter=False)

    def test_long_clips_are_warned_of(self, both, clips):
        _, info = outcome(both[1], clips["long"], clip_timestamps=[{"start": 0, "end": 31}])
        assert "first 30" in info.warnings[0]

    def test_another_model_is_refused(self):
        with pytest.raises(OptionError, match="WhisperModel"):
            speechrnt.BatchedInferencePipeline("tiny")


def test_nothing_is_decoded_before_it_is_asked_for(both, clips, monkeypatch):
    calls = []
    generate = speechrnt.models.Model.generate

    def counted(self, encoding, prompts, **options):
        calls.append(len(prompts))
        return generate(self, encoding, prompts, **options)

    monkeypatch.setattr(speechrnt.models.Model, "generate", counted)
    segments, _ = both[1].transcribe(clips["long"], language="en", batch_size=2, chunk_length=10)
    assert calls == []
    next(segments)
    assert calls == [2]
    segments.close()
    assert calls == [2]
