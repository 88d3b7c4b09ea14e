"""The pool of GPU memory: how blocks are found, on the host alone; and the pool on a driver.

    python perf/bench_gpu.py [--rounds N]

The first table replays traces with our index, with a list as in RMM, and with a tree as in PyTorch
and CuPy, which is an exact best fit; peers take turns, and medians count. The second replays them
with whole pools: by default on the test double of the driver, which tells what the pool costs
beyond the driver and how much memory it takes. With --gpu the driver is the real one, and a third
table compares with cuMemAlloc and cuMemAllocAsync. That one needs a GPU.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent / "tests"), str(HERE)]

from gpu_traces import MIB, random_trace, speech_trace  # noqa: E402
from native import cuda_double, load  # noqa: E402

from speechrnt.gpu import why_unavailable  # noqa: E402

TRACES = {
    "random, 1 000 of 1 MiB": lambda: random_trace(1000, MIB),
    "random, 10 000 of 1 MiB": lambda: random_trace(10_000, MIB),
    "random, 100 000 of 4 MiB": lambda: random_trace(100_000, 4 * MIB),
    "random, 100 000 of 64 MiB": lambda: random_trace(100_000, 64 * MIB),
    "speech, 64 streams": lambda: speech_trace(64, 400_000),
    "speech, 1 024 streams": lambda: speech_trace(1024, 400_000),
}
PEERS = ("ours", "tree", "list")


def compare_indexes(module, rounds):
    """Print time per operation and footprint of each index on each trace."""
    print("index: ns per operation, and footprint: highest address / peak of live bytes")
    print(f"{'trace':28}{'holes':>7}", *(f"{peer:>9}" for peer in PEERS), end=" ")
    print(f"{'tree/ours':>10}{'list/ours':>10}{'ours fp':>9}{'best fit':>9}")
    for name, make in TRACES.items():
        trace = make()
        times = {peer: [] for peer in PEERS}
        for _ in range(rounds):
            for peer in PEERS:
                # The list takes minutes on the large traces; its first part is as slow.
                if peer != "list" or len(times["list"]) < 1:
                    times[peer].append(module.replay(peer, trace)[0] * 1e9)
        ns = {peer: statistics.median(times[peer]) for peer in PEERS}
        ours, exact = (module.replay(peer, trace, True)[1] for peer in ("ours", "tree"))
        print(
            f"{name:28}{exact['most_holes']:7}",
            *(f"{ns[peer]:9.1f}" for peer in PEERS),
            f"{ns['tree'] / ns['ours']:9.1f}x{ns['list'] / ns['ours']:9.1f}x"
            f"{ours['footprint'] / ours['peak']:9.3f}{exact['footprint'] / exact['peak']:9.3f}",
            flush=True,
        )


def measure_pools(module, rounds):
    """Print time per operation and memory of whole pools on the test double."""
    from speechrnt.gpu import GpuMemoryPool

    print("\npool: ns per operation, and memory at the peak, in MiB")
    print(
        f"{'trace':28}{'free':>8}{'free_on':>9}{'live':>9}{'reserved':>10}{'bound':>9}{'grows':>7}"
    )
    for name, make in TRACES.items():
        trace = make()
        times = {False: [], True: []}
        for _ in range(rounds):
            for on_stream in (False, True):
                pool = GpuMemoryPool()
                seconds, failures = module.replay_pool(pool, trace, on_stream)
                assert failures == 0
                times[on_stream].append(seconds * 1e9)
                if not on_stream:
                    now = pool.statistics()
        bound = 1.10 * now.peak + 32 * MIB
        print(
            f"{name:28}{statistics.median(times[False]):8.1f}{statistics.median(times[True]):9.1f}"
            f"{now.peak / MIB:9.0f}{now.peak_reserved / MIB:10.0f}{bound / MIB:9.0f}{now.grows:7}",
            flush=True,
        )


def compare_drivers(rounds):
    """Print the time of an allocation and a free, from Python, on a real GPU."""
    from cuda.bindings import driver

    from speechrnt.gpu import GpuMemoryPool

    def measure(allocate_and_free, n=2000):
        times = []
        for _ in range(rounds):
            started = time.perf_counter()
            for _ in range(n):
                allocate_and_free()
            times.append((time.perf_counter() - started) / n * 1e9)
        return statistics.median(times)

    pool = GpuMemoryPool()
    stream = pool.stream()
    driver.cuCtxPushCurrent(driver.cuDevicePrimaryCtxRetain(0)[1])
    print("\ndriver: ns per allocation and free, from Python")
    print(f"{'size':>10}{'free':>10}{'free_on':>10}{'cuMemAllocAsync':>17}{'cuMemAlloc':>12}")
    for size in (64 * 1024, 480_000, 960_000, 1_920_000, 3_840_000):
        row = [
            measure(lambda size=size: pool.allocate(size).free()),
            measure(lambda size=size: pool.allocate(size, stream=stream).free_on(stream)),
            measure(
                lambda size=size: driver.cuMemFreeAsync(
                    driver.cuMemAllocAsync(size, int(stream))[1], int(stream)
                )
            ),
            measure(lambda size=size: driver.cuMemFree(driver.cuMemAlloc(size)[1]), 200),
        ]
        print(f"{size:10}{row[0]:10.0f}{row[1]:10.0f}{row[2]:17.0f}{row[3]:12.0f}", flush=True)
    driver.cuCtxPopCurrent()
    driver.cuDevicePrimaryCtxRelease(0)


def main():
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--gpu", action="store_true", help="use the real driver")
    options = parser.parse_args()
    if options.gpu:
        if (reason := why_unavailable()) is not None:
            sys.exit(f"--gpu needs a GPU: {reason}")
    else:
        cuda_double.load().configure(capacity=2**40)
    module = load("gpu_index", HERE)
    compare_indexes(module, options.rounds)
    measure_pools(module, options.rounds)
    if options.gpu:
        compare_drivers(options.rounds)
    else:
        print("\nwhat the driver costs was not measured: it needs a GPU, and --gpu")


if __name__ == "__main__":
    main()
