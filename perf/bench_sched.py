"""The scheduler against oneTBB, ThreadPoolExecutor and a pool on a PriorityQueue.

    python perf/bench_sched.py [--rounds N]

Every peer runs in processes of its own, which pyperf makes, one for each row, with two workers
each; the peers take turns, round by round, so that a busy machine disturbs all alike. The table
shows medians over all values, and the median of the rounds' ratios. oneTBB needs its headers
(Debian: libtbb-dev) and is left out without them.
"""

import functools
import json
import os
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

import pyperf

HERE = Path(__file__).parent
WORKERS = 2
BACKLOG = 10_000
PYTHON_PEERS = ("speechrnt", "ThreadPoolExecutor", "PriorityQueue pool")


class PriorityQueuePool:
    """The textbook pool with priorities: threads on a `queue.PriorityQueue`."""

    def __init__(self, workers, items=None):
        self._queue = queue.PriorityQueue() if items is None else items
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


def throughput(submit):
    """Return seconds per task, from submission to the result, in a batch of 1000."""
    started = time.perf_counter()
    for future in [submit(int) for _ in range(1000)]:
        future.result()
    return (time.perf_counter() - started) / 1000


def time_to_start(submit):
    """Return the median of seconds from submission to start, of tasks 1 ms apart."""
    waits = []
    for _ in range(25):
        time.sleep(0.001)
        submitted = time.perf_counter()
        waits.append(submit(time.perf_counter).result() - submitted)
    return statistics.median(waits)


def time_to_start_busy(submit):
    """Return the same while this thread computes in pure Python instead of waiting."""
    waits = []
    for _ in range(5):
        submitted = time.perf_counter()
        future = submit(time.perf_counter)
        while not future.done():
            pass
        waits.append(future.result() - submitted)
    return statistics.median(waits)


def critical_wait(submit, submit_critical):
    """Return seconds that a CRITICAL task waits behind a backlog of 20 µs tasks."""

    def task():
        end = time.perf_counter() + 20e-6
        while time.perf_counter() < end:
            pass

    backlog = [submit(task) for _ in range(BACKLOG)]
    submitted = time.perf_counter()
    waited = submit_critical(time.perf_counter).result() - submitted
    for future in backlog:
        future.result()
    return waited


def executor_rows(submit, submit_critical):
    return {
        "throughput": functools.partial(throughput, submit),
        "start idle": functools.partial(time_to_start, submit),
        "start busy": functools.partial(time_to_start_busy, submit),
        "critical": functools.partial(critical_wait, submit, submit_critical),
    }


def new_scheduler(**options):
    from speechrnt import Scheduler

    return Scheduler(workers=WORKERS, max_queued=100_000, **options)


def native_rows(kernels, scheduler):
    """Each row returns seconds per operation."""
    ring = kernels.Ring()
    tasks = kernels.Tasks(scheduler, 200)
    # 80 % of the tasks take 2 µs, 20 % some 40 µs.
    pools = [("stealing", scheduler), ("no stealing", new_scheduler(stealing=False))]
    uneven = {name: kernels.Tasks(pool, 200, spin=2000, long_spin=40_000) for name, pool in pools}
    return {
        "push+pop": lambda: ring.push_and_remove(1000, True) * 1e-9,
        "push+take": lambda: ring.push_and_remove(1000, False) * 1e-9,
        "spawned": lambda: tasks.spawn(500) * 1e-9,
        "submitted": lambda: kernels.Tasks(scheduler, 50_000).submit()[1] * 1e-9,
        "stealing": lambda: uneven["stealing"].spawn(5) * 1e-9,
        "no stealing": lambda: uneven["no stealing"].spawn(5) * 1e-9,
    }


def rows_of(peer):
    if peer == "ThreadPoolExecutor":
        pool = ThreadPoolExecutor(WORKERS)
        return executor_rows(pool.submit, pool.submit)
    if peer == "PriorityQueue pool":
        pool = PriorityQueuePool(WORKERS)
        return executor_rows(pool.submit, functools.partial(pool.submit, priority=0))
    import sched_kernels

    from speechrnt import Priority

    scheduler = new_scheduler()
    critical = functools.partial(scheduler.submit, priority=Priority.CRITICAL)
    rows = executor_rows(scheduler.submit, critical)
    return rows | native_rows(sched_kernels, scheduler)


