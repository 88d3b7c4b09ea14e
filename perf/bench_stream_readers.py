"""Sixteen readers beside one stream that works: reads without a lock against one mutex.

    python perf/bench_stream_readers.py [--seconds S] [--rounds N]

One thread pushes silence to a stream, in pieces of 0.1 s, as fast as it is taken. Sixteen others
look the stream up, and read its snapshot and the registry's statistics, 200 times a second each, as
a server that shows many streams does. With the mutex, every one of these calls, and each push,
holds it. Rounds take turns; medians.
"""

import argparse
import statistics
import threading
import time
from contextlib import nullcontext

import numpy as np

from speechrnt import PerformanceOptimizedSTT

READERS = 16
PAUSE_S = 0.005


def measure(stt, lock, seconds):
    """Return pushes per second, reads per second, and the slowest hundredth of pushes in ms."""
    stream = stt.stream("watched", max_buffered_s=600.0)
    registry, piece = stt._streams, np.zeros(1600, np.float32)
    done = threading.Event()
    reads = [0] * READERS

    def read(index):
        while not done.wait(PAUSE_S):
            with lock:
                registry.get("watched").snapshot  # noqa: B018
                registry.statistics()
            reads[index] += 1

    readers = [threading.Thread(target=read, args=[index]) for index in range(READERS)]
    for reader in readers:
        reader.start()
    times = []
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        started = time.perf_counter()
        with lock:
            stream.push(piece)
        times.append(time.perf_counter() - started)
        time.sleep(0.0005)
    done.set()
    for reader in readers:
        reader.join()
    stream.cancel()
    while stt.statistics().streams.open:
        time.sleep(0.001)
    slow = float(np.percentile(times, 99)) * 1e3
    return len(times) / seconds, sum(reads) / seconds, slow


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=2.0)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    kinds = {"no lock": nullcontext, "one mutex": threading.Lock}
    results = {name: [] for name in kinds}
    with PerformanceOptimizedSTT() as stt:
        for _ in range(options.rounds):
            for name, kind in kinds.items():
                results[name].append(measure(stt, kind(), options.seconds))
    print(f"{READERS} readers       pushes/s   reads/s   p99 of a push")
    for name, rounds in results.items():
        pushes, reads, slow = (statistics.median(column) for column in zip(*rounds, strict=True))
        print(f"{name:15} {pushes:10.0f} {reads:9.0f} {slow:12.2f} ms")


if __name__ == "__main__":
    main()
