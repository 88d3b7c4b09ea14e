"""Models: where they come from, what they declare, and how it is said that one cannot be used."""

import inspect
import io
import json
import re
import socket
import types
from dataclasses import FrozenInstanceError, replace
from pathlib import Path

import ctranslate2
import faster_whisper.utils
import huggingface_hub
import numpy as np
import pytest
from ctranslate2.specs import TransformerDecoderModelSpec

from speechrnt import WhisperModel, cublas, inference_memory, mempool, models
from speechrnt.errors import (
    GpuError,
    GpuUnavailable,
    ModelLoadError,
    ModelNotFoundError,
    OptionError,
)
from speechrnt.hub import EMBEDDED_MODELS, HUB_MODELS, available_models, download_model
from speechrnt.models import (
    Capabilities,
    load_model,
    resolve_compute_type,
    resolve_device,
)
from speechrnt.sizing import footprint

PICO = EMBEDDED_MODELS["pico"]
REQUIRED_FILES = ["config.json", "model.bin", "vocabulary.json"]


@pytest.fixture
def gpus(monkeypatch):
    """A function that makes CTranslate2 see a number of GPUs, which support `types`.

    It returns the arguments of each model loaded from then on, which go to the CPU all the same.
    """
    load = ctranslate2.models.Whisper
    loaded = []

    def supported(device, device_index=0):
        assert device == "cpu" or device_index < ctranslate2.get_cuda_device_count()
        return kinds[device]

    def whisper(path, **arguments):
        loaded.append(arguments)
        return load(path, device="cpu", files=arguments["files"])

    def install(count, types=("float32", "float16", "int8", "int8_float16")):
        kinds["cuda"] = set(types)
        monkeypatch.setattr(ctranslate2, "get_cuda_device_count", lambda: count)
        return loaded

    kinds = {"cpu": {"float32", "int8", "int8_float32"}}
    monkeypatch.setattr(cublas, "preload", lambda: None)
    monkeypatch.setattr(ctranslate2, "get_supported_compute_types", supported)
    monkeypatch.setattr(ctranslate2.models, "Whisper", whisper)
    return install


def load(*arguments, **options):
    # Threads would only wait for each other.
    return load_model(*arguments, cpu_threads=1, **options)


def failure(error, *arguments, **options) -> str:
    """Return what `load_model` says when it fails with exactly this class of error."""
    with pytest.raises(error) as caught:
        load_model(*arguments, **{"cpu_threads": 1, **options})
    assert caught.type is error
    return str(caught.value)


def write_json(path, document):
    path.write_text(json.dumps(document), encoding="utf-8")


# Names


def test_the_names_are_the_embedded_model_and_those_of_faster_whisper():
    assert available_models() == ["pico", *faster_whisper.available_models()]
    assert len(HUB_MODELS) == 19
    assert HUB_MODELS == faster_whisper.utils._MODELS


def test_the_embedded_model_is_the_default():
    for function in (load_model, WhisperModel):
        assert "pico" in [p.default for p in inspect.signature(function).parameters.values()]
    model = load_model()
    assert model.name == "pico"
    assert model.n_mels == 80
    assert model.is_multilingual
    assert model.tokenizer.languages == ("de", "en", "es", "fr")


def test_the_embedded_model_declares_what_it_can_do():
    assert load("pico").capabilities == Capabilities(
        variable_context=True, max_window_s=10.0, margin_s=0.5, max_prompt_tokens=12
    )


def test_the_embedded_model_is_never_downloaded(tmp_path):
    assert download_model("pico", output_dir=tmp_path / "out") == str(PICO)
    assert not (tmp_path / "out").exists()


def test_a_loaded_model_cannot_be_changed():
    with pytest.raises(FrozenInstanceError):
        load().name = "other"


@pytest.mark.parametrize(
    "name",
    [
        *[
            "",
            "pic",
            "Tiny",
            "huge",
            "x" * 5000,
            "a\0b",
            "owner/",
            "/name",
            "-x/y",
            "../up",
            "./here",
        ],
        *["~nobody-of-this-name/model", "a/b/c", "C:\\models\\tiny", "owner/..", "own--er/name"],
    ],
)
def test_an_unknown_name_is_not_found(name):
    message = failure(ModelNotFoundError, name)
    assert name in message or repr(name) in message
    assert "no such directory" in message


