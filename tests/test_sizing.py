"""What models need and what fits: real dimensions, real allocations on the CPU, damaged files."""

import io
import json
import os
import platform
import struct
import subprocess
import sys
from pathlib import Path

import ctranslate2
import pytest

from speechrnt import sizing
from speechrnt.errors import ModelLoadError, OptionError, PoolExhausted
from speechrnt.hub import EMBEDDED_MODELS
from speechrnt.sizing import COMPUTE_TYPES, fit, footprint, read_shape

ROOT = Path(__file__).parent.parent
PICO = EMBEDDED_MODELS["pico"]
MIB, GIB = 2**20, 2**30

# d_model, heads, layers of encoder and decoder, mel bands, vocabulary; and the parameters that
# Hugging Face counts in the models of these names.
STOCK = {
    "tiny": (384, 6, 4, 4, 80, 51865, 37_760_640),
    "tiny.en": (384, 6, 4, 4, 80, 51864, 37_760_256),
    "base": (512, 8, 6, 6, 80, 51865, 72_593_920),
    "small": (768, 12, 12, 12, 80, 51865, 241_734_912),
    "medium": (1024, 16, 24, 24, 80, 51865, 763_857_920),
    "large-v3": (1280, 20, 32, 32, 128, 51866, 1_543_490_560),
    "large-v3-turbo": (1280, 20, 32, 4, 128, 51866, 808_878_080),
}


def write_head(file, name, saved_as="float16"):
    """Write the model.bin of a stock model, with holes in the file instead of the weights."""
    d, heads, encoder_layers, decoder_layers, n_mels, vocabulary, _ = STOCK[name]
    types = {"float32": (0, 4), "int8": (1, 1), "int16": (2, 2), "float16": (4, 2)}
    weight_type = types[saved_as.split("_")[0]]
    float_type = types["float16" if "float16" in saved_as else "float32"]
    is_8_bit = saved_as.startswith("int8")
    variables = []

    def add(name, *size, kind=None):
        variables.append((name, size, kind or float_type))

    def add_norm(name):
        add(f"{name}/beta", d)
        add(f"{name}/gamma", d)

    def add_weight(name, rows, columns):
        add(f"{name}/weight", rows, columns, kind=weight_type)
        if is_8_bit:
            add(f"{name}/weight_scale", rows, kind=types["float32"])

    def add_linear(name, rows, columns=d):
        add(f"{name}/bias", rows)
        add_weight(name, rows, columns)

    for part, layers in (("decoder", decoder_layers), ("encoder", encoder_layers)):
        add(f"{part}/num_heads", kind=types["int16"])
        add_norm(f"{part}/layer_norm")
        add(f"{part}/position_encodings/encodings", 448 if part == "decoder" else 1500, d)
        for layer in (f"{part}/layer_{index}" for index in range(layers)):
            for attention in ["self_attention", "attention"][: 1 + (part == "decoder")]:
                add_norm(f"{layer}/{attention}/layer_norm")
                sizes = (3 * d, d) if attention == "self_attention" else (d, 2 * d, d)
                for index, rows in enumerate(sizes):
                    add_linear(f"{layer}/{attention}/linear_{index}", rows)
            add_norm(f"{layer}/ffn/layer_norm")
            add_linear(f"{layer}/ffn/linear_0", 4 * d)
            add_linear(f"{layer}/ffn/linear_1", d, 4 * d)
    add_weight("decoder/embeddings", vocabulary, d)
    for index, columns in ((1, n_mels), (2, d)):
        add(f"encoder/conv{index}/bias", d)
        add(f"encoder/conv{index}/weight", d, columns, 3)

    def write_string(text):
        file.write(struct.pack("<H", len(text) + 1) + text.encode() + b"\0")

    file.write(struct.pack("<I", 6))
    write_string("WhisperSpec")
    file.write(struct.pack("<II", 3, len(variables)))
    for variable, size, (index, width) in variables:
        write_string(variable)
        file.write(struct.pack(f"<B{len(size)}IB", len(size), *size, index))
        n_bytes = width
        for extent in size:
            n_bytes *= extent
        file.write(struct.pack("<I", n_bytes))
        if size:
            file.seek(n_bytes, os.SEEK_CUR)
        else:
            file.write(struct.pack("<H", heads))
    file.write(struct.pack("<I", 1))
    write_string("decoder/projection/weight")
    write_string("decoder/embeddings/weight")


