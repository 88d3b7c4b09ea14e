"""`WhisperModel`: its options, its errors, its laziness, its contexts, its threads."""

import dataclasses
import inspect
import io
import pickle
import re
import subprocess
import sys
from concurrent.futures import CancelledError, ThreadPoolExecutor

import faster_whisper
import jiwer
import numpy as np
import pytest
from transcribe_helpers import RATE, SILENCE, joined, text

import speechrnt
from speechrnt import OptionError, WhisperModel
from speechrnt.features import FullContextWindows
from speechrnt.hub import EMBEDDED_MODELS
from speechrnt.models import Model


@pytest.fixture(scope="module")
def clip(samples):
    """English, 2.3 s: "Set the alarm for six ten."."""
    return speechrnt.load_audio(samples / "s03_en.wav")


@pytest.fixture
def calls(monkeypatch):
    """The encoder's and the decoder's work: frames of context, and prompts."""
    made = {"encode": [], "generate": []}
    encode, generate = Model.encode, Model.generate

    def recorded_encode(self, features):
        made["encode"].append(features.shape[2])
        return encode(self, features)

    def recorded_generate(self, encoding, prompts, **options):
        made["generate"].append(prompts[0])
        return generate(self, encoding, prompts, **options)

    monkeypatch.setattr(Model, "encode", recorded_encode)
    monkeypatch.setattr(Model, "generate", recorded_generate)
    return made


def plain(sentence):
    return " ".join(re.findall(r"\w+", sentence.lower()))


