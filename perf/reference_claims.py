"""Each figure of the design that this project was asked for, beside one measured here.

    python perf/reference_claims.py [--rounds N] [--only ROW] [--readme]

The document claims improvements without saying over what. Here the baseline is what a competent
service does without this library. Every measurement is a process of its own, and the two sides of a
row take turns; the table shows the medians over the rounds, and the median of the rounds' changes.
``--readme`` puts the table into README.md.
"""

import argparse
import functools
import json
import math
import os
import platform
import queue
import re
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path

import numpy as np
from bench_pools import THIRTY_SECONDS, bursts, each_second, streams, with_numpy, with_pool
from bench_sched import PriorityQueuePool, critical_wait, new_scheduler, throughput

from speechrnt import Priority
from speechrnt.gpu import why_unavailable
from speechrnt.pools import AudioBufferPool, PoolLimits
from speechrnt.system import cpu_name, usable_cores

ROOT = Path(__file__).parent.parent
BEGIN, END = "<!-- perf/reference_claims.py --readme: begin -->", "<!-- end -->"
THREADS = 32  # of asyncio.to_thread and ThreadPoolExecutor, on servers
MIB = 2**20


def clean_up(take):
    """Return seconds that letting go of a burst of 16 windows takes, the time to take them not."""
    seconds = []
    for _ in range(50):
        held = [take(THIRTY_SECONDS) for _ in range(16)]
        for array, _ in held:
            array.fill(1)
        del array
        started = time.perf_counter()
        del held
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)


def held_for_nothing(take, maintain, threads, shortest):
    """Return the bytes that streams hold beyond what is in use, on average.

    Parameters
    ----------
    take, maintain, threads
        See `each_second`.
    shortest
        Samples of the shortest buffer that a stream has; the longest is of 30 s.
    """

    def length(chance):
        return chance.randint(shortest, THIRTY_SECONDS)

    seconds = each_second(take, maintain, threads, length)
    return statistics.mean(held - in_use for held, in_use in seconds)


def pooled(measure, *arguments):
    """Measure with a pool; `measure` gets what takes a buffer, and what maintains the pool."""
    pool = AudioBufferPool(PoolLimits(max_bytes=2**30))

    def take(n_samples):
        buffer = pool.acquire(n_samples)
        return buffer.array, buffer

    return measure(take, *((pool.maintain, *arguments) if arguments else ()))


def plain(measure, *arguments):
    """Measure with `np.empty`."""

    def take(n_samples):
        return np.empty(n_samples, np.float32), None

    return measure(take, *((lambda _: None, *arguments) if arguments else ()))


def busy_spread(stealing):
    """Return by how much the processor time of two workers differs, as a share of both.

    It is the median of batches of tasks, each of which comes from one of the workers.
    """
    sys.path.append(str(ROOT / "tests"))
    from native import load

    native = load("sched_native")
    with new_scheduler(stealing=stealing) as scheduler:
        spreads = []
        for _ in range(21):
            before = processor_times()
            native.Batch(scheduler, 200, spin=100_000).spawn_all()
            spent = [time - before.get(thread, 0) for thread, time in processor_times().items()]
            most, second = sorted(spent)[:-3:-1]
            spreads.append((most - second) / (most + second))
    return statistics.median(spreads)


def processor_times():
    """Return the nanoseconds that each other thread of this process has had a processor."""
    own = threading.get_native_id()
    tasks = (each for each in Path("/proc/self/task").iterdir() if each.name != str(own))
    return {each.name: int((each / "schedstat").read_text().split()[0]) for each in tasks}


class CountingLock:
    """A lock that counts how many times it was taken."""

    def __init__(self):
        self._lock = threading.Lock()
        self.taken = 0

    def acquire(self, *arguments, **options):
        is_taken = self._lock.acquire(*arguments, **options)
        self.taken += is_taken  # by who has it
        return is_taken

    def release(self):
        self._lock.release()

    def __enter__(self):
        return self.acquire()

    def __exit__(self, *exception):
        self.release()


