"""What a Whisper model needs of a device's memory, and what fits.

`read_shape` reads the dimensions of a model from the head of its ``model.bin``, `footprint` turns
them into bytes for a compute type, and `fit` chooses compute type, batch sizes and the sizes of the
pools for a given amount of memory, on a GPU as on the CPU. Nothing here asks or changes a device.

The formulas follow CTranslate2's layers, which are the same code on all devices; the tests compare
them with what it takes on the CPU.
"""

from __future__ import annotations

import io
import math
import os
import re
import struct
from collections.abc import Collection
from dataclasses import dataclass
from numbers import Integral
from os import PathLike
from typing import BinaryIO

from .errors import ModelLoadError, OptionError, PoolExhausted

__all__ = ["COMPUTE_TYPES", "Fit", "Footprint", "ModelShape", "fit", "footprint", "read_shape"]

COMPUTE_TYPES = {  # bytes of an element of (the large weights, everything else)
    "float32": (4, 4),
    "float16": (2, 2),
    "bfloat16": (2, 2),
    "int16": (2, 4),
    "int8": (1, 4),
    "int8_float32": (1, 4),
    "int8_float16": (1, 2),
    "int8_bfloat16": (1, 2),
}
"""Bytes of an element of the quantized weights, and of the other weights and the activations."""

PREFERENCE = {
    "cuda": ("float16", "bfloat16", "int8_float16", "int8_bfloat16", "float32", "int8_float32"),
    "cpu": ("int8_float32", "int8", "int16", "float32"),
}
"""The types that `fit` tries, the first one that fits being the best choice on that device."""

# CTranslate2 pads the output layer to a multiple of this for the tensor cores, and so copies it.
_OUTPUT_MULTIPLE = {"cuda": 16, "cpu": 1}

# Of everything, for what rounding and fragmentation take.
_HEADROOM = 0.1

# CUDA's kernels and cuBLAS's handles and workspaces, which no pool of CTranslate2's contains.
_DEVICE_OVERHEAD = {"cuda": 256 << 20, "cpu": 0}

_CHUNK = 2 << 20  # what CUDA and our pools map at once

_VERSIONS = (4, 5, 6)  # of the format; they differ in other files
_LONGEST_NAME = 1 << 10
_TYPES = ("float32", "int8", "int16", "int32", "float16", "bfloat16")
_FLOATS = ("float32", "float16", "bfloat16")
_TYPE_BYTES = (4, 1, 2, 4, 2, 2)


@dataclass(frozen=True)
class ModelShape:
    """Dimensions of a Whisper model.

    Attributes
    ----------
    n_mels
        Mel bands that the encoder takes.
    d_model
        Width of the layers.
    encoder_layers, encoder_heads, decoder_layers, decoder_heads
        Number of layers, and of attention heads in each.
    n_vocabulary
        Number of tokens.
    audio_positions
        Most positions of an encoded window: 1500 for 30 s.
    text_positions
        Most tokens of prompt and text together.
    quantized, rows
        Elements of the weights that 8-bit types quantize, and of their scales.
    others
        Elements of all other weights.
    saved_as
        Compute type that the file was written with.
    """

    n_mels: int
    d_model: int
    encoder_layers: int
    encoder_heads: int
    decoder_layers: int
    decoder_heads: int
    n_vocabulary: int
    audio_positions: int
    text_positions: int
    quantized: int
    rows: int
    others: int
    saved_as: str

    @property
    def parameters(self) -> int:
        """Number of weights."""
        return self.quantized + self.others


@dataclass(frozen=True)
class Footprint:
    """Bytes that a model needs with one compute type, all of them upper bounds.

    Attributes
    ----------
    weights
        Once per device.
    worker
        Once per worker (`num_workers`): a copy of the output layer, where CTranslate2 pads it.
    features
        A window of log-mel features, as the encoder takes it.
    encode
        The encoder at work, per window of the batch, with its input and output.
    decode
        The decoder at work, per window of the batch, with the encoded window.
    align
        Finding the times of words, per window of the batch, with the encoded window.
    cross_attention
        The part of `decode` that is kept from the first to the last token.
    """

    weights: int
    worker: int
    features: int
    encode: int
    decode: int
    align: int
    cross_attention: int


@dataclass(frozen=True)
class Fit:
    """What fits into an amount of memory.

    Attributes
    ----------
    compute_type
        The type to load the model with.
    encode_batch, decode_batch, align_batch
        Most windows in one call, of each kind, while all workers are busy with such a call.
    inference_bytes
        What CTranslate2 may need at most, at these batch sizes: the limit for its memory.
    pool_bytes
        Room in a `GpuMemoryPool` for the features of two batches per worker, so that one can be
        copied while the other is encoded.
    footprint
        What was calculated with.
    """

    compute_type: str
    encode_batch: int
    decode_batch: int
    align_batch: int
    inference_bytes: int
    pool_bytes: int
    footprint: Footprint