class TestInterface:
    def parameters(self, function):
        return inspect.signature(function).parameters

    def assert_same_arguments(self, ours, theirs, more=(), required=()):
        """The same names in the same order, the same defaults, and perhaps some names more."""
        ours, theirs = self.parameters(ours), self.parameters(theirs)
        assert list(ours) == [*theirs, *more]
        for name, parameter in theirs.items():
            default = parameter.default
            if isinstance(default, list):
                default = tuple(default)
            if name in required:
                assert default is inspect.Parameter.empty
            else:
                assert ours[name].default == default, name
            assert ours[name].kind == parameter.kind, name

    def test_the_arguments_are_those_of_faster_whisper(self):
        theirs = faster_whisper
        self.assert_same_arguments(
            WhisperModel.transcribe,
            theirs.WhisperModel.transcribe,
            ["audio_context", "normalization"],
        )
        self.assert_same_arguments(
            WhisperModel, theirs.WhisperModel, required=["model_size_or_path"]
        )
        self.assert_same_arguments(
            WhisperModel.detect_language, theirs.WhisperModel.detect_language
        )
        ours, pipeline = speechrnt.BatchedInferencePipeline, theirs.BatchedInferencePipeline
        self.assert_same_arguments(ours, pipeline)
        self.assert_same_arguments(ours.transcribe, pipeline.transcribe)
        vad = theirs.vad
        self.assert_same_arguments(speechrnt.VadOptions, vad.VadOptions)
        self.assert_same_arguments(speechrnt.get_speech_timestamps, vad.get_speech_timestamps)
        for name in ("decode_audio", "available_models", "download_model", "format_timestamp"):
            self.assert_same_arguments(getattr(speechrnt, name), getattr(theirs, name))

    def test_everything_public_is_there(self):
        assert set(faster_whisper.__all__) <= set(speechrnt.__all__)
        public = {name for name in dir(faster_whisper.BatchedInferencePipeline) if name[0] != "_"}
        internal = {"forward", "generate_segment_batched"}
        assert public - internal <= set(dir(speechrnt.BatchedInferencePipeline))
        assert set(faster_whisper.available_models()) <= set(speechrnt.available_models())

    def test_attributes_are_those_of_faster_whisper(self, model):
        pico = str(EMBEDDED_MODELS["pico"])
        peer = faster_whisper.WhisperModel(pico, device="cpu")
        for name in (
            *("input_stride", "num_samples_per_token", "frames_per_second", "tokens_per_second"),
            *("time_precision", "max_length"),
        ):
            assert getattr(model, name) == getattr(peer, name)
        assert model.feat_kwargs["feature_size"] == peer.feature_extractor.mel_filters.shape[0]

    @pytest.mark.parametrize("name", ["Segment", "Word", "TranscriptionOptions"])
    def test_result_fields(self, name):
        ours = [field.name for field in dataclasses.fields(getattr(speechrnt, name))]
        theirs = getattr(faster_whisper.transcribe, name)
        assert ours == [field.name for field in dataclasses.fields(theirs)]

    def test_results_as_dicts(self):
        word = speechrnt.Word(0.0, 1.0, " one", 0.5)
        segment = speechrnt.Segment(1, 0, 0.0, 1.0, " one", [5], -0.1, 1.0, 0.0, [word], 0.0)
        for result in (word, segment):
            with pytest.warns(DeprecationWarning, match="use dataclasses.asdict") as warnings:
                assert result._asdict() == dataclasses.asdict(result)
            assert warnings[0].filename == __file__

    def test_options_do_not_follow_what_the_caller_changes_later(self, model, clip):
        temperatures = [0.0, 0.5]
        _, info = model.transcribe(clip, language="en", temperature=temperatures)
        temperatures.clear()
        assert info.transcription_options.temperatures == [0.0, 0.5]

    def test_info_fields(self):
        ours = [field.name for field in dataclasses.fields(speechrnt.TranscriptionInfo)]
        theirs = dataclasses.fields(faster_whisper.transcribe.TranscriptionInfo)
        assert ours == [*(field.name for field in theirs), "warnings"]

    def test_attributes_that_others_use(self, model):
        assert model.model.is_multilingual
        assert model.supported_languages == ["de", "en", "es", "fr"]
        assert model.feature_extractor.sampling_rate == RATE
        assert model.hf_tokenizer.token_to_id("<|endoftext|>") == 768

    def test_info_says_what_was_done(self, model, clip):
        _, info = model.transcribe(clip, beam_size=2, temperature=0.0)
        assert info.language == "en"
        assert info.language_probability == info.all_language_probs[0][1] > 0.9
        assert {code for code, _ in info.all_language_probs} == {"de", "en", "es", "fr"}
        assert sum(probability for _, probability in info.all_language_probs) == pytest.approx(1)
        assert info.duration == info.duration_after_vad == clip.duration
        assert info.transcription_options.beam_size == 2
        assert info.transcription_options.temperatures == [0.0]
        assert info.warnings == ()

    def test_info_with_the_language_given(self, model, clip):
        _, info = model.transcribe(clip, language="en")
        assert (info.language_probability, info.all_language_probs) == (1, None)

    def test_messages_go_to_our_logger(self, model):
        assert model.logger.name == "speechrnt"

    def test_info_tells_what_ran_and_cannot_be_changed(self, model):
        _, info = model.transcribe(SILENCE, language="en", vad_parameters={"threshold": 0.9})
        assert info.vad_options is None
        with pytest.raises(dataclasses.FrozenInstanceError):
            info.transcription_options.beam_size = 1

    def test_a_negative_length_penalty_may_leave_nothing(self, model):
        """Where the end of the text is all that is allowed."""
        letters = list(range(model.hf_tokenizer.token_to_id("<|endoftext|>")))
        options = {"suppress_tokens": letters, "suppress_blank": False, "length_penalty": -1}
        segments, _ = model.transcribe(
            SILENCE, language="en", temperature=0.0, without_timestamps=True, **options
        )
        assert list(segments) == []


