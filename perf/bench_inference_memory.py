"""The encoder with and without the pool under CTranslate2's memory.

    python perf/bench_inference_memory.py [--quick] [--rounds N] [--shapes S ...] [--windows N ...]

Encodes 30 s windows of noise with models of the real shapes, random weights, int8. Every
measurement is a process of its own, and with and without take turns, round by round, so that a busy
machine disturbs both alike. A process encodes twice to settle, then three times. The table shows
medians over the rounds, and of the rounds' ratios; CPU time is that of all threads, in user and
system mode, and suffers less from neighbours. Peak memory is the most that a process had resident.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from process_memory import peak_bytes
from random_whisper import SHAPES, write_model

MODES = ("off", "pool")
WARM_UPS = 2
REPEATS = 3


def run_peer(directory, batch, threads):
    """Measure in this process; print times, page faults and memory as JSON."""
    from speechrnt import load_model

    model = load_model(directory, "cpu", cpu_threads=threads)
    rng = np.random.default_rng(0)
    features = rng.standard_normal((batch, model.n_mels, 3000), dtype=np.float32)
    samples = []
    for _ in range(WARM_UPS + REPEATS):
        before = resource.getrusage(resource.RUSAGE_SELF)
        started = time.perf_counter()
        model.encode(features)
        wall_s = time.perf_counter() - started
        after = resource.getrusage(resource.RUSAGE_SELF)
        cpu_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        samples.append((wall_s, cpu_s, after.ru_minflt - before.ru_minflt))
    wall, cpu, faults = map(statistics.median, zip(*samples[WARM_UPS:], strict=True))
    print(json.dumps({"wall": wall, "cpu": cpu, "faults": faults, "peak": peak_bytes()}))


def measure(mode, directory, batch, threads):
    command = [sys.executable, __file__, "--peer", directory, str(batch), str(threads)]
    environment = os.environ | {"SPEECHRNT_INFERENCE_MEMORY": mode}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def compare():
    """Measure all rounds and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one round of tiny and base, 1 window")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--windows", nargs="+", type=int, default=[1, 8], help="windows per call")
    arguments = parser.parse_args()
    shapes = ["tiny", "base"] if arguments.quick else arguments.shapes
    batches = [1] if arguments.quick else arguments.windows
    n_rounds = 1 if arguments.quick else arguments.rounds

    print(f"30 s windows, int8, median of {n_rounds} round(s) of {REPEATS}\n")
    print(
        "| shape | windows | threads | off | pool | ratio | CPU time | page faults | peak memory |"
    )
    print("|---|---:|---:|---:|---:|---:|---:|---:|---:|")
    with tempfile.TemporaryDirectory() as models:
        for shape in shapes:
            directory = str(Path(models) / shape)
            write_model(shape, directory, decoder_layers=1)  # only the encoder is used
            for batch in batches:
                for threads in (1, 2):
                    rounds = [
                        {mode: measure(mode, directory, batch, threads) for mode in MODES}
                        for _ in range(n_rounds)
                    ]
                    print_row(shape, batch, threads, rounds)


def print_row(shape, batch, threads, rounds):
    def each(fact, form, scale):
        medians = [statistics.median(peers[mode][fact] for peers in rounds) for mode in MODES]
        return [form.format(median * scale) for median in medians]

    def ratio(fact):
        return statistics.median(peers["off"][fact] / peers["pool"][fact] for peers in rounds)

    off, pool = each("wall", "{:.0f} ms", 1e3)
    print(
        f"| {shape} | {batch} | {threads} | {off} | {pool} | {ratio('wall'):.2f} x "
        f"| {ratio('cpu'):.2f} x | {' → '.join(each('faults', '{:.0f}', 1))} "
        f"| {' → '.join(each('peak', '{:.0f}', 2**-20))} MiB |",
        flush=True,
    )


if __name__ == "__main__":
    if sys.argv[1:2] == ["--peer"]:
        path, *numbers = sys.argv[2:]
        run_peer(path, *map(int, numbers))
    else:
        compare()
