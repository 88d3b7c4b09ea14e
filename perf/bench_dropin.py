"""The drop-in path against faster-whisper: the same calls, the same weights.

    python perf/bench_dropin.py [--tokenizer DIRECTORY] [--tasks TASK ...] [--weights NAME ...]
        [--types TYPE ...] [--threads N ...] [--rounds N] [--minutes N] [--out FILE]
    python perf/bench_dropin.py --show FILE

Each measurement is a process of its own, the peers take turns, and medians are compared. Rows are
what the options leave of tasks x weights x types x threads; a row that is measured again replaces
the one in FILE, so that the whole can be done in parts. `--minutes` begins no row after that time.

Weights: the embedded model, and random ones in the shapes of tiny and base, in Whisper's vocabulary
if `--tokenizer` names a directory that has it (`tokenizer.json`, `vocabulary.json`) and in the
embedded model's otherwise. Random weights answer every window with a fixed number of tokens, as
speech would have: 12 in short clips, 80 in long recordings, and no timestamps. Full context, beam
5, temperature 0, no text of earlier windows in the prompt. Both sides must give the same tokens, or
the row is marked.

Tasks: `short` (a clip of 2 s, its samples, language given), `detected` (language not given),
`eight files` (of 20 s, by eight threads), `ten minutes`, `hour`, and `first ...`: from the call to
the first segment of an hour-long WAV file, as faster-whisper does it (`first`) or with
``normalization="window"`` (`first by window`), and of FLAC and MP3 at 44.1 kHz, stereo. Memory is
the most that the process ever had resident.

The hour is what takes long: four minutes a round with tiny, int8 and two threads on two cores. Base
in float32 on one thread does about eight times that work, so that all rows with 7 rounds are an
estimated day or more: do it in parts.
"""

import argparse
import hashlib
import itertools
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import wave
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path

import numpy as np
from process_memory import peak_bytes

PEERS = ("faster-whisper", "speechrnt")
ROOT = Path(__file__).parent.parent
RATE = 16_000
REPEATS = 5
HOUR = 3600
FILES = 8
SHORT_TOKENS, LONG_TOKENS = 12, 80
SHAPES = ("tiny", "base")

# File, and whether our windows are measured each by itself.
FIRST = {
    "first": ("hour.wav", False),
    "first by window": ("hour.wav", True),
    "first flac": ("hour.flac", False),
    "first flac by window": ("hour.flac", True),
    "first mp3": ("hour.mp3", False),
    "first mp3 by window": ("hour.mp3", True),
}
WHOLE = {"ten minutes": "ten minutes.wav", "hour": "hour.wav"}
TASKS = ("short", "detected", "eight files", *WHOLE, *FIRST)

SECONDS = {"short": 0, "file": 20, "ten minutes": 600, "hour": HOUR}  # 0: one clip
CODECS = {".flac": "flac", ".mp3": "libmp3lame"}
FILES_OF = {
    "short": (),
    "detected": (),
    "eight files": ("file.wav",),
    **{task: (file,) for task, file in WHOLE.items()},
    **{task: ("hour.wav", file) for task, (file, _) in FIRST.items()},
}

# What the ratio of times, theirs to ours, shall be at least; and that of memory, ours to theirs, at
# most for an hour of audio.
LEAST_RATIO = 0.97
MOST_MEMORY = 0.25


def bar(task, weights):
    """Return the ratio that a row shall reach."""
    if task in FIRST:
        return 10.0 if FIRST[task][1] else 2.0
    bars = {"hour": 1.4, "eight files": 1.5}
    if weights in SHAPES:
        bars |= {"short": 1.5, "detected": 2.2}
    return bars.get(task, LEAST_RATIO)


# In the process of a peer: nothing of the other one is imported.


def read_wav(path):
    with wave.open(str(path)) as file:
        samples = np.frombuffer(file.readframes(file.getnframes()), "<i2")
    return samples.astype(np.float32) / 32768


def load(peer, directory, compute_type, threads):
    options = {"device": "cpu", "compute_type": compute_type, "cpu_threads": threads}
    if peer == "faster-whisper":
        from faster_whisper import WhisperModel

        return WhisperModel(directory, **options), {}
    from speechrnt import WhisperModel

    return WhisperModel(directory, **options), {"audio_context": "full"}


def timed(function):
    began = time.perf_counter()
    result = function()
    return time.perf_counter() - began, result