@pytest.fixture(scope="module")
def stock(tmp_path_factory):
    """A function that gives the shape of a stock model."""
    shapes = {}

    def shape(name, saved_as="float16"):
        if (name, saved_as) not in shapes:
            path = tmp_path_factory.mktemp("stock") / "model.bin"
            with path.open("wb") as file:
                write_head(file, name, saved_as)
            shapes[name, saved_as] = read_shape(path)
        return shapes[name, saved_as]

    return shape


# Shapes


def test_the_shape_of_the_embedded_model_is_that_of_its_loaded_weights():
    shape = read_shape(PICO)
    assert shape == read_shape(PICO / "model.bin") == read_shape((PICO / "model.bin").read_bytes())
    assert shape == read_shape(io.BytesIO((PICO / "model.bin").read_bytes()))
    whisper = ctranslate2.models.Whisper(str(PICO), intra_threads=1)
    assert shape.n_mels == whisper.n_mels
    assert shape.saved_as == whisper.compute_type
    assert shape.n_vocabulary == len(json.loads((PICO / "vocabulary.json").read_bytes()))
    assert (shape.d_model, shape.audio_positions, shape.text_positions) == (192, 1500, 448)
    assert (shape.encoder_layers, shape.encoder_heads) == (4, 3)
    assert (shape.decoder_layers, shape.decoder_heads) == (2, 3)
    # What is not counted are names, sizes, scalars, and the convolutions' 8-bit weights.
    size = (PICO / "model.bin").stat().st_size
    convolutions = 3 * 192 * (80 + 192)
    counted = shape.quantized + 4 * (shape.rows + shape.others) - 3 * convolutions
    assert counted == pytest.approx(size, rel=0.005)


@pytest.mark.parametrize("name", STOCK)
@pytest.mark.parametrize("saved_as", ["float16", "float32", "int8_float16", "int8_float32"])
def test_the_shapes_of_stock_models(stock, name, saved_as):
    d_model, heads, encoder_layers, decoder_layers, n_mels, vocabulary, parameters = STOCK[name]
    shape = stock(name, saved_as)
    assert (shape.d_model, shape.n_mels, shape.n_vocabulary) == (d_model, n_mels, vocabulary)
    assert (shape.encoder_layers, shape.encoder_heads) == (encoder_layers, heads)
    assert (shape.decoder_layers, shape.decoder_heads) == (decoder_layers, heads)
    assert shape.saved_as == saved_as
    # CTranslate2 stores a bias of zeros with each key projection.
    assert shape.parameters == parameters + (encoder_layers + 2 * decoder_layers) * d_model


def test_earlier_versions_of_the_format_are_read_alike():
    for version in b"\4\5":
        assert read_shape(bytes([version]) + HEAD[1:]) == read_shape(HEAD)


HEADS = b"encoder/num_heads\0\0"  # a scalar: type, size and value follow
HEAD = (PICO / "model.bin").read_bytes()