class CountedQueue(queue.PriorityQueue):
    """A queue whose lock counts."""

    def __init__(self):
        super().__init__()
        self.mutex = CountingLock()
        self.not_empty, self.not_full, self.all_tasks_done = (
            threading.Condition(self.mutex) for _ in range(3)
        )


def locks(ours):
    """Return how many times the lock of a pool's queue is taken for each task of 10 000."""
    if not ours:
        items = CountedQueue()
        pool = PriorityQueuePool(2, items)
        for future in [pool.submit(int) for _ in range(10_000)]:
            future.result()
        return items.mutex.taken / 10_000
    with new_scheduler() as scheduler:
        for future in [scheduler.submit(int) for _ in range(10_000)]:
            future.result()
        return scheduler.statistics().lock_operations / 10_000


def run_tasks(measure, ours):
    """Measure tasks of Python."""
    if ours:
        scheduler = new_scheduler()
        critical = functools.partial(scheduler.submit, priority=Priority.CRITICAL)
        submit = scheduler.submit
    elif measure is throughput:
        submit = ThreadPoolExecutor(2).submit
    else:
        # The peer with priorities of its own is the fair one: a FIFO would be slower by thousands.
        pool = PriorityQueuePool(2)
        submit, critical = pool.submit, functools.partial(pool.submit, priority=0)
    if measure is throughput:
        return statistics.median(throughput(submit) for _ in range(20))
    return statistics.median(critical_wait(submit, critical) for _ in range(3))


def wait_in_fifo():
    """Return how long an urgent task waits in a ThreadPoolExecutor."""
    pool = ThreadPoolExecutor(2)
    return critical_wait(pool.submit, pool.submit)


def gpu_block(ours):
    """Return seconds that a block of a window's features takes on a GPU, taken and freed."""
    from cuda.bindings import driver

    from speechrnt.gpu import GpuMemoryPool

    pool = GpuMemoryPool()
    pool.allocate(MIB).free()
    driver.cuCtxPushCurrent(driver.cuDevicePrimaryCtxRetain(0)[1])
    size, count = 960_000, 500

    def take():
        if ours:
            pool.allocate(size).free()
        else:
            driver.cuMemFree(driver.cuMemAlloc(size)[1])

    seconds = []
    for _ in range(20):
        started = time.perf_counter()
        for _ in range(count):
            take()
        seconds.append((time.perf_counter() - started) / count)
    return statistics.median(seconds)


def gpu_waste(ours):
    """Return the share of the GPU memory taken that nobody has asked for, at the peak of a trace.

    The trace is that of 1 024 streams in perf/gpu_traces.py.
    """
    from cuda.bindings import driver
    from gpu_traces import speech_trace

    from speechrnt.gpu import GpuMemoryPool

    trace = speech_trace(1024, 100_000)
    sizes = trace[trace > 0]
    asked = np.cumsum(np.where(trace > 0, trace, -sizes[np.where(trace > 0, 0, -trace - 1)]))
    peak = int(np.argmax(asked))
    pool = GpuMemoryPool()
    driver.cuCtxPushCurrent(driver.cuDevicePrimaryCtxRetain(0)[1])
    free_before = driver.cuMemGetInfo()[1]
    blocks = []
    for size in trace[: peak + 1].tolist():
        if size < 0:
            block, blocks[-size - 1] = blocks[-size - 1], None
            if ours:
                block.free()
            else:
                driver.cuMemFree(block)
        else:
            blocks.append(pool.allocate(size) if ours else driver.cuMemAlloc(size)[1])
    return 1 - int(asked[peak]) / (free_before - driver.cuMemGetInfo()[1])


