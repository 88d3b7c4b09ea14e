"""The scheduler against oneTBB, ThreadPoolExecutor and a pool on a PriorityQueue.

    python perf/bench_sched.py [--rounds N]

Every peer runs in a process of its own, two workers each; the peers take turns, round by round, so
that a busy machine disturbs all alike. The table shows medians over the rounds, and the median of
the rounds' ratios. oneTBB needs its headers (Debian: libtbb-dev) and is left out without them.
"""

import argparse
import functools
import json
import queue
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).parent
WORKERS = 2
BACKLOG = 10_000


class PriorityQueuePool:
    """The textbook pool with priorities: threads on a `queue.PriorityQueue`."""

    def __init__(self, workers):
        self._queue = queue.PriorityQueue()
        self._number = 0
        for _ in range(workers):
            threading.Thread(target=self._work, daemon=True).start()

    def submit(self, fn, *args, priority=2):
        """Queue a call."""
        self._number += 1
        future = Future()
        self._queue.put((priority, self._number, future, fn, args))
        return future

    def _work(self):
        while True:
            _, _, future, fn, args = self._queue.get()
            future.set_result(fn(*args))


def median_of(function, count):
    return statistics.median(function() for _ in range(count))


def throughput(submit):
    """Return seconds per task, from submission to the result, in batches of 1000."""

    def batch():
        started = time.perf_counter()
        for future in [submit(int) for _ in range(1000)]:
            future.result()
        return (time.perf_counter() - started) / 1000

    return median_of(batch, 50)


def time_to_start(submit):
    """Return seconds from submission to start, of tasks 1 ms apart."""

    def once():
        time.sleep(0.001)
        submitted = time.perf_counter()
        return submit(time.perf_counter).result() - submitted

    return median_of(once, 500)


def time_to_start_busy(submit):
    """Return the same while this thread computes in pure Python instead of waiting."""

    def once():
        submitted = time.perf_counter()
        future = submit(time.perf_counter)
        while not future.done():
            pass
        return future.result() - submitted

    return median_of(once, 50)


def critical_wait(submit, submit_critical):
    """Return seconds that a CRITICAL task waits behind a backlog of 20 µs tasks."""

    def task():
        end = time.perf_counter() + 20e-6
        while time.perf_counter() < end:
            pass

    def once():
        backlog = [submit(task) for _ in range(BACKLOG)]
        submitted = time.perf_counter()
        waited = submit_critical(time.perf_counter).result() - submitted
        for future in backlog:
            future.result()
        return waited

    return median_of(once, 5)


def measure_executor(submit, submit_critical):
    return {
        "throughput": throughput(submit),
        "start idle": time_to_start(submit),
        "start busy": time_to_start_busy(submit),
        "critical": critical_wait(submit, submit_critical),
    }


def measure_speechrnt():
    sys.path.append(str(HERE.parent / "tests"))
    from native import load

    from speechrnt import Priority, Scheduler

    kernels = load("sched_kernels", HERE)
    with Scheduler(workers=WORKERS, max_queued=100_000) as scheduler:
        critical = functools.partial(scheduler.submit, priority=Priority.CRITICAL)
        results = measure_executor(scheduler.submit, critical)

    def locks_per_task(run, tasks):
        with Scheduler(workers=WORKERS, max_queued=100_000) as scheduler:
            run(scheduler)
            scheduler.drain()
            return scheduler.statistics().lock_operations / tasks

    def submit(scheduler):
        return kernels.Tasks(scheduler, 50_000).submit()

    results["locks spawned"] = locks_per_task(
        lambda scheduler: kernels.Tasks(scheduler, 200).spawn(250), 50_000
    )
    results["locks submitted"] = locks_per_task(submit, 50_000)
    ring = kernels.Ring()
    results["push+pop"] = min(ring.push_and_remove(10_000, True) for _ in range(5)) * 1e-9
    results["push+take"] = min(ring.push_and_remove(10_000, False) for _ in range(5)) * 1e-9
    with Scheduler(workers=WORKERS, max_queued=100_000) as scheduler:
        tasks = kernels.Tasks(scheduler, 200)
        tasks.spawn(200)
        results["spawned"] = tasks.spawn(2000) * 1e-9
        results["submitted"] = min(submit(scheduler)[1] for _ in range(5)) * 1e-9
        # 80 % of the tasks take 2 µs, 20 % some 40 µs.
        uneven = kernels.Tasks(scheduler, 200, spin=2000, long_spin=40_000)
        for name, stealing in (("stealing", True), ("no stealing", False)):
            kernels.set_stealing(scheduler, stealing)
            results[name] = median_of(lambda: uneven.spawn(5), 10) * 1e-9
    return results


