"""Each figure of the design that this project was asked for, beside one measured here.

    python perf/reference_claims.py [--rounds N]

The document claims improvements without saying over what. Here the baseline is what a competent
service does without this library. Every measurement is a process of its own, and the two sides of a
row take turns; the table shows the medians over the rounds.
"""

import argparse
import functools
import json
import os
import random
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from bench_pools import THIRTY_SECONDS, bursts, resident_bytes, streams, with_numpy, with_pool
from bench_sched import PriorityQueuePool, critical_wait, new_scheduler, throughput

from speechrnt import Priority
from speechrnt.pools import AudioBufferPool, PoolLimits

THREADS = 32


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


def left_over(take, maintain):
    """Return the share of the memory gained that nobody uses, after 2000 utterances."""
    chance = random.Random(0)
    base = resident_bytes()
    live = []
    for step in range(2000):
        array, lease = take(chance.randint(3_000, THIRTY_SECONDS))
        array.fill(1)
        live.append((array, lease))
        if len(live) > 64:
            del live[chance.randrange(len(live))]
        maintain(step * 0.3)
    del array, lease
    for _ in range(48):
        del live[chance.randrange(len(live))]
    for second in range(60):
        maintain(2000 * 0.3 + second)
    used = sum(array.nbytes for array, _ in live)
    return max(1 - used / (resident_bytes() - base), 0.0)


def pooled(measure, *more):
    """Measure with a pool; `measure` gets what takes a buffer, and what maintains the pool."""
    pool = AudioBufferPool(PoolLimits(max_bytes=2**30))

    def take(n_samples):
        buffer = pool.acquire(n_samples)
        return buffer.array, buffer

    return measure(take, *((pool.maintain,) if more else ()))


def plain(measure, *more):
    """Measure with `np.empty`."""
    nothing = (lambda _: None,) if more else ()
    return measure(lambda n_samples: (np.empty(n_samples, np.float32), None), *nothing)


def busy_spread(stealing):
    """Return by how much the tasks of two workers differ, as a share of all."""
    sys.path.append(str(Path(__file__).parent.parent / "tests"))
    from native import load

    native = load("sched_native")
    with new_scheduler(stealing=stealing) as scheduler:
        for _ in range(50):
            native.Batch(scheduler, 200, spin=5000).spawn_all()
        counts = [worker.executed for worker in scheduler.statistics().workers]
    return (max(counts) - min(counts)) / sum(counts)


def locks(ours):
    """Return lock operations per Python task; a queue under a mutex takes it to put and to get."""
    if not ours:
        return 2.0
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
        Least relative reduction that meets the claim; None if it gives no figure.
    ours, theirs
        Measurements; the less the better.
    unit, scale
        Of the values shown.
    """

    title: str
    claim: str
    baseline: str
    met: float | None
    ours: object
    theirs: object
    unit: str
    scale: float = 1.0


CLAIMS = {
    "allocation": Claim(
        "audio buffer, take and write", "−50 to −80 %", "np.empty", 0.5,
        lambda: with_pool(bursts, initial_size=16)["p90"], lambda: with_numpy(bursts)["p90"],
        "µs", 1e6,
    ),
    "fragmentation": Claim(
        "memory kept for nothing after mixed load", "−60 to −90 %", "np.empty", 0.6,
        lambda: pooled(left_over, True), lambda: plain(left_over, True), "%", 100,
    ),
    "peak": Claim(
        f"peak memory, 64 streams on {THREADS} threads", "−30 to −50 %", "np.empty", 0.3,
        lambda: with_pool(streams, THREADS)["peak"], lambda: with_numpy(streams, THREADS)["peak"],
        "MiB", 2**-20,
    ),
    "cleanup": Claim(
        "letting go of 16 buffers", "−70 %", "np.empty", 0.7,
        lambda: pooled(clean_up), lambda: plain(clean_up), "µs", 1e6,
    ),
    "urgent": Claim(
        "urgent task behind 10 000", "−40 to −60 %", "ThreadPoolExecutor", 0.4,
        lambda: run_tasks(critical_wait, True), wait_in_fifo, "ms", 1e3,
    ),
    "urgent2": Claim(
        "the same", "−40 to −60 %", "threads on a PriorityQueue", 0.4,
        lambda: run_tasks(critical_wait, True), lambda: run_tasks(critical_wait, False), "ms", 1e3,
    ),
    "throughput": Claim(
        "time per task with a Future", "−20 to −29 % (+25 to +40 % tasks)", "ThreadPoolExecutor",
        0.2, lambda: run_tasks(throughput, True), lambda: run_tasks(throughput, False), "µs", 1e6,
    ),
    "spread": Claim(
        "spread of work over two workers, all from one", "“better”", "no stealing", 0.0,
        lambda: busy_spread(True), lambda: busy_spread(False), "%", 100,
    ),
    "locks": Claim(
        "lock operations per task", "−50 to −70 %", "a queue under a mutex", 0.5,
        lambda: locks(True), lambda: locks(False), "",
    ),
}  # fmt: skip

GPU_CLAIMS = (
    ("GPU block, take and free", "5 to 10 ×", "cuMemAlloc", "perf/bench_gpu.py"),
    ("GPU memory in use of reserved", "80 to 95 %", "60 to 70 % without", "perf/bench_gpu.py"),
)


def measure(name, side):
    command = [sys.executable, __file__, "--measure", name, side]
    path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": path}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    return json.loads(done.stdout.splitlines()[-1])


def compare():
    """Measure all rounds and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    print("| what | claim | baseline | here | measured | met |")
    print("|---|---|---|---|---|---|")
    for name, claim in CLAIMS.items():
        pairs = [(measure(name, "theirs"), measure(name, "ours")) for _ in range(arguments.rounds)]
        theirs, ours = (statistics.median(side) * claim.scale for side in zip(*pairs, strict=True))
        change = statistics.median(1 - own / other if other else 0.0 for other, own in pairs)
        met = "yes" if change >= claim.met else "no"
        print(
            f"| {claim.title} | {claim.claim} | {claim.baseline} "
            f"| {theirs:.3g} → {ours:.3g} {claim.unit} | {-change:+.0%} | {met} |",
            flush=True,
        )
    for title, figure, baseline, script in GPU_CLAIMS:
        print(f"| {title} | {figure} | {baseline} | {script} | needs a GPU | – |")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--measure"]:
        claim = CLAIMS[sys.argv[2]]
        print(json.dumps((claim.ours if sys.argv[3] == "ours" else claim.theirs)()))
    else:
        compare()