@dataclass(frozen=True)
class Claim:
    """A figure of the document and the two measurements that it is compared with.

    Attributes
    ----------
    title
        What it is about.
    claim
        The document's figure.
    baseline
        What is measured against.
    met
        Least relative reduction that meets the claim; 0 if it gives no figure.
    ours, theirs
        Measurements; the less the better.
    unit, scale
        Of the values shown.
    needs_gpu
        Whether it can only be measured with a GPU.
    most
        Largest of our values that meets the claim, which then says nothing of a reduction.
    """

    title: str
    claim: str
    baseline: str
    met: float
    ours: Callable[[], float]
    theirs: Callable[[], float]
    unit: str
    scale: float = 1.0
    needs_gpu: bool = False
    most: float | None = None


def unused(threads, shortest):
    """Return the two measurements of memory held for nothing."""
    return (
        lambda: pooled(held_for_nothing, threads, shortest),
        lambda: plain(held_for_nothing, threads, shortest),
    )


CLAIMS = {
    "allocation": Claim(
        "audio buffer of 30 s, take and write", "−50 to −80 %", "`np.empty`", 0.5,
        lambda: with_pool(bursts, initial_size=16)["p90"], lambda: with_numpy(bursts)["p90"],
        "µs", 1e6,
    ),
    "fragmentation": Claim(
        f"memory held beyond what is in use, buffers of 30 s, {THREADS} threads", "−60 to −90 %",
        "`np.empty`", 0.6, *unused(THREADS, THIRTY_SECONDS), "MiB", 1 / MIB,
    ),
    "fragmentation-4": Claim(
        "the same, 4 threads", "−60 to −90 %", "`np.empty`", 0.6,
        *unused(4, THIRTY_SECONDS), "MiB", 1 / MIB,
    ),
    "fragmentation-any": Claim(
        f"the same, buffers of 1 to 30 s, {THREADS} threads", "−60 to −90 %", "`np.empty`", 0.6,
        *unused(THREADS, 16_000), "MiB", 1 / MIB,
    ),
    "peak": Claim(
        f"peak memory, 64 streams on {THREADS} threads", "−30 to −50 %", "`np.empty`", 0.3,
        lambda: with_pool(streams, THREADS)["peak"], lambda: with_numpy(streams, THREADS)["peak"],
        "MiB", 1 / MIB,
    ),
    "cleanup": Claim(
        "letting go of 16 buffers", "−70 %", "`np.empty`", 0.7,
        lambda: pooled(clean_up), lambda: plain(clean_up), "µs", 1e6,
    ),
    "urgent": Claim(
        "wait of an urgent task behind 10 000", "−40 to −60 %", "`ThreadPoolExecutor`", 0.4,
        lambda: run_tasks(critical_wait, True), wait_in_fifo, "ms", 1e3,
    ),
    "urgent-priority": Claim(
        "the same", "−40 to −60 %", "threads on a `PriorityQueue`", 0.4,
        lambda: run_tasks(critical_wait, True), lambda: run_tasks(critical_wait, False), "ms", 1e3,
    ),
    "throughput": Claim(
        "time per task with a Future", "−20 to −29 % (+25 to +40 % tasks)", "`ThreadPoolExecutor`",
        0.2, lambda: run_tasks(throughput, True), lambda: run_tasks(throughput, False), "µs", 1e6,
    ),
    "spread": Claim(
        "difference of two workers' busy time, all tasks from one", "“better distribution”",
        "no stealing", 0.0, lambda: busy_spread(True), lambda: busy_spread(False), "%", 100,
    ),
    "locks": Claim(
        "times that a queue's lock is taken per task", "−50 to −70 %",
        "threads on a `PriorityQueue`", 0.5, lambda: locks(True), lambda: locks(False), "",
    ),
    "gpu-allocation": Claim(
        "GPU block of 960 000 bytes, take and free", "−80 to −90 % (5 to 10 ×)", "`cuMemAlloc`",
        0.8, lambda: gpu_block(True), lambda: gpu_block(False), "µs", 1e6, needs_gpu=True,
    ),
    "gpu-utilisation": Claim(
        "GPU memory taken beyond what was asked for, at the peak", "5 to 20 %, not 30 to 40 %",
        "`cuMemAlloc`", 0.0, lambda: gpu_waste(True), lambda: gpu_waste(False), "%", 100,
        needs_gpu=True, most=0.2,
    ),
}  # fmt: skip


