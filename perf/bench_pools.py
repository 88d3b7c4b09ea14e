"""Pools against what one would use without them; prints one table in Markdown.

Each case runs in processes of its own, cases in turn, several times over; the table has the median
over the processes. Run it on a quiet machine: ``python perf/bench_pools.py``.
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
from pathlib import Path

import numpy as np

from speechrnt.pools import AudioBufferPool, ObjectPool, PoolLimits, TranscriptionResultPool

ROOT = Path(__file__).parent.parent
THIRTY_SECONDS = 480_000


def page_faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def per_call_ns(function, rounds=200_000, repeats=5):
    """Nanoseconds per call; the best of several loops, since others only slow one down."""
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        for _ in range(rounds):
            function()
        best = min(best, time.perf_counter() - start)
    return {"ns": best / rounds * 1e9}


def native(make):
    import pool_probe

    # While a second thread lives, as in all programs that share a pool, locks are not elided.
    stop = threading.Event()
    threading.Thread(target=stop.wait, daemon=True).start()
    one_round = make(pool_probe)
    result = min(one_round(1_000_000) for _ in range(7)) / 1_000_000 * 1e9
    stop.set()
    return {"ns": result}


def c_objects():
    return native(lambda probe: probe.Pool(64, 4096).rounds)


def c_audio():
    pool = AudioBufferPool()
    return native(lambda probe: lambda n: probe.audio_rounds(pool, 2**21, n))


def python_audio():
    pool = AudioBufferPool()
    return per_call_ns(lambda: pool.acquire(THIRTY_SECONDS).release())


def python_results():
    pool = TranscriptionResultPool()
    return per_call_ns(lambda: pool.acquire().release())


def python_objects():
    pool = ObjectPool(bytearray)
    return per_call_ns(lambda: pool.acquire().release())


def python_lifo_queue():
    items = queue.LifoQueue()
    items.put(bytearray())
    return per_call_ns(lambda: items.put(items.get()))


def python_list():
    items = [bytearray()]
    return per_call_ns(lambda: items.append(items.pop()))


def bursts(take):
    """Take 16 buffers of 30 s, write to each, let all go; 90th percentile per buffer."""
    samples = np.zeros(THIRTY_SECONDS, np.float32)
    for _ in range(3):
        held = [take() for _ in range(16)]
        for array, _ in held:
            array[:] = samples
        del held, array
    seconds = []
    before = page_faults()
    for _ in range(100):
        held = []
        for _ in range(16):
            start = time.perf_counter()
            held.append(take())
            held[-1][0][:] = samples
            seconds.append(time.perf_counter() - start)
        del held
    faults = (page_faults() - before) / len(seconds)
    return {"p90_us": float(np.percentile(seconds, 90)) * 1e6, "faults": faults}


def burst_pool():
    pool = AudioBufferPool(PoolLimits(initial_size=16))

    def take():
        buffer = pool.acquire(THIRTY_SECONDS)
        return buffer.array, buffer

    return bursts(take)


def burst_numpy():
    return bursts(lambda: (np.empty(THIRTY_SECONDS, np.float32), None))


def streams(take, maintain):
    """Up to 64 streams, each with a ring of 30 s and work buffers, over 10 simulated minutes."""
    chance = random.Random(0)
    live = []
    base = current_rss()
    peak = 0
    for second in range(600):
        live = [(ends, held) for ends, held in live if ends > second]
        target = 64 if second % 120 < 60 else 8
        while len(live) < target:
            held = take(THIRTY_SECONDS)
            held[0][:] = 1
            live.append((second + chance.randint(5, 40), held))
        for _ in live:  # a second of work: a window of some length, used and dropped
            work = take(chance.randint(16_000, THIRTY_SECONDS))
            work[0][:] = 1
        del work
        maintain(float(second))
        peak = max(peak, current_rss())
    return {"peak_mib": (peak - base) / 2**20, "end_mib": (current_rss() - base) / 2**20}


def current_rss():
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGESIZE")


def streams_pool():
    pool = AudioBufferPool()

    def take(n_samples):
        buffer = pool.acquire(n_samples)
        return buffer.array, buffer

    return streams(take, pool.maintain)


def streams_numpy():
    return streams(lambda n: (np.empty(n, np.float32), None), lambda _: None)


CASES = {
    case.__name__: case
    for case in (
        c_objects, c_audio, python_audio, python_results, python_objects, python_lifo_queue,
        python_list, burst_pool, burst_numpy, streams_pool, streams_numpy,
    )
}  # fmt: skip

ROWS = [
    ("objects, acquire and release in C", "c_objects", None, "ns", "ns"),
    ("audio buffers, acquire and release in C", "c_audio", None, "ns", "ns"),
    ("objects, from Python; against LifoQueue", "python_objects", "python_lifo_queue", "ns", "ns"),
    ("objects, from Python; against a list", "python_objects", "python_list", "ns", "ns"),
    ("results, from Python; against LifoQueue", "python_results", "python_lifo_queue", "ns", "ns"),
    ("audio, from Python; against LifoQueue", "python_audio", "python_lifo_queue", "ns", "ns"),
    (
        "16 x 30 s, take and copy, p90; with np.empty",
        "burst_pool",
        "burst_numpy",
        "p90_us",
        "µs",
    ),
    ("the same, page faults per buffer", "burst_pool", "burst_numpy", "faults", ""),
    (
        "64 streams, peak memory; with np.empty",
        "streams_pool",
        "streams_numpy",
        "peak_mib",
        "MiB",
    ),
    ("the same, memory at the end", "streams_pool", "streams_numpy", "end_mib", "MiB"),
]


def build_probe(folder):
    source = (ROOT / "tests" / "native" / "pool_probe.pyx").read_text(encoding="utf-8")
    (Path(folder) / "pool_probe.pyx").write_text(source, encoding="utf-8")
    subprocess.run(
        [sys.executable, "-m", "Cython.Build.Cythonize", "--inplace", "-3", "pool_probe.pyx"],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.DEVNULL,
        check=True,
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--processes", type=int, default=5)
    parser.add_argument("--case", choices=CASES, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.case:
        print(json.dumps(CASES[arguments.case]()))
        return
    measured = {name: [] for name in CASES}
    with tempfile.TemporaryDirectory() as folder:
        build_probe(folder)
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), folder])}
        for _ in range(arguments.processes):
            for name in CASES:
                command = [sys.executable, __file__, "--case", name]
                done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True)
                measured[name].append(json.loads(done.stdout))
    print("| what | pool | without | ratio |\n|---|---|---|---|")
    for title, ours, theirs, key, unit in ROWS:
        pool = statistics.median(result[key] for result in measured[ours])
        cells = [f"{pool:.3g} {unit}".strip(), "", ""]
        if theirs:
            other = statistics.median(result[key] for result in measured[theirs])
            cells[1] = f"{other:.3g} {unit}".strip()
            cells[2] = f"{other / pool:.2g}" if pool else "all"
        print(f"| {title} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