class TestAudio:
    def test_every_kind_gives_the_same_text(self, model, samples):
        path = samples / "s03_en.wav"
        array = speechrnt.decode_audio(path)
        integers = (array * 32768).astype(np.int16)
        kinds = [
            path,
            str(path),
            path.open("rb"),
            io.BytesIO(path.read_bytes()),
            array,
            integers,
            integers.tobytes(),
            speechrnt.Audio.from_array(integers),
        ]
        texts = {text(model, kind, language="en") for kind in kinds}
        kinds[2].close()
        assert texts == {"Set the alarm for six ten."}

    def test_zero_length_is_an_empty_result(self, model):
        segments, info = model.transcribe(np.zeros(0, dtype=np.float32))
        assert list(segments) == []
        assert info.duration == 0

    def test_warnings_about_a_damaged_file_reach_info(self, model, samples, tmp_path):
        damaged = tmp_path / "damaged.wav"
        damaged.write_bytes((samples / "s03_en.wav").read_bytes()[:40_000])
        _, info = model.transcribe(damaged, language="en")
        [warning] = info.warnings
        assert "damaged.wav" in warning

    @pytest.mark.parametrize(
        ("audio", "error"),
        [
            ("no/such/file.wav", speechrnt.AudioNotFoundError),
            (np.array([0.0, np.nan], dtype=np.float32), speechrnt.InvalidAudioError),
            (np.zeros((2, 2), dtype=np.float32), speechrnt.InvalidAudioError),
            (None, speechrnt.InvalidAudioError),
        ],
    )
    def test_bad_audio_leaves_the_model_usable(self, model, clip, audio, error):
        with pytest.raises(error):
            model.transcribe(audio)
        assert text(model, clip)


