"""How threads that wait cost a model that has a thread for each core.

    python perf/bench_threads.py [--rounds N] [--shapes S ...] [--threads N] [--neighbours N ...]
        [--tokenizer DIRECTORY]

- decode, encode: windows of a model that waits and is loaded as `speechrnt.openmp` has it, against
  one in a program that imported CTranslate2 first, where all is as CTranslate2 has it;
- encode after mel: a window right after its mel powers came from the filter bank, against right
  after they came from NumPy's matrix product.

With each number of neighbours: programs that compute all the time. Every measurement is a process
of its own, and both sides take turns. A process makes five calls after two to settle; the table
shows medians over the rounds, and of the rounds' ratios. Weights are random, int8, beam 5, 12
tokens a window.
"""

import argparse
import importlib
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np

WARM_UPS = 2
REPEATS = 5
SIDES = {
    "decode": ("speechrnt's", "CTranslate2's"),
    "encode": ("speechrnt's", "CTranslate2's"),
    "encode after mel": ("filter bank", "BLAS"),
}


def measure(part, side, directory, threads):
    """Measure in this process; print the median of the calls in seconds."""
    importlib.import_module("ctranslate2" if side == "CTranslate2's" else "speechrnt")
    import ctranslate2

    import speechrnt
    from speechrnt import _filter_bank, _mel
    from speechrnt.decoding import build_prompt

    model = speechrnt.load_model(directory, "cpu", cpu_threads=threads)
    tokenizer = model.tokenizer
    whisper = model.whisper
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
        if part == "decode":
            whisper.generate(encoding, [prompt], beam_size=5)
        else:
            encode()
        times.append(time.perf_counter() - started)
    print(json.dumps(statistics.median(times[WARM_UPS:])))


def run(part, side, directory, threads):
    command = [sys.executable, __file__, "--measure", part, side, directory, str(threads)]
    return json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)


@contextmanager
def neighbours(number):
    """Keep so many cores busy."""
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(number)]
    try:
        yield
    finally:
        for each in busy:
            each.kill()
            each.wait()


def compare():
    """Measure all rounds and print the table."""
    # Not above: it imports CTranslate2.
    from random_whisper import SHAPES, write_model

    from speechrnt.system import usable_cores

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5, metavar="N")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["tiny", "base"])
    parser.add_argument("--threads", type=int, default=usable_cores(), metavar="N")
    parser.add_argument("--neighbours", nargs="+", type=int, default=[0, 1], metavar="N")
    parser.add_argument("--tokenizer", type=Path, metavar="DIRECTORY")
    arguments = parser.parse_args()
    print(f"{usable_cores()} cores, medians of {arguments.rounds} round(s) of {REPEATS} calls\n")
    print("| shape | threads | neighbours | part | ours | time | against | time | ratio |")
    print("|---|---:|---:|---|---|---:|---|---:|---:|")
    with tempfile.TemporaryDirectory() as models:
        for shape in arguments.shapes:
            directory = str(Path(models) / shape)
            write_model(shape, directory, tokenizer=arguments.tokenizer, n_tokens=12)
            for number, part in itertools.product(arguments.neighbours, SIDES):
                with neighbours(number):
                    rounds = [
                        [run(part, side, directory, arguments.threads) for side in SIDES[part]]
                        for _ in range(arguments.rounds)
                    ]
                print_row(shape, arguments.threads, number, part, rounds)


def print_row(shape, threads, number, part, rounds):
    ours, theirs = (f"{statistics.median(s) * 1e3:.0f} ms" for s in zip(*rounds, strict=True))
    ratio = statistics.median(against / own for own, against in rounds)
    own, against = SIDES[part]
    cells = (shape, threads, number, part, own, ours, against, theirs, f"{ratio:.2f}")
    print(f"| {' | '.join(map(str, cells))} |", flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--measure"]:
        measure(*sys.argv[2:5], int(sys.argv[5]))
    else:
        compare()
