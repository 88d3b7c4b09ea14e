"""Writes Whisper models of the real encoder shapes with random weights, for performance work.

    python perf/random_whisper.py SHAPE DIRECTORY

The decoder is a single layer unless told otherwise, and the vocabulary is that of the embedded
model.
"""

import argparse
import json
import shutil
from pathlib import Path

import ctranslate2
import numpy as np

import speechrnt

N_MELS = 80
SHAPES = {  # d_model, heads, encoder layers
    "tiny": (384, 6, 4),
    "base": (512, 8, 6),
    "small": (768, 12, 12),
}


def write_model(shape, directory, seed=0, decoder_layers=1):
    """Write a model to `directory`, with int8 weights."""
    d_model, n_heads, n_layers = SHAPES[shape]
    pico = Path(speechrnt.download_model("pico"))
    tokens = json.loads((pico / "vocabulary.json").read_text(encoding="utf-8"))
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

    spec = ctranslate2.specs.WhisperSpec(n_layers, n_heads, decoder_layers, n_heads)
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
    fill_norm(decoder.layer_norm)
    for layer in decoder.layer:
        fill_layer(layer)
        fill_norm(layer.attention.layer_norm)
        fill_linear(layer.attention.linear[0], d_model)
        fill_linear(layer.attention.linear[1], 2 * d_model)
        fill_linear(layer.attention.linear[2], d_model)

    config = json.loads((pico / "config.json").read_text(encoding="utf-8"))
    spec.config.lang_ids = config["lang_ids"]
    spec.register_vocabulary(tokens)
    spec.validate()
    spec.optimize(quantization="int8")
    Path(directory).mkdir(parents=True, exist_ok=True)
    spec.save(str(directory))
    shutil.copy(pico / "tokenizer.json", directory)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("directory", type=Path)
    arguments = parser.parse_args()
    write_model(arguments.shape, arguments.directory)