class TestOptions:
    @pytest.mark.parametrize(
        ("option", "value"),
        [
            ("language", "zz"),
            ("language", "EN"),
            ("language", ""),
            ("language", "zh"),
            ("task", "summarize"),
            ("task", None),
            ("log_progress", "no"),
            ("beam_size", 0),
            ("beam_size", 2.5),
            ("beam_size", True),
            ("beam_size", 10**20),
            ("best_of", 0),
            ("patience", 0),
            ("patience", 1e-9),
            ("patience", 1e300),
            ("patience", float("nan")),
            ("length_penalty", float("inf")),
            ("length_penalty", 1000),
            ("repetition_penalty", 0),
            ("repetition_penalty", 1e-300),
            ("no_repeat_ngram_size", -1),
            ("no_repeat_ngram_size", 10**20),
            ("temperature", -0.1),
            ("temperature", 1e-40),
            ("temperature", 10**400),
            ("temperature", ()),
            ("temperature", (0.0, "hot")),
            ("temperature", None),
            ("compression_ratio_threshold", "2.4"),
            ("log_prob_threshold", float("nan")),
            ("no_speech_threshold", "0.6"),
            ("condition_on_previous_text", "false"),
            ("prompt_reset_on_temperature", None),
            ("max_initial_timestamp", -1),
            ("max_initial_timestamp", 1e18),
            ("initial_prompt", [10_000]),
            ("initial_prompt", [-1]),
            ("initial_prompt", [True]),
            ("initial_prompt", ["Hello"]),
            ("initial_prompt", b"Hello"),
            ("initial_prompt", {1: 2}),
            ("initial_prompt", 7),
            ("suppress_blank", None),
            ("suppress_tokens", [10_000]),
            ("suppress_tokens", [-2]),
            ("suppress_tokens", ["x"]),
            ("suppress_tokens", -1),
            ("suppress_tokens", 0),
            ("suppress_tokens", "-1"),
            ("without_timestamps", "false"),
            ("language_detection_threshold", "x"),
            ("language_detection_segments", 0),
            ("language_detection_segments", 1.5),
            ("prefix", 5),
            ("hotwords", ["alarm"]),
            ("word_timestamps", "yes"),
            ("prepend_punctuations", None),
            ("append_punctuations", 1),
            ("multilingual", None),
            ("vad_filter", 1),
            ("vad_parameters", 0.5),
            ("vad_parameters", {"sensitivity": 1}),
            ("vad_parameters", {"threshold": 1.5}),
            ("vad_parameters", {"threshold": float("nan")}),
            ("vad_parameters", {"min_silence_duration_ms": -1}),
            ("max_new_tokens", 0),
            ("max_new_tokens", 446),
            ("max_new_tokens", 2.5),
            ("chunk_length", 0),
            ("chunk_length", 31),
            ("chunk_length", 7.5),
            ("clip_timestamps", "one"),
            ("clip_timestamps", "2,1"),
            ("clip_timestamps", [-1.0]),
            ("clip_timestamps", [float("nan")]),
            ("clip_timestamps", None),
            ("clip_timestamps", 5),
            ("hallucination_silence_threshold", "long"),
            ("normalization", "file"),
            ("audio_context", 10**400),
            ("audio_context", np.array([5.0])),
            ("audio_context", "half"),
            ("audio_context", 0),
            ("audio_context", -1.0),
            ("audio_context", 31),
            ("audio_context", True),
            ("audio_context", float("nan")),
        ],
    )
    def test_bad_values_are_named(self, model, clip, option, value):
        with pytest.raises(OptionError, match=option):
            model.transcribe(clip, **{option: value})
        assert text(model, clip)

    def test_arguments_are_not_changed(self, model, clip):
        temperature, suppress_tokens, prompt = [0.0, 0.2], [-1, 5], [40, 50]
        vad, clips = {"threshold": 0.4}, [0.0]
        text(
            model,
            clip,
            vad_filter=True,
            vad_parameters=vad,
            clip_timestamps=clips,
            temperature=temperature,
            suppress_tokens=suppress_tokens,
            initial_prompt=prompt,
        )
        assert (temperature, suppress_tokens, prompt) == ([0.0, 0.2], [-1, 5], [40, 50])
        assert (vad, clips) == ({"threshold": 0.4}, [0.0])

    def test_the_length_of_chunks_counts_for_one_call(self, model, clip, calls):
        """faster-whisper keeps it for all that come after, in other threads too."""
        text(model, clip, audio_context="full", language="en", chunk_length=1)
        assert len(calls["encode"]) > 1
        calls["encode"].clear()
        text(model, clip, audio_context="full", language="en")
        assert len(calls["encode"]) == 1

    def test_voice_activity_detection_drops_silence(self, model, clip):
        silence = np.zeros(10 * RATE, dtype=np.float32)
        audio = np.concatenate([silence, clip.samples, silence])
        for clips in ("0", "", [], [0.0]):
            segments, info = model.transcribe(audio, vad_filter=True, clip_timestamps=clips)
            [segment] = segments
            assert segment.text.strip() == "Set the alarm for six ten."
            assert 9 < segment.start < segment.end < 14
            assert info.duration_after_vad < 5 < info.duration
            assert info.vad_options == speechrnt.VadOptions()

    def test_voice_activity_detection_beside_clips_is_a_warning(self, model, clip):
        _, info = model.transcribe(clip, vad_filter=True, clip_timestamps="0,1")
        assert "vad_filter" in info.warnings[0]
        assert info.vad_options is None

    def test_a_one_shot_iterable_serves_as_prompt(self, model, clip):
        prompt = model.hf_tokenizer.encode(" Good morning.", add_special_tokens=False).ids
        assert text(model, clip, initial_prompt=iter(prompt)) == "Set the alarm for six ten."

    def test_numpy_numbers_will_do(self, model, clip):
        options = {
            "beam_size": np.int64(2),
            "temperature": np.float32(0.0),
            "patience": np.float64(1.0),
        }
        assert text(model, clip, **options) == "Set the alarm for six ten."

    def test_half_a_surrogate_pair_is_no_prompt(self, model, clip):
        segments, _ = model.transcribe(clip, language="en", initial_prompt="\ud800")
        with pytest.raises(OptionError, match="Unicode"):
            list(segments)

    @pytest.mark.parametrize("kind", [list, tuple, iter, np.array])
    def test_suppressed_tokens_come_in_any_kind_of_iterable(self, model, clip, kind):
        _, info = model.transcribe(clip, suppress_tokens=kind([-1, 5]))
        expected = model.transcribe(clip, suppress_tokens=[-1, 5])[1].transcription_options
        assert info.transcription_options.suppress_tokens == expected.suppress_tokens
        assert len(expected.suppress_tokens) > 20

    def test_translation(self, model, samples):
        assert text(model, samples / "s02_de.wav", task="translate") == "Open the window."

    def test_english_only_models_say_what_they_ignore(self, model, clip, monkeypatch):
        monkeypatch.setattr(Model, "is_multilingual", property(lambda self: False))
        _, info = model.transcribe(clip, language="de", task="translate")
        assert info.language == "en"
        assert [w.split("'")[1] for w in info.warnings] == ["de", "translate"]

    def test_progress_is_shown_on_request(self, model, clip, capsys):
        text(model, clip)
        assert capsys.readouterr().err == ""
        text(model, clip, log_progress=True)
        assert "100%" in capsys.readouterr().err