def measure(name, side):
    command = [sys.executable, __file__, "--measure", name, side]
    path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": path}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
    return json.loads(done.stdout.splitlines()[-1])


def head():
    """Return the first lines of the table."""
    return [
        "| what | claim | baseline | `--only` | measured | change | met |",
        "|---|---|---|---|---:|---:|---|",
    ]


def row(name, pairs):
    """Return the row of a claim.

    Parameters
    ----------
    name
        Of the claim.
    pairs
        The baseline's figure and ours, of each round; none if there is nothing to measure it on.
    """
    claim = CLAIMS[name]
    figures, change, met = "needs a GPU", "", ""
    if pairs:
        theirs, ours = (statistics.median(side) * claim.scale for side in zip(*pairs, strict=True))
        figures = f"{rounded(theirs)} → {rounded(ours)} {claim.unit}".strip()
        less = statistics.median(reduction(other, own) for other, own in pairs)
        is_met = less >= claim.met if claim.most is None else ours <= claim.most * claim.scale
        change, met = percent(-less), "yes" if is_met else "no"
    cells = [claim.title, claim.claim, claim.baseline, name, figures, change, met]
    return f"| {' | '.join(cells)} |"


def reduction(theirs, ours):
    """Return by how much less ours is, as a share of theirs; of nothing, nothing can be less."""
    if theirs:
        return 1 - ours / theirs
    return -math.inf if ours else 0.0


def percent(change):
    """Return a relative change, with as many digits as tell it from the loss of everything."""
    if math.isinf(change):
        return "from 0"
    digits = 0
    while change > -1 and f"{change:.{digits}%}" == f"{-1:.{digits}%}":
        digits += 1
    text = f"{abs(change):.{digits}%}".removesuffix("%")
    sign = "" if float(text) == 0 else "+" if change > 0 else "−"
    return f"{sign}{text} %"


def rounded(value):
    """Return a number with three digits that count, and without an exponent."""
    return f"{Decimal(f'{value:.3g}'):f}"


def machine(rounds):
    """Say where the figures come from."""
    how = "one round" if rounds == 1 else f"medians of {rounds} rounds"
    return (
        f"{cpu_name()}, {usable_cores()} cores, Python {platform.python_version()}, "
        f"NumPy {np.__version__}; {how}."
    )


def put(text, table):
    """Return a text with the table between the marks."""
    if text.count(BEGIN) != 1 or END not in text.partition(BEGIN)[2]:
        raise ValueError(f"there must be one {BEGIN} and an {END} after it")
    block = f"{BEGIN}\n{table}\n{END}"
    return re.sub(f"{re.escape(BEGIN)}.*?{re.escape(END)}", lambda _: block, text, flags=re.DOTALL)


def compare():
    """Measure all rounds and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", choices=CLAIMS, help="one row")
    parser.add_argument("--readme", action="store_true", help="put the table into README.md")
    arguments = parser.parse_args()
    if arguments.readme and arguments.only:
        parser.error("--readme is for the whole table")
    if arguments.rounds < 1:
        parser.error(f"--rounds {arguments.rounds}: must be at least 1")
    lines = head()
    print(*lines, sep="\n", flush=True)
    for name in [arguments.only] if arguments.only else CLAIMS:
        rounds = 0 if CLAIMS[name].needs_gpu and why_unavailable() else arguments.rounds
        pairs = [(measure(name, "theirs"), measure(name, "ours")) for _ in range(rounds)]
        lines.append(row(name, pairs))
        print(lines[-1], flush=True)
    lines += ["", machine(arguments.rounds)]
    print(*lines[-2:], sep="\n")
    if arguments.readme:
        readme = ROOT / "README.md"
        text = put(readme.read_text(encoding="utf-8"), "\n".join(lines))
        readme.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--measure"]:
        claim = CLAIMS[sys.argv[2]]
        print(json.dumps((claim.ours if sys.argv[3] == "ours" else claim.theirs)()))
    else:
        compare()
