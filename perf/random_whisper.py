"""Writes Whisper models of the real encoder shapes with random weights, for performance work.

    python perf/random_whisper.py [--tokenizer DIRECTORY] [--tokens N] SHAPE DIRECTORY

The vocabulary is that of the embedded model unless a directory with another one's `tokenizer.json`
and `vocabulary.json` is given. Random weights never end a transcript by themselves; a number of
tokens makes the model end each one there, so that all who decode with it do the same work.
"""

import argparse
import json
import shutil
from pathlib import Path

import ctranslate2
import numpy as np

import speechrnt

N_MELS = 80
_LANGUAGES = ("en", "de", "es", "fr")  # that the embedded model knows
SHAPES = {  # d_model, heads, layers of the encoder, and of the decoder
    "tiny": (384, 6, 4),
    "base": (512, 8, 6),
    "small": (768, 12, 12),
}

# <|startoftranscript|>, language, task, <|notimestamps|>
_PROMPT_LENGTH = 4

# What makes <|endoftext|> impossible before its place, and certain there: far more than the layers
# add to this dimension.
_END_DIMENSION = 0
_END_POSITION = 30.0
_END_WEIGHT = 30.0


def write_model(shape, directory, seed=0, decoder_layers=None, tokenizer=None, n_tokens=None):
    """Write a model with int8 weights.

    Parameters
    ----------
    shape
        One of `SHAPES`.
    directory
        Where to.
    seed
        Of the weights.
    decoder_layers
        None: the shape's.
    tokenizer
        Directory of the vocabulary; None: the embedded model's.
    n_tokens
        Length of every transcript that is decoded without text before it and without timestamps;
        None: up to the limits of the call.
    """
    d_model, n_heads, n_layers = SHAPES[shape]
    pico = Path(speechrnt.download_model("pico"))
    tokenizer = pico if tokenizer is None else Path(tokenizer)
    tokens = json.loads((tokenizer / "vocabulary.json").read_text(encoding="utf-8"))
    rng = np.random.default_rng(seed)

    def weights(*size):
        fan_in = np.prod(size[1:])
        return rng.standard_normal(size, dtype=np.float32) / np.sqrt(fan_in, dtype=np.float32)

    def fill_norm(norm):
        norm.gamma, norm.beta = np.ones(d_model, np.float32), np.zeros(d_model, np.float32)

    def fill_linear(linear, n_out, n_in=d_model):
        linear.weight, linear.bias = weights(n_out, n_in), np.zeros(n_out, np.float32)

    def fill_layer(layer):
        fill_norm(layer.self_attention.layer_norm)
        fill_linear(layer.self_attention.linear[0], 3 * d_model)
        fill_linear(layer.self_attention.linear[1], d_model)
        fill_norm(layer.ffn.layer_norm)
        fill_linear(layer.ffn.linear_0, 4 * d_model)
        fill_linear(layer.ffn.linear_1, d_model, 4 * d_model)

    spec = ctranslate2.specs.WhisperSpec(n_layers, n_heads, decoder_layers or n_layers, n_heads)
    encoder, decoder = spec.encoder, spec.decoder
    encoder.conv1.weight, encoder.conv1.bias = weights(d_model, N_MELS, 3), weights(d_model)
    encoder.conv2.weight, encoder.conv2.bias = weights(d_model, d_model, 3), weights(d_model)
    encoder.position_encodings.encodings = weights(1500, d_model)
    fill_norm(encoder.layer_norm)
    for layer in encoder.layer:
        fill_layer(layer)
    decoder.embeddings.weight = weights(len(tokens), d_model)
    decoder.projection.weight = decoder.embeddings.weight
    decoder.position_encodings.encodings = weights(448, d_model)
    if n_tokens is not None:
        # The token after the last one of the prompt is predicted there.
        past = _PROMPT_LENGTH - 1 + n_tokens
        end = tokens.index("<|endoftext|>")
        decoder.position_encodings.encodings[:past, _END_DIMENSION] = -_END_POSITION
        decoder.position_encodings.encodings[past:, _END_DIMENSION] = _END_POSITION
        decoder.embeddings.weight[:, _END_DIMENSION] = 0
        decoder.embeddings.weight[end, _END_DIMENSION] = _END_WEIGHT
    fill_norm(decoder.layer_norm)
    for layer in decoder.layer:
        fill_layer(layer)
        fill_norm(layer.attention.layer_norm)
        fill_linear(layer.attention.linear[0], d_model)
        fill_linear(layer.attention.linear[1], 2 * d_model)
        fill_linear(layer.attention.linear[2], d_model)

    spec.config.lang_ids = [tokens.index(f"<|{language}|>") for language in _LANGUAGES]
    spec.register_vocabulary(tokens)
    spec.validate()
    spec.optimize(quantization="int8")
    Path(directory).mkdir(parents=True, exist_ok=True)
    spec.save(str(directory))
    shutil.copy(tokenizer / "tokenizer.json", directory)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokenizer", type=Path, metavar="DIRECTORY")
    parser.add_argument("--tokens", type=int, metavar="N", help="length of every transcript")
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("directory", type=Path)
    arguments = parser.parse_args()
    write_model(
        arguments.shape,
        arguments.directory,
        tokenizer=arguments.tokenizer,
        n_tokens=arguments.tokens,
    )