def read_shape(model: str | PathLike[str] | bytes | BinaryIO) -> ModelShape:
    """Read a model's dimensions from the descriptions of its weights; the weights are skipped.

    Parameters
    ----------
    model
        A model directory in CTranslate2's format, its ``model.bin``, or that file's content.

    Raises
    ------
    ModelLoadError
        If it cannot be read, or is not a Whisper model in CTranslate2's format.
    """
    if isinstance(model, bytes):
        return _read_shape(io.BytesIO(model), "model.bin")
    if not isinstance(model, (str, PathLike)):
        return _read_shape(model, "model.bin")
    path = os.fsdecode(model)
    if os.path.isdir(path):  # noqa: PTH112
        path = os.path.join(path, "model.bin")  # noqa: PTH118
    try:
        with open(path, "rb") as file:  # noqa: PTH123
            return _read_shape(file, path)
    except OSError as error:
        raise ModelLoadError(f"{path}: cannot be read: {error}") from error


def _read_shape(file: BinaryIO, name: str) -> ModelShape:
    try:
        variables = _read_variables(file)
        return _to_shape(variables)
    except (ValueError, KeyError, IndexError, struct.error, UnicodeDecodeError) as error:
        reason = f"{error.args[0]!r} is missing" if isinstance(error, KeyError) else error
        raise ModelLoadError(
            f"{name}: is not a whole Whisper model in CTranslate2's format: {reason}"
        ) from error


@dataclass(frozen=True)
class _Variable:
    size: tuple[int, ...]
    type: str
    value: int  # of a scalar that is a whole number

    @property
    def elements(self) -> int:
        return math.prod(self.size)


def _read_variables(file: BinaryIO) -> dict[str, _Variable]:
    """Read the descriptions of all variables.

    The format is that of ``ModelSpec._serialize`` in ctranslate2/specs/model_spec.py.
    """

    def read(form: str) -> int:
        [value] = struct.unpack("<" + form, file.read(struct.calcsize(form)))
        return int(value)

    def read_name() -> str:
        length = read("H")
        if not 0 < length <= _LONGEST_NAME:
            raise ValueError(f"a name of {length} bytes")
        return file.read(length)[:-1].decode()

    version = read("I")
    if version not in _VERSIONS:
        raise ValueError(f"version {version} of the binary format, not 4 to 6")
    specification = read_name()
    if specification != "WhisperSpec":
        raise ValueError(f"it holds a {specification!r}")
    read("I")  # the specification's revision
    variables = {}
    for _ in range(read("I")):
        name = read_name()
        size = tuple(read("I") for _ in range(read("B")))
        index, n_bytes = read("B"), read("I")
        if index >= len(_TYPES) or n_bytes != math.prod(size) * _TYPE_BYTES[index]:
            raise ValueError(f"{name}: {n_bytes} bytes for {size} elements of type {index}")
        value = 0
        if size:
            file.seek(n_bytes, io.SEEK_CUR)
        else:
            data = file.read(n_bytes)
            value = int.from_bytes(data, "little") if _TYPES[index] not in _FLOATS else 0
        variables[name] = _Variable(size, _TYPES[index], value)
    read("I")  # the number of aliases follows: what is before it is all there
    return variables


def _to_shape(variables: dict[str, _Variable]) -> ModelShape:
    def count_layers(part: str) -> int:
        layer = re.compile(rf"{part}/layer_(\d+)/")
        found = {match[1] for name in variables if (match := layer.match(name))}
        if not found:
            raise KeyError(f"{part}/layer_0")
        return len(found)

    def count_heads(part: str, d_model: int) -> int:
        heads = variables[f"{part}/num_heads"].value
        if not heads or d_model % heads:
            raise ValueError(f"{heads} attention heads in a width of {d_model}")
        return heads

    conv = variables["encoder/conv1/weight"]
    d_model, n_mels = conv.size[0], conv.size[1]
    weights, rest = [], []
    for name, variable in variables.items():
        if name.endswith("weight") and "conv" not in name and len(variable.size) == 2:
            weights.append(variable)
        elif variable.size and not name.endswith("_scale"):
            rest.append(variable)
    saved = variables["decoder/embeddings/weight"].type
    if saved == "int8":
        saved = f"int8_{variables['encoder/conv1/bias'].type}"
    shape = ModelShape(
        n_mels=n_mels,
        d_model=d_model,
        encoder_layers=count_layers("encoder"),
        encoder_heads=count_heads("encoder", d_model),
        decoder_layers=count_layers("decoder"),
        decoder_heads=count_heads("decoder", d_model),
        n_vocabulary=variables["decoder/embeddings/weight"].size[0],
        audio_positions=variables["encoder/position_encodings/encodings"].size[0],
        text_positions=variables["decoder/position_encodings/encodings"].size[0],
        quantized=sum(variable.elements for variable in weights),
        rows=sum(variable.size[0] for variable in weights),
        others=sum(variable.elements for variable in rest),
        saved_as=saved,
    )
    if saved not in COMPUTE_TYPES or not all(
        value for value in vars(shape).values() if isinstance(value, int)
    ):
        raise ValueError(f"its dimensions are {shape}")
    return shape