def measure(peer, task, weights, directory, compute_type, threads, files):
    """Print seconds, the most memory in MiB, a digest of all tokens, and how many they are."""
    model, options = load(peer, directory, compute_type, int(threads))
    options |= {"temperature": 0.0, "language": "en", "condition_on_previous_text": False}
    if weights in SHAPES:
        options["without_timestamps"] = True
    if task == "detected":
        options["language"] = None
    files = Path(files)

    def whole(audio):
        return [segment.tokens for segment in model.transcribe(audio, **options)[0]]

    if task in ("short", "detected"):
        audio = read_wav(files / "short.wav")
        whole(audio)
        times, said = zip(*(timed(lambda: whole(audio)) for _ in range(REPEATS)), strict=True)
        seconds = statistics.median(times)
    elif task == "eight files":
        audio = read_wav(files / "file.wav")
        whole(audio)
        with ThreadPoolExecutor(FILES) as pool:
            seconds, said = timed(lambda: list(pool.map(whole, [audio] * FILES)))
    elif task in FIRST:
        file, is_by_window = FIRST[task]
        next(model.transcribe(read_wav(files / "short.wav"), **options)[0])
        if is_by_window and peer == "speechrnt":
            options["normalization"] = "window"
        path = str(files / file)
        seconds, said = timed(lambda: next(model.transcribe(path, **options)[0]).tokens)
    else:
        seconds, said = timed(lambda: whole(str(files / WHOLE[task])))
    peak = peak_bytes() / 2**20
    said = json.dumps([list(map(int, tokens)) for tokens in flattened(said)])
    digest = hashlib.sha256(said.encode()).hexdigest()[:12]
    print(json.dumps([seconds, peak, digest, said.count(",") + 1]))


def flattened(said):
    """Return lists of tokens out of lists of lists of them."""
    if said and isinstance(said[0], (list, tuple)):
        return [tokens for each in said for tokens in flattened(each)]
    return [said]


# In the process that compares them.


def write_recordings(directory, tasks):
    """Write what the tasks need, as far as it is not there: English speech of several lengths."""
    clips = [read_wav(path) for path in sorted((ROOT / "tests" / "samples").glob("*_en.wav"))]
    pause = np.zeros(RATE // 2, np.float32)
    speech = np.concatenate([piece for clip in clips for piece in (clip, pause)])
    files = {file for task in tasks for file in FILES_OF[task]} | {"short.wav"}
    # The others are made of WAV.
    for name in sorted(files, key=lambda name: not name.endswith(".wav")):
        path = directory / name
        if path.exists():
            continue
        if not name.endswith(".wav"):
            transcode(directory / "hour.wav", path, CODECS[path.suffix])
            continue
        seconds = SECONDS[path.stem]
        samples = np.resize(speech, seconds * RATE) if seconds else clips[0]
        with wave.open(str(path), "wb") as file:
            file.setparams((1, 2, RATE, 0, "NONE", ""))
            file.writeframes((samples * 32767).astype("<i2").tobytes())


def transcode(source, target, codec, rate=44_100, layout="stereo"):
    import av

    with av.open(str(source)) as read, av.open(str(target), "w") as write:
        stream = write.add_stream(codec, rate=rate)
        stream.layout = layout
        kind = stream.codec_context.format
        resampler = av.AudioResampler(kind, layout, rate, stream.codec_context.frame_size or 4096)
        for frame in itertools.chain(read.decode(audio=0), [None]):
            for resampled in resampler.resample(frame):
                write.mux(stream.encode(resampled))
        write.mux(stream.encode(None))


def write_weights(directory, tokenizer, name, is_short):
    """Return the directory of a model, which is written if it is not there."""
    if name not in SHAPES:
        return ROOT / "speechrnt" / "assets" / name
    from random_whisper import write_model

    n_tokens = SHORT_TOKENS if is_short else LONG_TOKENS
    target = directory / f"{name}-{n_tokens}"
    if not target.exists():
        write_model(name, target, tokenizer=tokenizer, n_tokens=n_tokens)
    return target


def run(peer, task, weights, directory, compute_type, threads, files):
    arguments = (peer, task, weights, directory, compute_type, threads, files)
    command = [sys.executable, __file__, "--measure", *map(str, arguments)]
    count = {"OMP_NUM_THREADS": str(threads), "OPENBLAS_NUM_THREADS": str(threads)}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env={**os.environ, **count})
    if done.returncode:
        sys.exit(f"{peer}: {task}, {weights} failed")
    return json.loads(done.stdout)


def machine():
    """Return what the figures depend on."""
    from speechrnt.system import cpu_name, usable_cores

    packages = ("speechrnt", "faster-whisper", "ctranslate2", "numpy", "av")
    return {
        "cpu": cpu_name(),
        "cores": usable_cores(),
        "python": platform.python_version(),
        **{name: version(name) for name in packages},
    }


def key(row):
    return row["task"], row["weights"], row["type"], row["threads"]