class TestWork:
    def test_nothing_is_decoded_before_it_is_asked_for(self, model, clip, calls):
        segments, _ = model.transcribe(clip, language="en")
        assert calls == {"encode": [], "generate": []}
        next(segments)
        assert (len(calls["encode"]), len(calls["generate"])) == (1, 1)

    @pytest.mark.parametrize("audio_context", ["full", "auto"])
    def test_the_encoder_runs_once_where_the_language_is_detected(
        self, model, clip, calls, audio_context
    ):
        segments, _ = model.transcribe(clip, audio_context=audio_context)
        assert (len(calls["encode"]), calls["generate"]) == (1, [])
        list(segments)
        assert (len(calls["encode"]), len(calls["generate"])) == (1, 1)

    def test_the_language_is_that_of_the_very_window_that_is_decoded(self, model):
        """faster-whisper's window has one mel frame more, which shows where there is no speech."""
        noise = np.random.default_rng(3).standard_normal(2 * RATE).astype(np.float32) * 0.1
        _, info = model.transcribe(noise, audio_context="full")
        window = FullContextWindows(model.feature_extractor(noise)).at(0)
        encoding = model._model.encode(window.features)
        assert info.all_language_probs == model._model.detect_language(encoding)
        peer = faster_whisper.WhisperModel(str(EMBEDDED_MODELS["pico"]), device="cpu")
        theirs = dict(peer.transcribe(noise)[1].all_language_probs)
        differences = [abs(theirs[code] - value) for code, value in info.all_language_probs]
        assert 0 < max(differences) < 0.05

    def test_the_encoder_runs_once_however_often_the_window_is_decoded(self, model, clip, calls):
        text(model, clip, temperature=(0.0, 0.0, 0.0), log_prob_threshold=-0.001)
        assert (len(calls["encode"]), len(calls["generate"])) == (1, 3)

    def test_the_encoder_runs_once_per_window(self, model, samples, manifest, calls):
        audio, _ = joined(samples, manifest, 70)
        segments = list(model.transcribe(audio, audio_context="full", temperature=0.0)[0])
        assert len(segments) > 1
        assert len(calls["encode"]) == len(calls["generate"]) > 1


class TestCancel:
    def test_no_further_window_is_decoded(self, model, samples, manifest, calls):
        audio, _ = joined(samples, manifest, 70)
        segments, _ = model.transcribe(audio, language="en", audio_context="full")
        next(segments)
        decoded = len(calls["generate"])
        segments.cancel()
        with pytest.raises(CancelledError):
            list(segments)
        assert len(calls["generate"]) == decoded

    def test_a_window_under_way_is_dropped(self, model, clip, monkeypatch):
        segments, _ = model.transcribe(clip, language="en")
        generate = Model.generate

        def cancelled_meanwhile(*arguments, **options):
            segments.cancel()
            return generate(*arguments, **options)

        monkeypatch.setattr(Model, "generate", cancelled_meanwhile)
        with pytest.raises(CancelledError):
            next(segments)
        monkeypatch.undo()
        assert text(model, clip)

    def test_progress_can_be_watched(self, model, samples, manifest):
        audio, _ = joined(samples, manifest, 70)
        segments, info = model.transcribe(audio, language="en")
        seen = [segments.seconds_done]
        for _ in segments:
            seen.append(segments.seconds_done)
        assert segments.seconds_done == segments.duration == pytest.approx(info.duration, abs=0.02)
        assert seen == sorted(seen)
        assert seen[0] == 0

    def test_segments_can_be_closed(self, model, clip):
        segments, _ = model.transcribe(clip)
        segments.close()
        assert list(segments) == []