@pytest.mark.parametrize("name", ["huge", "./here", Path("pico"), Path("tiny")])
def test_what_is_neither_name_nor_directory_gets_the_list_of_names(name):
    message = failure(ModelNotFoundError, name)
    assert ", ".join(available_models()) in message


def test_no_test_of_this_suite_reaches_the_hub(monkeypatch):
    def refuse(*arguments):
        pytest.fail(f"tried to connect to {arguments}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    assert huggingface_hub.constants.HF_HUB_OFFLINE
    message = failure(ModelNotFoundError, "tiny")
    assert "hf download Systran/faster-whisper-tiny --local-dir DIR" in message
    assert "'pico' needs nothing" in message


# Directories


@pytest.mark.parametrize("kind", [str, Path])
def test_a_directory_loads_by_path(copy, kind):
    model = load(kind(copy))
    assert model.name == str(copy)
    assert model.capabilities == load().capabilities


@pytest.mark.parametrize("kind", [str, Path])
def test_a_path_may_start_at_the_home_directory(copy, kind, monkeypatch):
    monkeypatch.setenv("HOME", str(copy.parent))
    assert load(kind("~/my model")).tokenizer.languages == ("de", "en", "es", "fr")


@pytest.mark.parametrize("name", ["./m", "m", "sub/m"])
def test_a_path_may_be_relative(copy, name, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sub").mkdir()
    copy.rename(tmp_path / name)
    assert load(name).name == name


def test_the_embedded_name_means_the_embedded_model_even_beside_a_directory(tmp_path, monkeypatch):
    (tmp_path / "pico").mkdir()
    monkeypatch.chdir(tmp_path)
    load("pico")
    assert "config.json, model.bin" in failure(ModelLoadError, Path("pico"))
    assert "config.json, model.bin" in failure(ModelLoadError, "./pico")


def test_a_directory_comes_before_a_hub_name(copy, monkeypatch):
    copy.rename(copy.parent / "tiny")
    monkeypatch.chdir(copy.parent)
    assert load("tiny").is_multilingual


def test_a_file_does_not_hide_a_hub_name(tmp_path, monkeypatch):
    (tmp_path / "tiny").touch()
    monkeypatch.chdir(tmp_path)
    assert "the hub" in failure(ModelNotFoundError, "tiny")


def test_a_vocabulary_may_be_a_text_file(copy, samples):
    tokens = json.loads((copy / "vocabulary.json").read_text(encoding="utf-8"))
    (copy / "vocabulary.json").unlink()
    (copy / "vocabulary.txt").write_text("\n".join(tokens) + "\n", encoding="utf-8")
    segments, _ = WhisperModel(copy, cpu_threads=1).transcribe(samples / "s01_en.wav")
    assert "".join(segment.text for segment in segments) == " Two five one."


@pytest.mark.parametrize("name", ["nowhere", "nowhere/at/all"])
def test_a_directory_that_does_not_exist_is_not_found(name, tmp_path):
    message = failure(ModelNotFoundError, tmp_path / name)
    assert str(tmp_path / name) in message
    assert "no such directory; give the directory that holds config.json" in message


def test_a_file_in_place_of_the_directory_is_not_found(copy):
    message = failure(ModelNotFoundError, copy / "model.bin")
    assert message.startswith(f"{copy / 'model.bin'}: is a file; give the directory")


def test_an_empty_directory_is_no_model(tmp_path):
    message = failure(ModelLoadError, tmp_path)
    assert f"{tmp_path}: not a Whisper model" in message
    assert "config.json, model.bin, vocabulary.* missing; " in message


@pytest.mark.parametrize("name", REQUIRED_FILES)
def test_a_missing_file_is_named(copy, name):
    (copy / name).unlink()
    message = failure(ModelLoadError, copy)
    assert str(copy) in message
    assert f"{Path(name).stem}." in message
    assert "convert a model with ct2-transformers-converter" in message


@pytest.mark.parametrize("name", [*REQUIRED_FILES, "tokenizer.json", "speechrnt.json"])
@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda content: b"", id="empty"),
        pytest.param(lambda content: content[:100], id="first_100_bytes"),
        pytest.param(lambda content: content[: len(content) // 2], id="first_half"),
        pytest.param(lambda content: content[:-10], id="end_cut_off"),
        pytest.param(lambda content: b"\xff\xfe{not this" * 99, id="other_bytes"),
    ],
)
def test_a_damaged_file_is_a_load_error(copy, name, damage):
    path = copy / name
    path.write_bytes(damage(path.read_bytes()))
    assert str(copy) in failure(ModelLoadError, copy)


@pytest.mark.parametrize("name", [*REQUIRED_FILES, "tokenizer.json"])
def test_a_directory_in_place_of_a_file_is_a_load_error(copy, name):
    (copy / name).unlink()
    (copy / name).mkdir()
    assert str(copy) in failure(ModelLoadError, copy)


def test_a_directory_that_may_not_be_read_is_a_load_error(copy, monkeypatch):
    # Permissions would not stop root.
    def refuse(self):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "read_bytes", refuse)
    message = failure(ModelLoadError, copy)
    assert f"{copy}: cannot be read: " in message
    assert "Permission denied" in message