def measure_peer():
    """Measure the rows of one peer: the processes of pyperf come through here, a row each."""

    def add_peer(command, arguments):
        command.extend(("--peer", arguments.peer))

    runner = pyperf.Runner(processes=1, values=10, warmups=2, loops=1, add_cmdline_args=add_peer)
    runner.argparser.add_argument("--peer", choices=PYTHON_PEERS)
    arguments = runner.parse_args()
    rows = rows_of(arguments.peer)
    for name, measure in rows.items():
        runner.bench_time_func(
            name, lambda loops, measure=measure: sum(measure() for _ in range(loops))
        )


def run_peer(peer, directory):
    """Return the values of each row."""
    path = directory / "peer.json"
    path.unlink(missing_ok=True)
    command = [sys.executable, __file__, "--peer", peer, "--quiet", "-o", str(path)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, [directory, HERE.parent]))}
    command += ["--inherit-environ", "PYTHONPATH"]
    subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL)
    suite = pyperf.BenchmarkSuite.load(str(path))
    return {row.get_name(): list(row.get_values()) for row in suite.get_benchmarks()}


def locks_per_task(kernels):
    """Return how often our mutexes are locked per task, which is a count and needs no clock."""

    def count(tasks, run):
        with new_scheduler() as scheduler:
            run(scheduler)
            scheduler.drain()
            return scheduler.statistics().lock_operations / tasks

    def run_python(scheduler):
        for future in [scheduler.submit(int) for _ in range(10_000)]:
            future.result()

    return {
        "native, spawned": count(50_000, lambda pool: kernels.Tasks(pool, 200).spawn(250)),
        "native, submitted": count(50_000, lambda pool: kernels.Tasks(pool, 50_000).submit()),
        "Python": count(10_000, run_python),
    }


def build_tbb(directory):
    """Return the command that measures oneTBB, or why there is none."""
    program = str(directory / "tbb_tasks")
    compiler = shutil.which("g++")
    if compiler is None:
        return None, "no g++"
    flags = ["-O2", "-std=c++17", "-o", program, str(HERE / "tbb_tasks.cpp"), "-ltbb"]
    done = subprocess.run([compiler, *flags], capture_output=True, check=False)
    return ([program], "") if done.returncode == 0 else (None, "libtbb-dev is not installed")


def run_tbb(command):
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return {row: [ns * 1e-9] for row, ns in json.loads(done.stdout).items()}


def show(seconds):
    for unit, scale in (("s", 1), ("ms", 1e3), ("µs", 1e6)):
        if seconds * scale >= 1:
            return f"{seconds * scale:.3g} {unit}"
    return f"{seconds * 1e9:.3g} ns"


def compare(n_rounds):
    sys.path.append(str(HERE.parent / "tests"))
    from native import load

    kernels = load("sched_kernels", HERE)
    rounds = []
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        shutil.copy(kernels.__file__, directory)
        tbb, reason = build_tbb(directory)
        for _ in range(n_rounds):
            rounds.append({peer: run_peer(peer, directory) for peer in PYTHON_PEERS})
            if tbb:
                rounds[-1]["oneTBB"] = run_tbb(tbb)

    def median(peer, row):
        return statistics.median([value for results in rounds for value in results[peer][row]])

    def line(label, row, peer, other_row=None):
        other_row = other_row or row
        ratio = statistics.median(
            statistics.median(results[peer][other_row])
            / statistics.median(results["speechrnt"][row])
            for results in rounds
        )
        name = peer if other_row == row else other_row
        print(
            f"| {label} | {show(median('speechrnt', row))} "
            f"| {name}: {show(median(peer, other_row))} | {ratio:.2g} x |"
        )

    print(f"{WORKERS} workers, {n_rounds} round(s) of 10 values; medians\n")
    print("| what | speechrnt | peer | peer / speechrnt |")
    print("|---|---:|---:|---:|")
    for row in ("push+pop", "push+take"):
        print(f"| deque {row} | {show(median('speechrnt', row))} | | |")
    for row in ("spawned", "submitted"):
        if tbb:
            line(f"native task, {row}", row, "oneTBB")
        else:
            ours = show(median("speechrnt", row))
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
    for row, locks in locks_per_task(kernels).items():
        # A pool on one locked queue takes its mutex to push and to pop.
        fewer = 1 - locks / 2
        print(f"| mutex locks per task, {row} | {locks:.2g} | mutex queue: 2 | {fewer:.1%} fewer |")


def main():
    if "--peer" in sys.argv:
        measure_peer()
    else:
        rounds = sys.argv[2] if sys.argv[1:2] == ["--rounds"] else "3"
        compare(int(rounds))


if __name__ == "__main__":
    main()
