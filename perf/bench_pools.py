"""The pools against what one would use without them.

    python perf/bench_pools.py [--quick] [--rounds N]

Every case runs in processes of its own, times of single calls as pyperf runs. The cases take turns,
round by round, so that a busy machine disturbs all alike. The table shows medians over the rounds,
and the median of the rounds' ratios.
"""

import argparse
import json
import os
import queue
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyperf
from process_memory import resident_bytes

from speechrnt.pools import AudioBufferPool, ObjectPool, PoolLimits, TranscriptionResultPool

ROOT = Path(__file__).parent.parent
THIRTY_SECONDS = 480_000

CALLS = {  # what is timed, and what it needs
    "objects": ("pool.acquire().release()", lambda: {"pool": ObjectPool(bytearray)}),
    "results": ("pool.acquire().release()", lambda: {"pool": TranscriptionResultPool()}),
    "audio": ("pool.acquire(480_000).release()", lambda: {"pool": AudioBufferPool()}),
    "LifoQueue": ("items.put(items.get())", lambda: {"items": one_in(queue.LifoQueue())}),
    "list": ("items.append(items.pop())", lambda: {"items": [bytearray()]}),
}


def one_in(items):
    items.put(bytearray())
    return items


def native_objects():
    import pool_probe

    return pool_probe.Pool(64, 4096).rounds


def native_audio():
    import pool_probe

    pool = AudioBufferPool()
    return lambda loops: pool_probe.audio_rounds(pool, 4 * THIRTY_SECONDS, loops)


NATIVE = {"objects in C": native_objects, "audio in C": native_audio}


def bursts(take):
    """Take 16 buffers of 30 s, write to each, let all go; 90th percentile per buffer."""
    samples = np.zeros(THIRTY_SECONDS, np.float32)
    for _ in range(3):
        held = [take(THIRTY_SECONDS) for _ in range(16)]
        for array, _ in held:
            array[:] = samples
        del held, array
    seconds = []
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(100):
        held = []
        for _ in range(16):
            start = time.perf_counter()
            held.append(take(THIRTY_SECONDS))
            held[-1][0][:] = samples
            seconds.append(time.perf_counter() - start)
        del held
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
    return {"p90": float(np.percentile(seconds, 90)), "faults": faults / len(seconds)}


def each_second(take, maintain, threads, length):
    """Yield the bytes that ten simulated minutes of streams hold, and those in use, each second.

    What they hold is of the process, not of an allocator: holes between live buffers, what is kept
    for later, and what sizes are rounded up by. Every other minute there are 64 streams, else 8,
    each of 5 to 40 s with a buffer of its own; in each second, one of the threads takes another
    buffer for a moment for each stream, for the features of a window of some length.

    Parameters
    ----------
    take, maintain
        Takes a buffer of so many samples; is told the time each second.
    threads
        That take buffers.
    length
        Samples of a stream's buffer, by the chance that all is drawn from.
    """
    chance = random.Random(0)

    def begin(ends, n_samples):
        array, lease = take(n_samples)
        array.fill(1)
        return ends, array, lease

    def work(n_samples):
        array, lease = take(n_samples)
        array.fill(1)
        del array, lease

    with ThreadPoolExecutor(threads) as executor:
        wait_for_all = threading.Barrier(threads).wait
        list(executor.map(lambda _: wait_for_all(), range(threads)))
        base = resident_bytes()
        live = []
        for second in range(600):
            live = [stream for stream in live if stream[0] > second]
            wanted = 64 if second % 120 < 60 else 8
            ends = [second + chance.randint(5, 40) for _ in range(len(live), wanted)]
            lengths = [length(chance) for _ in ends]
            live += executor.map(begin, ends, lengths)
            lengths = [chance.randint(16_000, THIRTY_SECONDS) for _ in live]
            list(executor.map(work, lengths))
            maintain(float(second))
            yield resident_bytes() - base, sum(array.nbytes for _, array, _ in live)


def streams(take, maintain, threads):
    """Return the bytes that streams with 30 s of audio each hold, at the peak and on average."""
    held = [held for held, _ in each_second(take, maintain, threads, lambda _: THIRTY_SECONDS)]
    return {"peak": max(held), "mean": statistics.mean(held)}


def with_pool(measure, *arguments, **limits):
    pool = AudioBufferPool(PoolLimits(max_bytes=2**30, **limits))

    def take(n_samples):
        buffer = pool.acquire(n_samples)
        return buffer.array, buffer

    if measure is bursts:
        return measure(take)
    return measure(take, pool.maintain, *arguments)


def with_numpy(measure, *arguments):
    def take(n_samples):
        return np.empty(n_samples, np.float32), None

    if measure is bursts:
        return measure(take)
    return measure(take, lambda _: None, *arguments)