@pytest.mark.parametrize("config", [[], None, 3, "text"])
def test_a_configuration_that_is_not_an_object_is_a_load_error(copy, config):
    write_json(copy / "config.json", config)
    assert "config.json: must hold a JSON object" in failure(ModelLoadError, copy)


# CTranslate2 would crash, or fail much later, on each of these.
@pytest.mark.parametrize("key", ["suppress_ids_begin", "lang_ids"])
@pytest.mark.parametrize("value", [[999_999], [-1], ["<|en|>"], [0.5], 5, "all", {}, "missing"])
def test_a_configuration_with_wrong_ids_is_a_load_error(copy, key, value):
    config = json.loads((copy / "config.json").read_text(encoding="utf-8"))
    config[key] = value
    if value == "missing":
        del config[key]
    write_json(copy / "config.json", config)
    message = failure(ModelLoadError, copy)
    assert f"config.json: {key} must be a list of token ids below 2281" in message


@pytest.mark.parametrize("value", [[], None])
def test_a_multilingual_model_without_languages_is_a_load_error(copy, value):
    config = json.loads((copy / "config.json").read_text(encoding="utf-8"))
    write_json(copy / "config.json", {**config, "lang_ids": value})
    assert "config.json: lang_ids of a multilingual model" in failure(ModelLoadError, copy)


def test_a_model_that_suppresses_nothing_loads(copy, samples):
    config = json.loads((copy / "config.json").read_text(encoding="utf-8"))
    write_json(copy / "config.json", {**config, "suppress_ids": None, "suppress_ids_begin": None})
    segments, _ = WhisperModel(copy, cpu_threads=1).transcribe(samples / "s01_en.wav")
    assert "".join(segment.text for segment in segments) == " Two five one."


def test_another_kind_of_model_is_a_load_error(tmp_path):
    def normal(spec):
        spec.gamma, spec.beta = np.ones(8, np.float32), np.zeros(8, np.float32)

    def linear(spec, outputs, inputs):
        spec.weight = np.zeros((outputs, inputs), np.float32)
        spec.bias = np.zeros(outputs, np.float32)

    spec = TransformerDecoderModelSpec.from_config(num_layers=1, num_heads=2)
    decoder, layer = spec.decoder, spec.decoder.layer[0]
    decoder.scale_embeddings = False
    decoder.embeddings.weight = np.zeros((3, 8), np.float32)
    decoder.position_encodings.encodings = np.zeros((4, 8), np.float32)
    for part in (decoder, layer.self_attention, layer.ffn):
        normal(part.layer_norm)
    linear(layer.self_attention.linear[0], 24, 8)
    linear(layer.self_attention.linear[1], 8, 8)
    linear(layer.ffn.linear_0, 16, 8)
    linear(layer.ffn.linear_1, 8, 16)
    linear(decoder.projection, 3, 8)
    spec.register_vocabulary(["<s>", "</s>", "<unk>"])
    spec.validate()
    spec.optimize()
    spec.save(str(tmp_path))
    ctranslate2.Generator(str(tmp_path))

    message = failure(ModelLoadError, tmp_path)
    assert message.startswith(f"{tmp_path}: CTranslate2 cannot load this as a Whisper model")