def footprint(
    shape: ModelShape,
    compute_type: str,
    *,
    device: str = "cuda",
    beam_size: int = 5,
    audio_positions: int | None = None,
    tokens: int | None = None,
) -> Footprint:
    """Calculate what a model needs.

    Parameters
    ----------
    shape
        The model.
    compute_type
        One of `COMPUTE_TYPES`; ``"int8"`` is counted with activations in float32.
    device
        ``"cuda"`` or ``"cpu"``.
    beam_size
        Beams, or with sampling the number of hypotheses, per window.
    audio_positions
        Positions of an encoded window, half as many as frames of features; by default the model's
        most, for 30 s.
    tokens
        Most tokens of prompt and text together, per window; by default the model's most. A window
        of speech rarely has more than a hundred.

    Raises
    ------
    OptionError
        If an option is unknown or out of range.

    Notes
    -----
    With d = d_model, T = audio_positions, N = tokens, P the smaller of N and half of the model's
    most tokens (the bound of either prompt or text), V = n_vocabulary, L layers and h heads (of
    encoder or decoder), e bytes of an activation, and X = T d e, one tensor of the encoder's width:

    ======== =====================================================================================
    weights  quantized and other elements in their sizes, and 8 bytes per row for an 8-bit type
    worker   V d bytes of a weight, if V is no multiple of 16 (CUDA only)
    features 2 T n_mels e
    encode   the larger of attention, h T² e + 8 X, and feed-forward, 6 X, and 20 T d more for an
             8-bit type; and the features as they came (in float32) and in type of the activations
    decode   cross-attention's keys and values, 2 L X; the encoded window and its copy, 2 X; and
             the larger of the prompt in one pass, 2 X + h P T e + 6 P d e, and the beams, each with
             2 L N d e (and one part of 2 L more while they are reordered) and V (e + 8) of scores
    align    attention in one layer and that of the heads used, 2 h P T e; 8 X; and probabilities,
             P V (e + 4)
    ======== =====================================================================================

    Rounding of each block by the allocator comes on top, which is 1 to 4 % of the weights.
    """
    weight_bytes, e = _element_bytes(compute_type)
    _check_device(device)
    _check_count("beam_size", beam_size)
    positions = shape.audio_positions if audio_positions is None else audio_positions
    _check_count("audio_positions", positions, shape.audio_positions)
    length = shape.text_positions if tokens is None else tokens
    _check_count("tokens", length, shape.text_positions)
    part = min(length, shape.text_positions // 2)
    d, n_vocabulary = shape.d_model, shape.n_vocabulary
    is_8_bit = weight_bytes == 1

    encoded = positions * d * e
    features = 2 * positions * shape.n_mels
    attention = shape.encoder_heads * positions * positions * e + 8 * encoded
    feed_forward = 6 * encoded + (20 * positions * d if is_8_bit else 0)

    cross_attention = 2 * shape.decoder_layers * encoded
    token_scores = shape.decoder_heads * part * positions * e
    prompt = 2 * encoded + token_scores + 6 * part * d * e
    beam = (2 * shape.decoder_layers + 1) * length * d * e + n_vocabulary * (e + 8)
    return Footprint(
        weights=shape.quantized * weight_bytes
        + shape.others * e
        + (8 * shape.rows if is_8_bit else 0),
        worker=n_vocabulary * d * weight_bytes if n_vocabulary % _OUTPUT_MULTIPLE[device] else 0,
        features=features * e,
        encode=features * (4 + e) + max(attention, feed_forward),
        decode=cross_attention + 2 * encoded + max(prompt, beam_size * beam),
        align=2 * token_scores + 8 * encoded + part * n_vocabulary * (e + 4),
        cross_attention=cross_attention,
    )


def fit(
    shape: ModelShape,
    memory: int,
    compute_types: Collection[str],
    *,
    device: str = "cuda",
    batch: int = 16,
    num_workers: int = 1,
    beam_size: int = 5,
    audio_positions: int | None = None,
    tokens: int | None = None,
) -> Fit:
    """Choose what to load a model with, and how much to do at once.

    Parameters
    ----------
    shape
        The model.
    memory
        Bytes that may be used: what is free on the GPU, or a limit.
    compute_types
        The types to choose from: those that the device supports (see
        `ctranslate2.get_supported_compute_types`), or a single one.
    device
        ``"cuda"`` or ``"cpu"``.
    batch
        Most windows that are wanted in one call.
    num_workers
        Calls that may run at the same time, as of `load_model`.
    beam_size, audio_positions, tokens
        As of `footprint`.

    Returns
    -------
    Fit
        With the first type in the device's order of preference, `PREFERENCE`, that leaves room for
        the wanted batch; if none does, with the one that leaves room for most.

    Raises
    ------
    PoolExhausted
        If not even a single window fits with any of the types.
    OptionError
        If none of the types is known, or an option is out of range.

    Notes
    -----
    A tenth of the memory is left for what rounding and fragmentation take, and on a GPU another 256
    MiB for CUDA's kernels and cuBLAS.
    """
    _check_device(device)
    _check_count("memory", memory)
    _check_count("batch", batch)
    _check_count("num_workers", num_workers)
    types = [name for name in PREFERENCE[device] if name in compute_types]
    types += [name for name in COMPUTE_TYPES if name in compute_types and name not in types]
    if not types:
        raise OptionError(
            f"compute_types: none of {sorted(compute_types)} is known; use some of "
            f"{', '.join(COMPUTE_TYPES)}"
        )
    fits = [
        _fit_type(
            name,
            footprint(
                shape,
                name,
                device=device,
                beam_size=beam_size,
                audio_positions=audio_positions,
                tokens=tokens,
            ),
            int(memory * (1 - _HEADROOM)) - _DEVICE_OVERHEAD[device],
            batch,
            num_workers,
        )
        for name in types
    ]
    # The first of those that are as good: the order is that of preference.
    best = max(fits, key=_windows)
    if not _windows(best):
        least = min(_least_bytes(found.footprint, device, num_workers) for found in fits)
        raise PoolExhausted(
            f"the model needs {math.ceil(least / (1 << 20))} MiB on {device} with {num_workers} "
            f"worker(s), and {memory >> 20} MiB are free; use a smaller model, fewer workers or "
            "another device"
        )
    return best


def _fit_type(
    compute_type: str, needs: Footprint, usable: int, batch: int, num_workers: int
) -> Fit:
    """Divide the usable memory among the workers."""
    room = (usable - needs.weights - _CHUNK) // num_workers - needs.worker
    staged = 2 * needs.features
    # Beside the features of the batch, a single window must find room in the other calls, too.
    beside = (room - max(needs.decode, needs.align)) // staged
    encode_batch = _bounded(min(room // (needs.encode + staged), beside), batch)
    pool = encode_batch * staged
    decode_batch = _bounded((room - pool) // needs.decode, batch)
    align_batch = _bounded((room - pool) // needs.align, batch)
    busiest = max(
        encode_batch * needs.encode, decode_batch * needs.decode, align_batch * needs.align
    )
    return Fit(
        compute_type=compute_type,
        encode_batch=encode_batch,
        decode_batch=decode_batch,
        align_batch=align_batch,
        inference_bytes=needs.weights + num_workers * (needs.worker + busiest),
        pool_bytes=_in_chunks(num_workers * pool),
        footprint=needs,
    )


def _windows(found: Fit) -> int:
    """Return how many windows can be transcribed at once; 0 if their words cannot be timed."""
    return min(found.encode_batch, found.decode_batch) if found.align_batch else 0


def _least_bytes(needs: Footprint, device: str, num_workers: int) -> int:
    """Return the memory with which `fit` finds room for single windows."""
    window = max(needs.encode, needs.decode, needs.align) + 2 * needs.features
    used = needs.weights + _CHUNK + num_workers * (needs.worker + window)
    return math.ceil((used + _DEVICE_OVERHEAD[device] + 1) / (1 - _HEADROOM))


def _bounded(count: int, most: int) -> int:
    return max(0, min(count, most))


def _in_chunks(size: int) -> int:
    return -(-size // _CHUNK) * _CHUNK


def _element_bytes(compute_type: str) -> tuple[int, int]:
    if compute_type not in COMPUTE_TYPES:
        raise OptionError(
            f"compute_type: {compute_type!r} is unknown; use one of {', '.join(COMPUTE_TYPES)}"
        )
    return COMPUTE_TYPES[compute_type]


def _check_device(device: str) -> None:
    if device not in PREFERENCE:
        raise OptionError(f"device: {device!r} is unknown; use one of {', '.join(PREFERENCE)}")


def _check_count(option: str, value: object, most: int | None = None) -> None:
    good = isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= 1
    if not good or (most is not None and int(value) > most):  # type: ignore[call-overload]
        upper = "" if most is None else f" to {most}"
        raise OptionError(f"{option}: must be a whole number from 1{upper}, not {value!r}")