MANY = min(32, (os.cpu_count() or 1) + 4)  # as asyncio.to_thread uses
MEASURED = {
    "bursts, pool": lambda: with_pool(bursts, initial_size=16),
    "bursts, numpy": lambda: with_numpy(bursts),
    "streams, pool": lambda: with_pool(streams, 1),
    "streams, numpy": lambda: with_numpy(streams, 1),
    "streams on many threads, pool": lambda: with_pool(streams, MANY),
    "streams on many threads, numpy": lambda: with_numpy(streams, MANY),
}

TIMED_ROWS = [  # title, ours, theirs
    ("C objects, acquire and release without the GIL", "objects in C", None),
    ("audio buffers, the same", "audio in C", None),
    ("objects from Python; LifoQueue", "objects", "LifoQueue"),
    ("results from Python; LifoQueue", "results", "LifoQueue"),
    ("audio buffers from Python; LifoQueue", "audio", "LifoQueue"),
    ("objects from Python; a list", "objects", "list"),
]
MEASURED_ROWS = [  # title, case, key, scale, unit
    ("bursts of 16 × 30 s, take and write, p90", "bursts", "p90", 1e6, "µs"),
    ("the same, page faults per buffer", "bursts", "faults", 1, ""),
    ("64 streams, one thread, peak memory", "streams", "peak", 2**-20, "MiB"),
    ("the same, mean over time", "streams", "mean", 2**-20, "MiB"),
    (f"64 streams, {MANY} threads, peak memory", "streams on many threads", "peak", 2**-20, "MiB"),
    ("the same, mean over time", "streams on many threads", "mean", 2**-20, "MiB"),
]


def run_timed():
    """Time one case: one round, and the pyperf workers of that round."""

    def pass_on(command, arguments):
        command += ["--case", arguments.case]

    runner = pyperf.Runner(values=5, processes=1, min_time=0.03, add_cmdline_args=pass_on)
    runner.argparser.add_argument("--case")
    case = runner.parse_args().case
    if case in CALLS:
        statement, make = CALLS[case]
        runner.timeit(case, statement, globals=make(), duplicate=64)
        return
    # While a second thread lives, as in all programs that share a pool, locks are not elided.
    threading.Thread(target=threading.Event().wait, daemon=True).start()
    runner.bench_time_func(case, NATIVE[case]())


def measure(case, environment):
    """Return the median seconds of a timed case, or what a measured one found."""
    command = [sys.executable, __file__, "--case", case]
    if case in MEASURED:
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True)
        return json.loads(done.stdout)
    with tempfile.TemporaryDirectory() as directory:
        output = str(Path(directory) / "round.json")
        command += ["--quiet", "--inherit-environ", "PYTHONPATH", "--output", output]
        subprocess.run(command, env=environment, stdout=subprocess.DEVNULL, check=True)
        return pyperf.Benchmark.load(output).median()


def compare():
    """Measure all rounds of all cases and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one round")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    n_rounds = 1 if arguments.quick else arguments.rounds

    sys.path.append(str(ROOT / "tests"))
    from native import load

    probe = Path(load("pool_probe").__file__).parent
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(probe)])}
    cases = [*NATIVE, *CALLS, *MEASURED]
    rounds = [{case: measure(case, environment) for case in cases} for _ in range(n_rounds)]

    def row(title, ours, theirs, unit):
        cells = [f"{statistics.median(ours):.3g} {unit}".strip(), "", ""]
        if theirs:
            cells[1] = f"{statistics.median(theirs):.3g} {unit}".strip()
            ratio = statistics.median(a and b / a for a, b in zip(ours, theirs, strict=True))
            cells[2] = f"{ratio:.3g} x" if ratio else ""
        print(f"| {title} | {' | '.join(cells)} |")

    print(f"NumPy {np.__version__}, median of {n_rounds} round(s)\n")
    print("| what; against (memory: np.empty) | pool | without | without / pool |")
    print("|---|---:|---:|---:|")
    for title, ours, theirs in TIMED_ROWS:
        row(
            title,
            [results[ours] * 1e9 for results in rounds],
            theirs and [results[theirs] * 1e9 for results in rounds],
            "ns",
        )
    for title, case, key, scale, unit in MEASURED_ROWS:
        ours, theirs = (
            [results[f"{case}, {peer}"][key] * scale for results in rounds]
            for peer in ("pool", "numpy")
        )
        row(title, ours, theirs, unit)


if __name__ == "__main__":
    if "--case" not in sys.argv:
        compare()
    elif (name := sys.argv[sys.argv.index("--case") + 1]) in MEASURED:
        print(json.dumps(MEASURED[name]()))
    else:
        run_timed()