@pytest.mark.parametrize("n_mels", [40, 0, 256])
def test_a_model_of_other_mel_bands_is_a_load_error(monkeypatch, n_mels):
    whisper = types.SimpleNamespace(n_mels=n_mels, is_multilingual=True)
    monkeypatch.setattr(ctranslate2.models, "Whisper", lambda *_, **__: whisper)
    message = failure(ModelLoadError)
    assert message == f"pico: the model takes {n_mels} mel bands, not 80 or 128"


# Tokenizer


def test_the_tokenizer_of_another_model_is_a_load_error(copy):
    tokenizer = json.loads((copy / "tokenizer.json").read_text(encoding="utf-8"))
    for token in tokenizer["added_tokens"]:
        token["id"] += 1
    tokenizer["model"]["vocab"]["one more"] = 768
    write_json(copy / "tokenizer.json", tokenizer)
    message = failure(ModelLoadError, copy)
    assert f"{copy}: tokenizer.json belongs to another model: <|endoftext|> is 769" in message
    assert "copy the tokenizer.json of the original model" in message


@pytest.mark.parametrize("tokens", [0, 100, 779])
def test_the_vocabulary_of_another_model_is_a_load_error(copy, tokens):
    vocabulary = json.loads((copy / "vocabulary.json").read_text(encoding="utf-8"))
    write_json(copy / "vocabulary.json", vocabulary[:tokens])
    assert "tokenizer.json belongs to another model" in failure(ModelLoadError, copy)


def test_a_tokenizer_that_is_not_whispers_is_a_load_error(copy):
    tokenizer = json.loads((copy / "tokenizer.json").read_text(encoding="utf-8"))
    write_json(copy / "tokenizer.json", {**tokenizer, "added_tokens": []})
    message = failure(ModelLoadError, copy)
    assert f"{copy}: the tokenizer has no <|startoftranscript|>" in message


@pytest.mark.parametrize("options", [{}, {"local_files_only": True}])
def test_a_missing_tokenizer_that_cannot_be_fetched_is_a_load_error(copy, options):
    (copy / "tokenizer.json").unlink()
    message = failure(ModelLoadError, copy, **options)
    assert f"{copy}: has no tokenizer.json" in message
    assert "openai/whisper-tiny" in message
    assert "copy the tokenizer.json of the original model into the directory" in message


# What a model declares


def test_a_model_that_declares_nothing_has_the_defaults(copy):
    (copy / "speechrnt.json").unlink()
    assert load(copy).capabilities == Capabilities(
        variable_context=False, max_window_s=30.0, margin_s=0.0, max_prompt_tokens=223
    )


@pytest.mark.parametrize("text", ["{}", b"{}", '{"name": "x", "languages": ["en"], "v": null}'])
def test_other_keys_of_a_declaration_are_ignored(text):
    assert Capabilities.from_json(text) == Capabilities()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *[("variable_context", value) for value in (False, True)],
        *[("max_window_s", value) for value in (1, 1.5, 30, 30.0)],
        *[("margin_s", value) for value in (0, 0.25, 30)],
        *[("max_prompt_tokens", value) for value in (0, 12, 223)],
    ],
)
def test_a_declaration_is_read(copy, key, value):
    write_json(copy / "speechrnt.json", {key: value})
    assert load(copy).capabilities == Capabilities(**{key: value})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *[("variable_context", value) for value in (0, 1, "true", None, [])],
        *[("max_window_s", value) for value in (0, 0.9, 30.1, -5, "10", None, True, float("nan"))],
        *[("margin_s", value) for value in (-0.1, 30.1, "0", None, False, float("inf"))],
        *[("max_prompt_tokens", value) for value in (-1, 224, 1.5, 12.0, "12", None, True)],
    ],
)
def test_an_invalid_declaration_is_a_load_error_that_names_the_key(copy, key, value):
    write_json(copy / "speechrnt.json", {key: value})
    message = failure(ModelLoadError, copy)
    assert message.startswith(f"{copy}: speechrnt.json: {key} must be ")


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "is not valid JSON"),
        ("{", "is not valid JSON"),
        (b"\xff", "is not valid JSON"),
        ("[]", "must hold a JSON object"),
        ("null", "must hold a JSON object"),
    ],
)
def test_a_declaration_that_cannot_be_read_is_a_load_error(text, complaint):
    with pytest.raises(ModelLoadError, match=f"speechrnt.json: {complaint}"):
        Capabilities.from_json(text)