class TestDetectLanguage:
    def test_any_audio_will_do(self, model, samples):
        for audio in (samples / "s02_de.wav", speechrnt.load_audio(samples / "s02_de.wav")):
            language, probability, everything = model.detect_language(audio)
            assert (language, probability) == everything[0]
            assert language == "de"

    def test_vad_options_may_be_a_dict(self, model, clip):
        """faster-whisper raises an AttributeError here."""
        options = {"threshold": 0.4}
        assert model.detect_language(clip, vad_filter=True, vad_parameters=options)[0] == "en"

    @pytest.mark.parametrize(
        "arguments",
        [
            {},
            {"features": np.zeros((80, 0))},
            {"features": np.zeros((128, 10))},
            {"features": np.zeros(10)},
            {"audio": SILENCE, "language_detection_segments": 0},
            {"audio": SILENCE, "vad_parameters": {"threshold": 2}},
        ],
    )
    def test_bad_arguments_are_refused(self, model, arguments):
        with pytest.raises(OptionError):
            model.detect_language(**arguments)

    def test_english_only_models_know_the_answer(self, model, clip, monkeypatch, calls):
        monkeypatch.setattr(Model, "is_multilingual", property(lambda self: False))
        assert model.detect_language(clip) == ("en", 1.0, [("en", 1.0)])
        assert calls["encode"] == []


class TestNormalization:
    def test_by_window_nothing_is_computed_ahead(self, undeclared, samples, manifest, monkeypatch):
        audio, _ = joined(samples, manifest, 28)
        monkeypatch.setattr(undeclared, "feature_extractor", None)
        assert text(undeclared, audio, language="en", normalization="window")

    def test_by_window_loud_places_elsewhere_do_not_matter(self, undeclared, clip):
        quiet = clip.samples * 1e-3
        loud = np.random.default_rng(1).standard_normal(RATE).astype(np.float32)
        audio = np.concatenate([quiet, np.zeros(31 * RATE, np.float32), loud])
        clips = [0, clip.duration]
        options = {"language": "en", "clip_timestamps": clips, "normalization": "window"}
        assert text(undeclared, audio, **options) == text(undeclared, quiet, **options)


class TestAudioContext:
    def test_declared_models_use_what_they_need(self, model, clip, calls):
        text(model, clip)
        # 2.29 s of audio and half a second of silence, in steps of half a second.
        assert calls["encode"] == [300]

    def test_full_on_request(self, model, clip, calls):
        text(model, clip, audio_context="full")
        assert calls["encode"] == [3000]

    def test_at_least_so_many_seconds(self, model, clip, calls):
        text(model, clip, audio_context=5)
        text(model, clip, audio_context=1.5)
        assert calls["encode"] == [500, 300]

    def test_undeclared_models_use_everything(self, undeclared, clip, calls):
        text(undeclared, clip)
        assert calls["encode"] == [3000]

    def test_undeclared_models_keep_a_floor_on_auto(self, undeclared, clip, calls):
        assert text(undeclared, clip, audio_context="auto") == "Set the alarm for six ten."
        assert calls["encode"] == [1000]

    def test_undeclared_models_are_not_reduced_on_long_recordings(self, undeclared, calls):
        text(undeclared, np.zeros(31 * RATE, dtype=np.float32), audio_context="auto")
        assert set(calls["encode"]) == {3000}

    @pytest.mark.parametrize(
        "fault", [{"is_cut_off": True}, {"compression_ratio": 2.5}, {"avg_logprob": -1.5}]
    )
    def test_a_transcript_that_looks_wrong_is_decoded_again_in_full(
        self, undeclared, clip, calls, monkeypatch, fault
    ):
        parse = speechrnt.sequential.parse_result

        def faulty_once(result, *arguments):
            parsed = parse(result, *arguments)
            if len(calls["generate"]) > 1:
                return parsed
            return dataclasses.replace(parsed, **fault)

        monkeypatch.setattr(speechrnt.sequential, "parse_result", faulty_once)
        assert text(undeclared, clip, audio_context="auto") == "Set the alarm for six ten."
        assert calls["encode"] == [1000, 3000]

    def test_long_recordings_are_cut_at_pauses(self, model, samples, manifest, calls):
        audio, words = joined(samples, manifest, 60)
        spoken = text(model, audio, language="en")
        assert max(calls["encode"]) <= 1050
        assert jiwer.wer(plain(words), plain(spoken)) < 0.1

    def test_prompts_are_no_longer_than_the_model_was_trained_on(
        self, model, samples, manifest, calls
    ):
        audio, _ = joined(samples, manifest, 60)
        text(model, audio, language="en")
        longest = max(len(prompt) for prompt in calls["generate"])
        assert longest == 1 + 12 + len(model._model.tokenizer.sot_sequence("en", "transcribe"))

    def test_times_are_in_order_and_stay_inside_the_recording(self, model, samples, manifest):
        audio, _ = joined(samples, manifest, 120)
        for end in range(10, 120, 10):
            segments = list(model.transcribe(audio[: end * RATE], language="en")[0])
            starts = [segment.start for segment in segments]
            assert starts == sorted(starts)
            assert all(segment.start < segment.end <= end for segment in segments)
            assert [segment.id for segment in segments] == list(range(1, len(segments) + 1))

    def test_a_timestamp_without_progress_does_not_stall(self, model, clip, monkeypatch):
        def stuck(tokens, *arguments):
            return [], 0

        monkeypatch.setattr(speechrnt.sequential, "split_by_timestamps", stuck)
        assert text(model, clip, language="en") == ""


