"""What reading statistics costs those who work.

    python perf/bench_statistics.py [--rounds N] [--seconds S]

Native threads take and give back audio buffers and run tasks without the GIL, and an engine
transcribes short clips, eight at a time; meanwhile a Python thread reads the statistics of what is
at work: never, ten times a second, which is more than anybody scrapes, or again and again. In a
fourth case the thread is as busy, but reads nothing: what that costs is the processor's and the
GIL's. The cases take turns, in an order that changes from round to round, and each is compared with
the one without reading of its own round. The counters are kept whether or not anybody reads them:
what the parts cost with them, and what counting a request takes, is told below the table.
"""

import argparse
import contextlib
import statistics
import sys
import threading
import time
import timeit
from collections import deque
from pathlib import Path

from prometheus_client import CollectorRegistry, generate_latest

from speechrnt import OptimizationConfig, PerformanceOptimizedSTT, Scheduler, load_audio
from speechrnt.latency import STAGES, Histogram
from speechrnt.pools import AudioBufferPool
from speechrnt.prometheus import EngineCollector

ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT / "tests"))

from native import load  # noqa: E402

BUSY = "never, by a busy thread"
READS = {"never": None, "10 times a second": 0.1, BUSY: 0.0, "again and again": 0.0}
IN_FLIGHT = 8
WINDOW_BYTES = 4 * 480_000


@contextlib.contextmanager
def reading(read, interval_s):
    """Have a thread read, with a pause between; yields a list of what was read how many times."""
    count = [0]
    stop = threading.Event()

    def work():
        while not stop.wait(interval_s) if interval_s else not stop.is_set():
            read()
            count[0] += 1

    if interval_s is None:
        yield count
        return
    thread = threading.Thread(target=work)
    thread.start()
    yield count
    stop.set()
    thread.join()


def buffers(seconds):
    """Return what takes buffers for so long and tells how many a second, and what reads."""
    probe = load("pool_probe")
    pool = AudioBufferPool()

    def work():
        done, started = 0, time.perf_counter()
        while (spent := time.perf_counter() - started) < seconds:
            probe.audio_rounds(pool, WINDOW_BYTES, 200_000)
            done += 200_000
        return done / spent

    return work, pool.statistics


def tasks(scheduler, seconds):
    """Return the same of tasks that a task spawns."""
    native = load("sched_native")

    def work():
        done, started = 0, time.perf_counter()
        while (spent := time.perf_counter() - started) < seconds:
            native.Batch(scheduler, 2000, spin=200).spawn_all()
            done += 2000
        return done / spent

    return work, scheduler.statistics


def requests(stt, seconds, read):
    """Return the same of clips that an engine transcribes."""
    clips = [load_audio(file).samples for file in sorted((ROOT / "tests/samples").glob("*.wav"))]

    def work():
        under_way = deque()
        done, started = 0, time.perf_counter()
        while (spent := time.perf_counter() - started) < seconds:
            while len(under_way) < IN_FLIGHT:
                clip = clips[(done + len(under_way)) % len(clips)]
                under_way.append(stt.transcribe_async(clip, "en"))
            under_way.popleft().result()
            done += 1
        for future in under_way:
            future.result()
        return done / spent

    return work, read


def compare(title, unit, work, read, rounds):
    """Print the rows of one part."""
    work()
    rates = {name: [] for name in READS}
    ratios = {name: [] for name in READS}
    reads = {name: [] for name in READS}
    names = list(READS)
    for number in range(rounds):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            started = time.perf_counter()
            with reading(compute if name == BUSY else read, READS[name]) as count:
                rates[name].append(work())
            reads[name].append(count[0] / (time.perf_counter() - started))
        for name in names:
            ratios[name].append(rates[name][-1] / rates["never"][-1])
    for name in names:
        print(
            f"| {title} | {name} | {0 if name == BUSY else statistics.median(reads[name]):.0f} "
            f"| {statistics.median(rates[name]):,.0f} {unit} "
            f"| {statistics.median(ratios[name]):.3f} |",
            flush=True,
        )


def compute():
    """Keep the interpreter busy, about as long as a reading."""
    sum(range(10_000))


def seconds_per_call(function):
    """Return the median time of a call."""
    number, _ = timeit.Timer(function).autorange()
    return statistics.median(timeit.repeat(function, number=number, repeat=5)) / number


def main():
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--seconds", type=float, default=2.0, help="of each measurement")
    options = parser.parse_args()

    print("| what | statistics are read | reads a second | throughput | against never |")
    print("|---|---|---:|---:|---:|")
    work, read = buffers(options.seconds)
    pool_s = 1 / work()
    compare("audio buffers, C", "/s", work, read, options.rounds)
    with Scheduler(workers=2) as scheduler:
        work, read = tasks(scheduler, options.seconds)
        compare("tasks, C", "/s", work, read, options.rounds)
    with PerformanceOptimizedSTT(OptimizationConfig(), device="cpu") as stt:
        registry = CollectorRegistry()
        registry.register(EngineCollector(stt))
        for title, read in (
            ("clips, statistics", stt.get_performance_statistics),
            ("clips, Prometheus", lambda: generate_latest(registry)),
        ):
            work, _ = requests(stt, options.seconds, read)
            compare(title, "/s", work, read, options.rounds)
        histogram = Histogram()
        add_s = seconds_per_call(lambda: histogram.add(0.0123))
        statistics_s = seconds_per_call(stt.get_performance_statistics)
        scrape_s = seconds_per_call(lambda: generate_latest(registry))
    windows = len(STAGES) + 4  # of a request with one window
    print(
        f"\nAn audio buffer in C, taken and given back, counters included: {pool_s * 1e9:.0f} ns."
    )
    print(
        f"A time in a histogram: {add_s * 1e6:.2f} µs; a request of one window counts {windows}: "
        f"{windows * add_s * 1e6:.0f} µs."
    )
    print(
        f"Reading an engine: {statistics_s * 1e6:.0f} µs; for Prometheus, {scrape_s * 1e6:.0f} µs."
    )


if __name__ == "__main__":
    main()