# Files in memory


@pytest.mark.parametrize("kind", [bytes, io.BytesIO])
def test_a_model_loads_from_memory(contents, kind, samples):
    files = types.MappingProxyType({name: kind(content) for name, content in contents.items()})
    model = WhisperModel("in memory", files=files, cpu_threads=1)
    segments, _ = model.transcribe(samples / "s01_en.wav")
    assert "".join(segment.text for segment in segments) == " Two five one."


def test_the_files_given_are_left_as_they_are(contents):
    given = dict(contents)
    model = load("in memory", files=given)
    assert given == contents
    assert model.name == "in memory"
    assert model.capabilities == load().capabilities


@pytest.mark.parametrize("missing", [*REQUIRED_FILES, "tokenizer.json"])
def test_a_file_missing_in_memory_is_named(contents, missing):
    given = {name: content for name, content in contents.items() if name != missing}
    message = failure(ModelLoadError, "in memory", files=given)
    assert message.startswith("in memory: ")
    assert f"{Path(missing).stem}." in message


def test_a_model_in_memory_needs_no_declaration(contents):
    given = {name: contents[name] for name in (*REQUIRED_FILES, "tokenizer.json")}
    assert load("in memory", files=given).capabilities == Capabilities()


@pytest.mark.parametrize("content", ["{}", io.StringIO("{}"), None, bytearray(b"{}")])
def test_a_file_in_memory_that_is_not_bytes_is_an_option_error(contents, content):
    message = failure(OptionError, "m", files={**contents, "config.json": content})
    assert message.startswith("files: 'config.json' must be bytes or a file opened in binary mode")


# Device and options


def test_auto_takes_the_gpu_if_there_is_one(gpus):
    gpus(0)
    assert resolve_device("auto") == "cpu"
    gpus(1)
    assert resolve_device("auto") == "cuda"
    assert resolve_device("cpu") == "cpu"
    assert resolve_device("cuda") == "cuda"


@pytest.mark.parametrize("device", ["gpu", "", "CPU", "cuda:0", None, 0])
def test_an_unknown_device_is_an_option_error(device):
    message = failure(OptionError, device=device)
    assert message == f"device: {device!r} is unknown; use one of auto, cpu, cuda"


def test_cuda_without_a_gpu_is_an_option_error(gpus):
    gpus(0)
    assert failure(OptionError, device="cuda") == (
        "device: CTranslate2 sees no CUDA device; use 'cpu' or 'auto'"
    )


@pytest.mark.parametrize(
    ("supported", "chosen"),
    [
        (["float32", "float16", "bfloat16", "int8", "int8_float16"], "float16"),
        (["float32", "bfloat16"], "bfloat16"),
        (["float32", "int8", "int8_float32"], "float32"),
    ],
)
def test_auto_compute_type_on_a_gpu_keeps_the_accuracy(gpus, supported, chosen):
    gpus(1, supported)
    assert resolve_compute_type("auto", "cuda") == chosen


def test_auto_compute_type_on_the_cpu_is_int8(gpus):
    gpus(0)
    assert resolve_compute_type("auto", "cpu") == "int8_float32"


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_default_compute_type_is_left_to_ctranslate2(gpus, device):
    gpus(1)
    assert resolve_compute_type("default", device) == "default"


