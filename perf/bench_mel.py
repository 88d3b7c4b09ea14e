"""Log-mel front end against faster-whisper's, on one thread.

    python perf/bench_mel.py [--quick] [--n-mels {80,128}] [--rounds N]

Every measurement is a pyperf run in processes of its own. The peers take turns, round by round, so
that a busy machine disturbs both alike. The table shows medians over the rounds, and the median of
the rounds' ratios.
"""

import argparse
import importlib.util
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pyperf

SAMPLE_RATE = 16000
HOP = 160
PEERS = ["faster-whisper", "speechrnt"]
ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
# Left over from tuning other programs, these make NumPy's matrix product many times slower.
OPENBLAS_OVERRIDES = ["OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE"]


def load_extractor(peer, n_mels):
    """Return the function from PCM to log-mel, and what it computes with."""
    if peer == "speechrnt":
        from speechrnt import _mel

        return lambda pcm: _mel.log_mel(pcm, n_mels), _mel.isa()
    # The module alone: its package would import every inference dependency.
    package = importlib.util.find_spec("faster_whisper")
    path = Path(package.origin).with_name("feature_extractor.py")
    spec = importlib.util.spec_from_file_location("feature_extractor", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.FeatureExtractor(feature_size=n_mels), f"NumPy {np.__version__}"


def time_extractor(loops, extract, seconds):
    rng = np.random.default_rng(seconds)
    pcm = rng.standard_normal(seconds * SAMPLE_RATE, dtype=np.float32)
    pcm *= 0.1
    started = pyperf.perf_counter()
    for _ in range(loops):
        extract(pcm)
    return pyperf.perf_counter() - started


def run_peer():
    """Measure one peer at every length: one round, and the pyperf workers of that round."""

    def pass_on(command, arguments):
        command += ["--peer", arguments.peer, "--n-mels", str(arguments.n_mels)]
        command += ["--seconds", *map(str, arguments.seconds)]

    runner = pyperf.Runner(values=3, processes=1, min_time=0.03, add_cmdline_args=pass_on)
    runner.argparser.add_argument("--peer", choices=PEERS)
    runner.argparser.add_argument("--n-mels", type=int)
    runner.argparser.add_argument("--seconds", type=int, nargs="+")
    arguments = runner.parse_args()
    extract, backend = load_extractor(arguments.peer, arguments.n_mels)
    for seconds in arguments.seconds:
        runner.bench_time_func(
            str(seconds), time_extractor, extract, seconds, metadata={"backend": backend}
        )


def measure_round(peer, n_mels, lengths):
    """Return a pyperf suite of one round of `peer`, one benchmark per length."""
    environment = os.environ | ONE_THREAD
    for name in OPENBLAS_OVERRIDES:
        environment.pop(name, None)
    command = [sys.executable, __file__, "--peer", peer, "--n-mels", str(n_mels)]
    command += ["--seconds", *map(str, lengths), "--quiet"]
    command += ["--inherit-environ", ",".join([*ONE_THREAD, "PYTHONPATH", "SPEECHRNT_ISA"])]
    with tempfile.TemporaryDirectory() as directory:
        output = str(Path(directory) / "round.json")
        command += ["--output", output]
        subprocess.run(command, env=environment, stdout=subprocess.DEVNULL, check=True)
        return pyperf.BenchmarkSuite.load(output)


def compare():
    """Measure all rounds of all peers and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one round of the short lengths")
    parser.add_argument("--n-mels", type=int, choices=(80, 128), default=80)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    lengths = [1, 5, 30] if arguments.quick else [1, 5, 30, 120, 600]
    n_rounds = 1 if arguments.quick else arguments.rounds

    rounds = [
        {peer: measure_round(peer, arguments.n_mels, lengths) for peer in PEERS}
        for _ in range(n_rounds)
    ]

    def medians(peer, seconds):
        return [suites[peer].get_benchmark(str(seconds)).median() for suites in rounds]

    for peer in PEERS:
        metadata = rounds[0][peer].get_benchmarks()[0].get_metadata()
        print(f"{peer}: {metadata['backend']}, {metadata.get('cpu_model_name', 'unknown CPU')}")
    print(f"{arguments.n_mels} mels, one thread, median of {n_rounds} round(s)\n")
    print("| audio | faster-whisper | speechrnt | ratio | speechrnt per frame |")
    print("|---:|---:|---:|---:|---:|")
    for seconds in lengths:
        theirs, ours = (medians(peer, seconds) for peer in PEERS)
        ratio = statistics.median(a / b for a, b in zip(theirs, ours, strict=True))
        frame_s = statistics.median(ours) / (seconds * SAMPLE_RATE // HOP + 1)
        print(
            f"| {seconds} s | {statistics.median(theirs) * 1e3:.3f} ms "
            f"| {statistics.median(ours) * 1e3:.3f} ms | {ratio:.1f} x | {frame_s * 1e9:.0f} ns |"
        )
    growth = [
        statistics.median(medians(peer, lengths[-1])) / statistics.median(medians(peer, lengths[0]))
        for peer in PEERS
    ]
    print(
        f"| {lengths[-1] // lengths[0]} x longer | {growth[0]:.0f} x the time "
        f"| {growth[1]:.0f} x the time | | |"
    )


if __name__ == "__main__":
    if "--peer" in sys.argv:
        run_peer()
    else:
        compare()