def test_many_threads_with_words_and_clips_of_their_own(model, samples, manifest):
    audio, _ = joined(samples, manifest, 15)
    jobs = [
        {"word_timestamps": words, "vad_filter": vad, "hotwords": hotwords, "chunk_length": chunk}
        for words in (True, False)
        for vad in (True, False)
        for hotwords, chunk in ((None, None), ("alarm", 5))
    ]

    def segments(job):
        options = {"temperature": 0.0, "language": "en", "audio_context": "full", **job}
        return [dataclasses.asdict(each) for each in model.transcribe(audio, **options)[0]]

    expected = [segments(job) for job in jobs]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(segments, jobs)) == expected


def test_many_threads_with_options_of_their_own(model, samples, manifest):
    jobs = [
        (samples / clip["file"], {"language": language, "task": task, "audio_context": context})
        for clip in manifest[:4]
        for language in (None, clip["lang"])
        for task in ("transcribe", "translate")
        for context in ("full", "auto")
    ]
    expected = [text(model, audio, temperature=0.0, **options) for audio, options in jobs]
    with ThreadPoolExecutor(8) as pool:
        results = [pool.submit(text, model, a, temperature=0.0, **o) for a, o in jobs]
        assert [result.result() for result in results] == expected


def run_program(program, *arguments):
    """Run a program in a process of its own; return its exit status and what it printed."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=300,
    )
    return done.returncode, done.stdout + done.stderr


def test_a_forked_child_can_neither_use_nor_load_a_model_and_says_so(samples):
    program = """
import os, sys
from speechrnt import ModelError, WhisperModel
def text(model):
    return "".join(segment.text for segment in model.transcribe(sys.argv[1])[0])
model = WhisperModel(device="cpu")
assert text(model)
child = os.fork()
if not child:
    for action in (lambda: text(model), WhisperModel):
        try:
            action()
        except ModelError as error:
            assert "forked" in str(error)
        else:
            sys.exit(1)
    del model, action  # must not wait for threads that are not here
    sys.exit(3)
_, status = os.waitpid(child, 0)
assert text(model)
sys.exit(os.waitstatus_to_exitcode(status))
"""
    assert run_program(program, samples / "s03_en.wav") == (3, "")


def test_a_model_cannot_be_pickled(model):
    with pytest.raises(speechrnt.ModelError, match="each process"):
        pickle.dumps(model)


def test_the_interpreter_exits_cleanly_while_a_daemon_thread_transcribes(samples):
    program = """
import sys, threading, time
from speechrnt import ModelError, WhisperModel
model = WhisperModel(device="cpu")
started = threading.Event()
def work():
    try:
        while True:
            started.set()
            list(model.transcribe(sys.argv[1], audio_context="full")[0])
    except ModelError:
        pass
threading.Thread(target=work, daemon=True).start()
started.wait()
time.sleep(0.3)
"""
    for _ in range(3):
        assert run_program(program, samples / "s03_en.wav") == (0, "")