@pytest.mark.parametrize("compute_type", ["int4", "float16", "INT8", "", None, {"cpu": "int8"}])
def test_an_unsupported_compute_type_is_an_option_error_that_lists_the_others(gpus, compute_type):
    gpus(0)
    message = failure(OptionError, compute_type=compute_type)
    assert message == (
        f"compute_type: {compute_type!r} is not supported on cpu; use one of default, auto, "
        "float32, int8, int8_float32"
    )


@pytest.mark.parametrize("compute_type", ["default", "auto", "float32", "int8", "int8_float32"])
def test_a_model_loads_in_every_compute_type_of_the_cpu(compute_type):
    model = load(device="cpu", compute_type=compute_type)
    loaded = model.whisper.compute_type
    assert loaded == (compute_type if "_" in compute_type else loaded)


@pytest.mark.parametrize(
    ("count", "index", "indices"), [(1, 0, [0]), (3, 2, [2]), (3, [0, 2], [0, 2])]
)
def test_a_model_is_loaded_onto_the_gpus_asked_for(gpus, count, index, indices):
    loaded = gpus(count)
    load_model(compute_type="auto", device_index=index, num_workers=2, cpu_threads=3)
    [arguments] = loaded
    assert arguments["device"] == "cuda"
    assert arguments["device_index"] == indices
    assert arguments["compute_type"] == "float16"
    assert (arguments["inter_threads"], arguments["intra_threads"]) == (2, 3)


def test_a_gpu_without_cublas_is_said_before_anything_is_loaded(gpus, monkeypatch):
    def refuse():
        raise GpuUnavailable("CTranslate2 needs cuBLAS 12 on a GPU")

    loaded = gpus(1)
    monkeypatch.setattr(cublas, "preload", refuse)
    with pytest.raises(GpuUnavailable, match="needs cuBLAS 12"):
        load_model()
    assert loaded == []
    load(device="cpu")  # does not need it


@pytest.mark.parametrize(
    ("free", "compute_type"),
    [
        ({0: 2**30}, "float16"),
        ({0: 2**30, 1: 320 * 2**20}, "float16"),
        ({0: 2**30, 1: 316 * 2**20}, "int8_float16"),
        ({0: 2**20}, "float16"),  # nothing fits: CTranslate2 is left to say so
        ({0: GpuError("unknown")}, "float16"),
    ],
)
def test_auto_takes_8_bits_where_16_leave_no_room(gpus, monkeypatch, free, compute_type):
    def free_memory(index):
        if isinstance(free[index], Exception):
            raise free[index]
        return free[index], 2**34

    loaded = gpus(2)
    monkeypatch.setattr(mempool, "free_memory", free_memory)
    load_model(compute_type="auto", device_index=list(free))
    load_model(compute_type="float16", device_index=list(free))
    assert [arguments["compute_type"] for arguments in loaded] == [compute_type, "float16"]


def test_memory_is_prepared_on_each_gpu_before_the_model_is_loaded(gpus, monkeypatch):
    prepared = []
    loaded = gpus(3)
    monkeypatch.setattr(
        inference_memory, "prepare", lambda device="cpu": prepared.append((device, len(loaded)))
    )
    load_model(device_index=[2, 0])
    assert prepared == [("cuda:2", 0), ("cuda:0", 0)]


