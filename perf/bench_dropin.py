"""The drop-in path against faster-whisper: the same calls, the same weights.

    python perf/bench_dropin.py [--rounds N] [--quick]

Each measurement is a process of its own, the peers take turns, and medians are compared. Weights:
the embedded model, and random ones in the encoder shapes of tiny and base, whose transcripts are
kept to 20 tokens. Full context on both sides: the same work, the same text.
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
import wave
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from random_whisper import write_model

PEERS = ("faster-whisper", "speechrnt")
SAMPLES = Path(__file__).parent.parent / "tests" / "samples"
RATE = 16_000
REPEATS = 5
LONG = {"ten minutes": 600, "hour": 3600, "first segment": 3600, "first, by window": 3600}


def recording(seconds):
    """Return English speech of a length; 0 is one short clip."""
    from speechrnt import decode_audio

    clips = [decode_audio(path) for path in sorted(SAMPLES.glob("*_en.wav"))]
    if not seconds:
        return clips[0]
    pieces, length = [], 0
    while length < seconds * RATE:
        pieces += [clips[len(pieces) // 2 % len(clips)], np.zeros(RATE // 2, np.float32)]
        length += len(pieces[-2]) + len(pieces[-1])
    return np.concatenate(pieces)[: seconds * RATE]


def load(peer, directory, compute_type, threads):
    options = {"device": "cpu", "compute_type": compute_type, "cpu_threads": threads}
    if peer == "faster-whisper":
        from faster_whisper import WhisperModel

        return WhisperModel(directory, **options), {}
    from speechrnt import WhisperModel

    return WhisperModel(directory, **options), {"audio_context": "full"}


def timed(function):
    began = time.perf_counter()
    function()
    return time.perf_counter() - began


def write_recording(seconds, directory):
    """Write a recording of a length as a file, if it is not there; return its path."""
    path = Path(directory) / f"{seconds}.wav"
    if not path.exists():
        with wave.open(str(path), "wb") as file:
            file.setparams((1, 2, RATE, 0, "NONE", ""))
            file.writeframes((recording(seconds) * 32767).astype("<i2").tobytes())
    return path


def measure(peer, task, directory, compute_type, threads, path):
    """Print seconds, and the most memory this process had, in MiB."""
    model, context = load(peer, directory, compute_type, int(threads))
    options = {"temperature": 0.0, "language": "en", "condition_on_previous_text": False, **context}
    if "pico" not in directory:
        options["max_new_tokens"] = 20
    if task == "detected":
        options["language"] = None
    audio = path if task in LONG else recording(0)

    def whole(samples=audio):
        list(model.transcribe(samples, **options)[0])

    if task in ("short", "detected"):
        whole()
        seconds = statistics.median(timed(whole) for _ in range(REPEATS))
    elif task == "eight files":
        whole()
        with ThreadPoolExecutor(8) as pool:
            files = [recording(20)] * 8
            seconds = timed(lambda: list(pool.map(whole, files)))
    elif task.startswith("first"):
        if task == "first, by window" and peer == "speechrnt":
            options["normalization"] = "window"
        next(model.transcribe(recording(0), **options)[0])
        seconds = timed(lambda: next(model.transcribe(audio, **options)[0], None))
    else:
        seconds = timed(whole)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps([seconds, peak]))


def run(*arguments):
    command = [sys.executable, __file__, "--measure", *map(str, arguments)]
    threads = str(arguments[4])
    environment = {**os.environ, "OMP_NUM_THREADS": threads, "OPENBLAS_NUM_THREADS": threads}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    return json.loads(done.stdout)


def compare():
    """Measure all rounds and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--quick", action="store_true", help="short recordings, one thread, int8")
    arguments = parser.parse_args()
    tasks = ["short", "detected", "eight files"]
    if not arguments.quick:
        tasks += ["ten minutes", "hour", "first segment", "first, by window"]
    print(f"{os.cpu_count()} cores, median of {arguments.rounds} round(s), full context\n")
    print("| task | weights | type | threads | faster-whisper | speechrnt | ratio | peak MiB |")
    print("|---|---|---|---:|---:|---:|---:|---|")
    with tempfile.TemporaryDirectory() as scratch:
        weights = {"pico": str(Path(__file__).parent.parent / "speechrnt" / "assets" / "pico")}
        for shape in ("tiny", "base"):
            weights[shape] = str(Path(scratch) / shape)
            write_model(shape, weights[shape])
        for name, directory in weights.items():
            for compute_type in ("int8",) if arguments.quick else ("int8", "float32"):
                for threads in (1,) if arguments.quick else (1, 2):
                    for task in tasks:
                        kind = (name, directory, compute_type, threads)
                        row(task, *kind, arguments.rounds, scratch)


def row(task, name, directory, compute_type, threads, rounds, scratch):
    path = write_recording(LONG[task], scratch) if task in LONG else ""
    measured = [
        {peer: run(peer, task, directory, compute_type, threads, path) for peer in PEERS}
        for _ in range(rounds)
    ]
    theirs, ours = (
        [statistics.median(each[peer][i] for each in measured) for i in (0, 1)] for peer in PEERS
    )
    print(
        f"| {task} | {name} | {compute_type} | {threads} | {theirs[0]:.3f} s | {ours[0]:.3f} s "
        f"| {theirs[0] / ours[0]:.2f} | {theirs[1]:.0f} / {ours[1]:.0f} |",
        flush=True,
    )


if __name__ == "__main__":
    if sys.argv[1:2] == ["--measure"]:
        measure(*sys.argv[2:])
    else:
        compare()