def renamed(old, new):
    return HEAD.replace(old, new)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is not a whole Whisper model"),
        (b"\6\0\0\0", "is not a whole Whisper model"),
        (HEAD[:4000], "is not a whole Whisper model"),
        (HEAD[: len(HEAD) // 2], "is not a whole Whisper model"),
        (HEAD[:-70], "is not a whole Whisper model"),
        (b"\3" + HEAD[1:], "version 3 of the binary format, not 4 to 6"),
        (b"PK\3\4" * 1000, "of the binary format, not 4 to 6"),
        (renamed(b"WhisperSpec\0", b"WhosperSpec\0"), "it holds a 'WhosperSpec'"),
        (renamed(b"WhisperSpec\0", b"Whisper\xff\xfe\xff\xff\0"), "can't decode"),
        (renamed(b"encoder/num_heads\0", b"encoder/num_heaps\0"), "num_heads' is missing"),
        (renamed(b"encoder/layer_", b"encoder/layar_"), "'encoder/layer_0' is missing"),
        (renamed(HEADS + b"\2\2\0\0\0\3", HEADS + b"\2\2\0\0\0\5"), "5 attention heads"),
        (renamed(HEADS + b"\2\2\0\0\0\3", HEADS + b"\2\2\0\0\0\0"), "0 attention heads"),
        (renamed(HEADS + b"\2", HEADS + b"\x09"), "of type 9"),
        (renamed(HEADS + b"\2\2", HEADS + b"\2\7"), "7 bytes for"),
        (renamed(b"encoder/conv1/weight\0\3", b"encoder/conv1/weight\0\2"), "bytes for"),
    ],
)
def test_what_is_no_model_is_refused(tmp_path, content, message):
    path = tmp_path / "model.bin"
    path.write_bytes(content)
    with pytest.raises(ModelLoadError, match=message) as caught:
        read_shape(path)
    assert str(path) in str(caught.value)
    with pytest.raises(ModelLoadError, match=message):
        read_shape(content)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ModelLoadError, match=r"none/model\.bin: cannot be read: "):
        read_shape(tmp_path / "none" / "model.bin")
    with pytest.raises(ModelLoadError, match=r"model\.bin: cannot be read: "):
        read_shape(tmp_path)


# Bytes


@pytest.mark.parametrize(
    ("name", "megabytes"),
    [("tiny", 9), ("base", 18), ("small", 55), ("large-v3", 246), ("large-v3-turbo", 31)],
)
def test_cross_attention_takes_2_tensors_per_layer(stock, name, megabytes):
    shape = stock(name)
    needs = footprint(shape, "float16")
    assert round(needs.cross_attention / 1e6) == megabytes
    assert needs.cross_attention == 2 * shape.decoder_layers * 1500 * shape.d_model * 2
    assert needs.decode > needs.cross_attention


def test_types_differ_in_weights_and_activations(stock):
    shape = stock("large-v3")
    needs = {name: footprint(shape, name) for name in COMPUTE_TYPES}
    gigabytes = {name: round(each.weights / 1e9, 2) for name, each in needs.items()}
    assert gigabytes["float32"] == 6.17
    assert gigabytes["float16"] == gigabytes["bfloat16"] == 3.09
    assert gigabytes["int8_float16"] == 1.56
    assert gigabytes["int8_float32"] == gigabytes["int8"] == 1.58
    assert needs["float32"].decode == 2 * needs["float16"].decode - 8 * 5 * shape.n_vocabulary
    assert needs["int8_float16"].decode == needs["float16"].decode
    assert needs["float16"].features == 128 * 3000 * 2
    # 51866 is no multiple of 16, so the output layer has a padded copy on GPUs.
    assert needs["float16"].worker == 51866 * 1280 * 2
    assert footprint(shape, "float32", device="cpu").worker == 0


def test_less_audio_fewer_tokens_and_beams_need_less(stock):
    shape = stock("small")
    full = footprint(shape, "float16")
    short = footprint(shape, "float16", audio_positions=250)
    assert short.cross_attention * 6 == full.cross_attention
    assert short.encode * 6 < full.encode
    assert short.features * 6 == full.features
    few = footprint(shape, "float16", tokens=60)
    assert few.decode < full.decode
    assert few.align < full.align
    one = footprint(shape, "float16", beam_size=1)
    assert full.cross_attention < one.decode < full.decode
    assert few.weights == short.weights == one.weights == full.weights


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"compute_type": "float8"}, "compute_type: 'float8' is unknown; use one of float32, "),
        ({"compute_type": "default"}, "compute_type: 'default' is unknown"),
        ({"device": "tpu"}, "device: 'tpu' is unknown; use one of cuda, cpu"),
        ({"beam_size": 0}, "beam_size: must be a whole number from 1, not 0"),
        ({"beam_size": True}, "beam_size: must be a whole number from 1, not True"),
        ({"beam_size": 2.5}, "beam_size: must be a whole number from 1, not 2.5"),
        ({"audio_positions": 1501}, "audio_positions: must be a whole number from 1 to 1500"),
        ({"tokens": 449}, "tokens: must be a whole number from 1 to 448, not 449"),
        ({"tokens": "9"}, "tokens: must be a whole number from 1 to 448, not '9'"),
    ],
)
def test_bad_options_are_named(stock, options, message):
    with pytest.raises(OptionError, match=message):
        footprint(stock("tiny"), **{"compute_type": "float16"} | options)


