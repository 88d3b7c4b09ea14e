"""What threads that others have left behind cost a model that has a thread for each core.

    python perf/bench_threads.py [--rounds N] [--shapes S ...] [--threads N] [--tokenizer DIRECTORY]

- decode: a window of a model that `load_model` has loaded, in a thread that took OpenMP's helpers
  with it, against one that CTranslate2 has loaded in the thread of the caller;
- encode: a window right after its mel powers came from the filter bank, against right after they
  came from NumPy's matrix product.

Every measurement is a process of its own, and both sides take turns. A process makes five calls
after two to settle; the table shows medians over the rounds, and of the rounds' ratios. Weights are
random, int8, beam 5, 12 tokens a window.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from random_whisper import SHAPES, write_model

WARM_UPS = 2
REPEATS = 5
SIDES = {"decode": ("in passing", "by the caller"), "encode": ("filter bank", "BLAS")}


def measure(part, side, directory, threads):
    """Measure in this process; print the median of the calls in seconds."""
    import ctranslate2

    import speechrnt
    from speechrnt import _filter_bank, _mel
    from speechrnt.decoding import build_prompt

    model = speechrnt.load_model(directory, "cpu", cpu_threads=threads)
    tokenizer = model.tokenizer
    whisper = model.whisper
    if side == "by the caller":
        whisper = ctranslate2.models.Whisper(directory, intra_threads=threads)
    prompt = build_prompt(tokenizer, tokenizer.languages[0], "transcribe", (), True)
    features = np.zeros((1, model.n_mels, 3000), dtype=np.float32)
    filters = _mel.mel_filters(model.n_mels)
    power = np.random.default_rng(0).random((201, 201), dtype=np.float32)

    def encode():
        return whisper.encode(ctranslate2.StorageView.from_array(features))

    encoding = encode()
    times = []
    for _ in range(WARM_UPS + REPEATS):
        if side == "BLAS":
            filters @ power.T
        elif side == "filter bank":
            _filter_bank.filter_power(filters, power)
        started = time.perf_counter()
        if part == "encode":
            encode()
        else:
            whisper.generate(encoding, [prompt], beam_size=5)
        times.append(time.perf_counter() - started)
    print(json.dumps(statistics.median(times[WARM_UPS:])))


def run(part, side, directory, threads):
    command = [sys.executable, __file__, "--measure", part, side, directory, str(threads)]
    return json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)


def compare():
    """Measure all rounds and print the table."""
    from speechrnt.system import usable_cores

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5, metavar="N")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["tiny", "base"])
    parser.add_argument("--threads", type=int, default=usable_cores(), metavar="N")
    parser.add_argument("--tokenizer", type=Path, metavar="DIRECTORY")
    arguments = parser.parse_args()
    print(f"{usable_cores()} cores, medians of {arguments.rounds} round(s) of {REPEATS} calls\n")
    print("| shape | threads | part | ours | time | against | time | ratio |")
    print("|---|---:|---|---|---:|---|---:|---:|")
    with tempfile.TemporaryDirectory() as models:
        for shape in arguments.shapes:
            directory = str(Path(models) / shape)
            write_model(shape, directory, tokenizer=arguments.tokenizer, n_tokens=12)
            for part, sides in SIDES.items():
                rounds = [
                    [run(part, side, directory, arguments.threads) for side in sides]
                    for _ in range(arguments.rounds)
                ]
                ours, theirs = (statistics.median(side) for side in zip(*rounds, strict=True))
                ratio = statistics.median(against / own for own, against in rounds)
                print(
                    f"| {shape} | {arguments.threads} | {part} | {sides[0]} | {ours * 1e3:.0f} ms "
                    f"| {sides[1]} | {theirs * 1e3:.0f} ms | {ratio:.2f} |",
                    flush=True,
                )


if __name__ == "__main__":
    if sys.argv[1:2] == ["--measure"]:
        measure(*sys.argv[2:5], int(sys.argv[5]))
    else:
        compare()