def measure_peer(name):
    if name == "speechrnt":
        return measure_speechrnt()
    if name == "ThreadPoolExecutor":
        with ThreadPoolExecutor(WORKERS) as pool:
            return measure_executor(pool.submit, pool.submit)
    pool = PriorityQueuePool(WORKERS)
    return measure_executor(pool.submit, functools.partial(pool.submit, priority=0))


def build_tbb(directory):
    """Return the command that measures oneTBB, or why there is none."""
    program = str(Path(directory) / "tbb_tasks")
    compiler = shutil.which("g++")
    if compiler is None:
        return None, "no g++"
    flags = ["-O2", "-std=c++17", "-o", program, str(HERE / "tbb_tasks.cpp"), "-ltbb"]
    done = subprocess.run([compiler, *flags], capture_output=True, check=False)
    return ([program], "") if done.returncode == 0 else (None, "libtbb-dev is not installed")


def show(seconds):
    for unit, scale in (("s", 1), ("ms", 1e3), ("µs", 1e6)):
        if seconds * scale >= 1:
            return f"{seconds * scale:.3g} {unit}"
    return f"{seconds * 1e9:.3g} ns"


def compare(n_rounds):
    peers = {
        name: [sys.executable, __file__, "--peer", name]
        for name in ("speechrnt", "ThreadPoolExecutor", "PriorityQueue pool")
    }
    rounds = []
    with tempfile.TemporaryDirectory() as directory:
        tbb, reason = build_tbb(directory)
        if tbb:
            peers["oneTBB"] = tbb
        for _ in range(n_rounds):
            rounds.append({})
            for name, command in peers.items():
                done = subprocess.run(command, capture_output=True, text=True, check=True)
                rounds[-1][name] = json.loads(done.stdout.splitlines()[-1])
                if name == "oneTBB":
                    rounds[-1][name] = {k: v * 1e-9 for k, v in rounds[-1][name].items()}

    def values(peer, row):
        return [results[peer][row] for results in rounds]

    def line(label, row, peer, other_row=None):
        ours = values("speechrnt", row)
        theirs = values(peer, other_row or row)
        ratio = statistics.median(b / a for a, b in zip(ours, theirs, strict=True))
        name = other_row or peer
        print(
            f"| {label} | {show(statistics.median(ours))} "
            f"| {name}: {show(statistics.median(theirs))} | {ratio:.2g} x |"
        )

    print(f"{WORKERS} workers, median of {n_rounds} round(s)\n")
    print("| what | speechrnt | peer | peer / speechrnt |")
    print("|---|---:|---:|---:|")
    for row in ("push+pop", "push+take"):
        print(f"| deque {row} | {show(statistics.median(values('speechrnt', row)))} | | |")
    for row in ("spawned", "submitted"):
        if "oneTBB" in peers:
            line(f"native task, {row}", row, "oneTBB")
        else:
            ours = show(statistics.median(values("speechrnt", row)))
            print(f"| native task, {row} | {ours} | oneTBB skipped: {reason} | |")
    line("Python task with future", "throughput", "ThreadPoolExecutor")
    line("submit to start, main idle, p50", "start idle", "ThreadPoolExecutor")
    line("submit to start, main busy, p50", "start busy", "ThreadPoolExecutor")
    for peer in ("ThreadPoolExecutor", "PriorityQueue pool"):
        line(f"CRITICAL wait, {BACKLOG} NORMAL queued, p50", "critical", peer)
    line(
        "native task, 80/20 durations, spawned by one worker",
        "stealing",
        "speechrnt",
        "no stealing",
    )
    for row in ("spawned", "submitted"):
        # A pool on one locked queue takes its mutex to push and to pop.
        locks = statistics.median(values("speechrnt", f"locks {row}"))
        print(f"| mutex locks per task, {row} | {locks:.3g} | mutex queue: 2 | {2 / locks:.2g} x |")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--peer", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.peer:
        print(json.dumps(measure_peer(arguments.peer)))
    else:
        compare(arguments.rounds)


if __name__ == "__main__":
    main()