MEASURE = """
import json, sys, threading
import numpy as np
from speechrnt import inference_memory, load_model

model = load_model(sys.argv[1], "cpu", sys.argv[2], cpu_threads=2)
batch, frames = int(sys.argv[3]), int(sys.argv[4])
in_use = lambda: inference_memory.statistics().in_use
weights = in_use()
encoding = model.encode(np.zeros((batch, 80, frames), np.float32))
encode = inference_memory.statistics().peak - weights

def measured(function):
    "Run it, and return the most memory in use, looked at all the time."
    before, most, done = in_use(), 0, threading.Event()
    def look():
        nonlocal most
        while not done.wait(0.0002):
            most = max(most, in_use())
    looking = threading.Thread(target=look)
    looking.start()
    function()
    done.set()
    looking.join()
    return most - before

tokenizer = model.tokenizer
token = lambda text: vocabulary.index(text)
vocabulary = json.load(open(sys.argv[1] + "/vocabulary.json"))
start = [token(f"<|{name}|>") for name in ("startoftranscript", "en", "transcribe")]
end = token("<|endoftext|>")
prompt = [token("<|startofprev|>"), *[100] * 220, *start, token("<|notimestamps|>")]
decode = measured(lambda: model.generate(
    encoding, [prompt] * batch, beam_size=5, suppress_blank=False, suppress_tokens=[end]))
align = measured(lambda: model.whisper.align(
    encoding, start, [[100] * 220] * batch, [frames] * batch))
print(json.dumps([weights, encode / batch, decode / batch, align / batch]))
"""


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A model with the layers of Whisper tiny, random weights and a small vocabulary."""
    sys.path.insert(0, str(ROOT / "perf"))
    try:
        import random_whisper
    finally:
        sys.path.pop(0)
    directory = tmp_path_factory.mktemp("tiny")
    random_whisper.write_model("tiny", directory, decoder_layers=4)
    config = json.loads((directory / "config.json").read_bytes())
    config["alignment_heads"] = [[2, 2], [3, 0], [3, 2], [3, 3], [3, 4], [3, 5]]  # those of tiny
    (directory / "config.json").write_text(json.dumps(config))
    return directory


@pytest.mark.skipif(
    sys.platform != "linux" or platform.machine() != "x86_64",
    reason="what CTranslate2 takes can be measured on x86-64 Linux only",
)
@pytest.mark.parametrize("compute_type", ["float32", "int8_float32"])
def test_what_ctranslate2_takes_is_just_below_the_bounds(tiny, compute_type):
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, tiny, compute_type, "2", "3000"],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])},
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    weights, encode, decode, align = json.loads(done.stdout)
    needs = footprint(read_shape(tiny), compute_type, device="cpu")
    # The pool's granules make blocks larger; small blocks are not in it.
    assert 0.65 * needs.weights < weights < 1.06 * needs.weights
    assert 0.9 * needs.encode < encode < needs.encode
    assert 0.85 * needs.decode < decode < needs.decode
    assert 0.6 * needs.align < align < needs.align


# What fits

GPU_TYPES = {"float32", "float16", "bfloat16", "int8", "int8_float32", "int8_float16"}


@pytest.mark.parametrize(
    ("name", "memory", "compute_type", "batch"),
    [
        ("large-v3", 80 * GIB, "float16", 16),
        ("large-v3", 24 * GIB, "float16", 16),
        ("large-v3", 8 * GIB, "int8_float16", 8),
        ("large-v3", 3 * GIB, "int8_float16", 1),
        ("large-v3-turbo", 8 * GIB, "float16", 16),
        ("small", 4 * GIB, "float16", 16),
        ("tiny", 3 * GIB, "float16", 16),
    ],
)
def test_the_first_type_that_leaves_room_is_taken(stock, name, memory, compute_type, batch):
    found = fit(stock(name), memory, GPU_TYPES)
    assert found.compute_type == compute_type
    assert min(found.encode_batch, found.decode_batch) == pytest.approx(batch, abs=2)


@pytest.mark.parametrize("name", STOCK)
@pytest.mark.parametrize("device", ["cuda", "cpu"])
@pytest.mark.parametrize("num_workers", [1, 3])
def test_what_is_chosen_fits_and_one_window_more_would_not(stock, name, device, num_workers):
    shape = stock(name)
    for memory in (1 * GIB, 3 * GIB, 9 * GIB, 33 * GIB):
        for compute_type in ("float16", "int8_float16", "float32"):
            options = {"device": device, "num_workers": num_workers, "batch": 10_000}
            try:
                found = fit(shape, memory, [compute_type], **options)
            except PoolExhausted:
                continue
            overhead = 256 * MIB if device == "cuda" else 0
            room = int(0.9 * memory) - overhead
            assert found.inference_bytes + found.pool_bytes <= room
            needs = found.footprint
            pool = num_workers * found.encode_batch * 2 * needs.features
            used = needs.weights + num_workers * needs.worker + pool + 2 * MIB
            more_decoded = (found.decode_batch + 1) * needs.decode
            more_aligned = (found.align_batch + 1) * needs.align
            more_encoded = 2 * needs.features + max(
                (found.encode_batch + 1) * needs.encode, needs.decode, needs.align
            )
            for more in (more_decoded, more_aligned, more_encoded):
                assert used + num_workers * more > room


def test_more_memory_never_makes_less_fit(stock):
    shape = stock("medium")
    best = (0, 0)
    for memory in range(2 * GIB, 20 * GIB, 512 * MIB):
        found = fit(shape, memory, ["float16", "int8_float16"], batch=12)
        now = (min(found.encode_batch, found.decode_batch), found.compute_type == "float16")
        assert now >= (best[0], 0)
        best = now
    assert best == (12, True)


def test_the_memory_with_which_a_model_fits_is_told(stock):
    for name in STOCK:
        with pytest.raises(PoolExhausted, match="and 1 MiB are free; use a smaller") as caught:
            fit(stock(name), MIB, ["float16", "int8_float16"])
        needed = int(str(caught.value).split(" needs ")[1].split(" MiB")[0]) * MIB
        found = fit(stock(name), needed, ["float16", "int8_float16"])
        assert found.compute_type == "int8_float16"
        assert min(found.encode_batch, found.decode_batch, found.align_batch) >= 1
        with pytest.raises(PoolExhausted):
            fit(stock(name), needed - 4 * MIB, ["float16", "int8_float16"])


def test_on_the_cpu_8_bits_come_first(stock):
    shape = stock("base", "int8_float32")
    assert fit(shape, 8 * GIB, {"float32", "int8_float32", "int8"}, device="cpu").compute_type == (
        "int8_float32"
    )
    assert fit(shape, 8 * GIB, {"float32"}, device="cpu").compute_type == "float32"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"memory": 0}, "memory: must be a whole number from 1, not 0"),
        ({"memory": -GIB}, "memory: must be a whole number from 1"),
        ({"memory": 1e9}, "memory: must be a whole number from 1, not 1000000000.0"),
        ({"batch": 0}, "batch: must be a whole number from 1, not 0"),
        ({"num_workers": 0}, "num_workers: must be a whole number from 1, not 0"),
        ({"device": "auto"}, "device: 'auto' is unknown; use one of cuda, cpu"),
        ({"compute_types": []}, r"compute_types: none of \[\] is known; use some of float32, "),
        ({"compute_types": ["fp4"]}, r"compute_types: none of \['fp4'\] is known"),
        ({"beam_size": -1}, "beam_size: must be a whole number from 1, not -1"),
    ],
)
def test_bad_demands_are_named(stock, options, message):
    arguments = {"memory": GIB, "compute_types": ["float16"]} | options
    with pytest.raises(OptionError, match=message):
        fit(stock("tiny"), **arguments)


def test_every_type_of_ctranslate2_is_known():
    types = set(ctranslate2.get_supported_compute_types("cpu"))
    assert types <= set(COMPUTE_TYPES)
    for preferred in sizing.PREFERENCE.values():
        assert set(preferred) <= set(COMPUTE_TYPES)