class TestFittingBatch:
    def on_gpus(self, monkeypatch, free, num_workers=1):
        """A model that says that it is on GPUs, of which so much is free."""
        model = load(device="cpu")
        whisper = types.SimpleNamespace(
            device="cuda",
            device_index=list(range(len(free))),
            compute_type="float16",
            num_workers=num_workers,
            n_mels=80,
            is_multilingual=True,
        )
        monkeypatch.setattr(mempool, "free_memory", lambda index: (free[index], 2**34))
        return replace(model, whisper=whisper)

    def test_it_grows_with_free_memory_and_shrinks_with_workers_and_beams(self, monkeypatch):
        model = self.on_gpus(monkeypatch, [2**31])
        assert model.fitting_batch(1000, 3000) > 100
        assert model.fitting_batch(8, 3000) == 8
        assert model.fitting_batch(1000, 500) > model.fitting_batch(1000, 3000)
        assert model.fitting_batch(1000, beam_size=1) > model.fitting_batch(1000)
        three = self.on_gpus(monkeypatch, [2**31], 3)
        assert three.fitting_batch(1000) < model.fitting_batch(1000) / 2.5

    def test_of_several_gpus_the_fullest_counts(self, monkeypatch):
        one = self.on_gpus(monkeypatch, [2**30]).fitting_batch(1000)
        assert self.on_gpus(monkeypatch, [2**33, 2**30]).fitting_batch(1000) == one

    def test_the_weights_are_not_counted_twice(self, monkeypatch):
        model = self.on_gpus(monkeypatch, [2**30])
        seen = []
        monkeypatch.setattr(
            models, "fit", lambda shape, memory, *_, **__: seen.append(memory) or 1 / 0
        )
        with pytest.raises(ZeroDivisionError):
            model.fitting_batch(4)
        assert seen == [2**30 + footprint(model.shape, "float16").weights]

    def test_a_full_gpu_leaves_one_window(self, monkeypatch):
        assert self.on_gpus(monkeypatch, [2**20]).fitting_batch(16) == 1

    def test_what_is_not_known_does_not_limit(self, monkeypatch):
        model = self.on_gpus(monkeypatch, [2**30])
        assert replace(model, shape=None).fitting_batch(16) == 16

        def refuse(index):
            raise GpuError("unknown")

        monkeypatch.setattr(mempool, "free_memory", refuse)
        assert model.fitting_batch(16) == 16

    def test_on_the_cpu_it_is_the_memory_of_the_process(self, monkeypatch):
        model = load(device="cpu")
        monkeypatch.setattr(models, "usable_memory", lambda: 2**30)
        few = model.fitting_batch(1000)
        monkeypatch.setattr(models, "usable_memory", lambda: 2**31)
        assert 2 * few <= model.fitting_batch(1000) <= 2 * few + 2
        monkeypatch.setattr(models, "usable_memory", lambda: 2**20)
        assert model.fitting_batch(1000) == 1

    def test_bad_numbers_are_named(self):
        with pytest.raises(OptionError, match="batch: must be a whole number from 1, not 0"):
            load(device="cpu").fitting_batch(0)
        with pytest.raises(OptionError, match="audio_positions: must be a whole number from 1 to"):
            load(device="cpu").fitting_batch(4, 3002)


def test_a_model_tells_its_shape(contents):
    shape = load().shape
    assert (shape.d_model, shape.n_mels) == (192, 80)
    assert load("in memory", files=contents).shape == shape


@pytest.mark.parametrize("index", [2, -1, [0, 2], [], "0", [None], 0.5])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("compute_type", ["default", "auto"])
def test_a_device_that_does_not_exist_is_an_option_error(gpus, index, device, compute_type):
    gpus(2)
    if index == 0.5:
        index = [0.5]
    message = failure(OptionError, device=device, device_index=index, compute_type=compute_type)
    last = 1 if device == "cuda" else 0
    assert message.startswith("device_index: must be a number or list of numbers from 0 to")
    assert f"from 0 to {last} on {device}, not {index!r}" in message


@pytest.mark.parametrize(
    ("option", "value"),
    [
        *[("cpu_threads", value) for value in (-1, 1.5, "2", None, True)],
        *[("num_workers", value) for value in (0, -1, 1.5, "2", None, True)],
    ],
)
def test_a_wrong_number_of_threads_is_an_option_error(option, value):
    message = failure(OptionError, **{option: value})
    assert re.fullmatch(rf"{option}: must be a whole number from [01], not {value!r}", message)


def test_an_argument_that_ctranslate2_does_not_know_is_an_option_error():
    message = failure(OptionError, colour="red")
    assert message == "model_kwargs: ctranslate2.models.Whisper does not take {'colour': 'red'}"


def test_arguments_for_ctranslate2_reach_it():
    assert load(device="cpu", max_queued_batches=-1).whisper.device == "cpu"