def show(results):
    """Print the table of all rows."""
    print(", ".join(f"{name} {value}" for name, value in results["machine"].items()), "\n")
    print("| task | weights | type | threads | rounds | faster-whisper | speechrnt | ratio | bar |")
    print("|---|---|---|---:|---:|---:|---:|---:|---:|")
    notes = []
    for row in results["rows"]:
        notes += show_row(row)
    print("\n| task | weights | type | threads | peak MiB | ratio | bar |")
    print("|---|---|---|---:|---:|---:|---:|")
    for row in results["rows"]:
        theirs, ours = ([each[1] for each in row[peer]] for peer in PEERS)
        theirs, ours = statistics.median(theirs), statistics.median(ours)
        most = MOST_MEMORY if row["task"] in (*FIRST, "hour") else None
        limit = "" if most is None else f"{most}"
        missed = " missed" if most is not None and ours / theirs > most else ""
        name, *kind = key(row)
        cells = (name, *kind, f"{theirs:.0f} / {ours:.0f}", f"{ours / theirs:.2f}", limit + missed)
        print(f"| {' | '.join(map(str, cells))} |")
    for note in notes:
        print(f"\n{note}")


def show_row(row):
    """Print a line of the table, and return what is to be said about it."""
    theirs, ours = (statistics.median(each[0] for each in row[peer]) for peer in PEERS)
    least = bar(row["task"], row["weights"])
    missed = " missed" if theirs / ours < least else ""
    cells = (*key(row), len(row["speechrnt"]), f"{theirs:.3f} s", f"{ours:.3f} s")
    print(f"| {' | '.join(map(str, cells))} | {theirs / ours:.2f} | {least}{missed} |", flush=True)
    # Other normalization may well give other text.
    is_by_window = row["task"] in FIRST and FIRST[row["task"]][1]
    digests = {tuple(each[2:]) for peer in PEERS for each in row[peer]}
    if is_by_window or len(digests) == 1:
        return []
    return [f"{', '.join(map(str, key(row)))}: not the same tokens: {sorted(digests)}"]


def compare(arguments):
    """Measure the rows, print them, and keep them in a file."""
    sys.path.insert(0, str(Path(__file__).parent))
    out = arguments.out
    results = {"machine": machine(), "rows": []}
    if out is not None and out.exists():
        results["rows"] = json.loads(out.read_text(encoding="utf-8"))["rows"]
    began = time.monotonic()
    kinds = (arguments.tasks, arguments.weights, arguments.types, arguments.threads)
    with tempfile.TemporaryDirectory() as scratch:
        files = arguments.scratch or Path(scratch)
        files.mkdir(parents=True, exist_ok=True)
        write_recordings(files, arguments.tasks)
        left_out = []
        for task, weights, compute_type, threads in itertools.product(*kinds):
            if time.monotonic() - began > arguments.minutes * 60:
                left_out.append((task, weights, compute_type, threads))
                continue
            is_short = task in ("short", "detected")
            directory = write_weights(files, arguments.tokenizer, weights, is_short)
            row = {"task": task, "weights": weights, "type": compute_type, "threads": threads}
            row |= {peer: [] for peer in PEERS}
            for number in range(arguments.rounds):
                # Neither of them always comes first.
                for peer in PEERS if number % 2 == 0 else PEERS[::-1]:
                    row[peer].append(run(peer, *key(row)[:2], directory, *key(row)[2:], files))
            for note in show_row(row):
                print(note)
            results["rows"] = [each for each in results["rows"] if key(each) != key(row)] + [row]
            if out is not None:
                out.parent.mkdir(parents=True, exist_ok=True)
                out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    for row in left_out:
        print(f"not measured, for want of time: {', '.join(map(str, row))}")
    print()
    show(results)


def main():
    """Do what the arguments say."""
    if sys.argv[1:2] == ["--measure"]:
        measure(*sys.argv[2:])
        return
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=TASKS, metavar="TASK")
    parser.add_argument("--weights", nargs="+", default=("pico", *SHAPES), metavar="NAME")
    parser.add_argument("--types", nargs="+", default=("int8", "float32"), metavar="TYPE")
    parser.add_argument("--threads", nargs="+", type=int, default=(1, 2), metavar="N")
    parser.add_argument("--rounds", type=int, default=7, metavar="N")
    parser.add_argument("--minutes", type=float, default=float("inf"), metavar="N")
    parser.add_argument("--tokenizer", type=Path, metavar="DIRECTORY")
    parser.add_argument("--scratch", type=Path, metavar="DIRECTORY", help="keep recordings there")
    parser.add_argument("--out", type=Path, metavar="FILE", help="JSON, as in perf/results")
    parser.add_argument("--show", type=Path, metavar="FILE", help="print what is there")
    parser.add_argument("--quick", action="store_true", help="short recordings, one thread, int8")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.tasks = ("short", "detected", "eight files")
        arguments.types, arguments.threads = ("int8",), (1,)
    if arguments.show:
        show(json.loads(arguments.show.read_text(encoding="utf-8")))
    else:
        compare(arguments)


if __name__ == "__main__":
    main()
