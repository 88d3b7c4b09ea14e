"""What the dispatcher adds to the calls of CTranslate2, and what those calls cost.

    python perf/bench_dispatcher.py [--quick] [--rounds N] [--models NAME ...] [--beam N]
        [--tokenizer DIRECTORY]

Saturated: all windows are submitted at once, and the dispatcher's workers come through them; as
many plain threads make the same calls, of the same batch sizes, on the same number of windows.
Idle: one
window is submitted when the last one is done; one plain thread makes the same calls. Features are
copied from memory in both, prompts are built by the dispatcher only, and nothing is made of the
results. Both take turns on the same model, round by round; the table shows medians over the
rounds, of wall time and of the process's CPU time, which suffers less from neighbours.

The second table shows the cost of a window by batch size, for encoder and decoder: pico with short
and full context, and random weights in the shape of tiny, whose transcripts have 16 tokens. Those
have pico's small vocabulary unless `--tokenizer` names a directory with Whisper's `tokenizer.json`
and `vocabulary.json`.
"""

import argparse
import statistics
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
from random_whisper import write_model

import speechrnt
from speechrnt.batch_sizes import BatchSizes
from speechrnt.batching import Dispatcher, Job, SearchOptions
from speechrnt.decoding import build_prompt, length_limit
from speechrnt.pools import AudioBufferPool
from speechrnt.system import usable_cores

N_TOKENS = 16
LARGEST = 8
CASES = (
    ("pico", 300),
    ("pico", 500),
    ("pico", 1000),
    ("pico", 3000),
    ("tiny", 500),
    ("tiny", 3000),
)
QUICK = (("pico", 300), ("pico", 3000))


class Direct:
    """Runs callbacks at once."""

    def submit_nowait(self, fn, /, *args, priority):  # noqa: ARG002
        fn(*args)


class Case:
    """A model and a length of context."""

    def __init__(self, model, frames, beam_size):
        self.model, self.frames = model, frames
        tokenizer = model.tokenizer
        self.prompt = self.prompt_for("en")
        self.limit = length_limit(N_TOKENS, len(self.prompt))
        # No window ends before the others, so that all do the same work.
        self.search = SearchOptions(beam_size=beam_size, suppress_tokens=(tokenizer.eot,))
        rng = np.random.default_rng(0)
        self.features = rng.uniform(-0.5, 0.5, (model.n_mels, frames)).astype(np.float32)
        self.buffers = AudioBufferPool()
        self.n_workers = usable_cores()
        self.sizes = BatchSizes(LARGEST, lambda _: LARGEST, "cpu")
        self.dispatcher = Dispatcher(
            model, self.n_workers, self.sizes, self.buffers, Direct(), max_queued=10_000
        )
        self.costs = self.dispatcher.measure(frames, self.search)

    def close(self):
        self.dispatcher.close()
        self.buffers.close()

    def call(self, size, encode_size):
        """Do what a worker does for a batch, without the worker."""
        encodings = []
        for first in range(0, size, encode_size):
            shape = (min(encode_size, size - first), *self.features.shape)
            features = np.empty(shape, np.float32)
            features[:] = self.features
            encodings.append(self.model.encode(features))
        encoding = encodings[0]
        if len(encodings) > 1:
            joined = np.concatenate([np.asarray(part) for part in encodings])
            encoding = type(encoding).from_array(joined)
        self.model.generate(
            encoding,
            [self.prompt] * size,
            beam_size=self.search.beam_size,
            suppress_tokens=list(self.search.suppress_tokens),
            max_length=self.limit,
            return_scores=True,
            return_no_speech_prob=True,
        )

    def prompt_for(self, language):
        return build_prompt(self.model.tokenizer, language, "transcribe", (), True)

    def write_features(self, out):
        out[:] = self.features

    def job(self, done):
        def failed(error):
            raise error

        return Job(
            frames=self.frames,
            features=self.write_features,
            language="en",
            prompt=self.prompt_for,
            prompt_shape=0,
            max_length=self.limit,
            search=self.search,
            done=done,
            failed=failed,
        )

    def dispatched(self, n_windows):
        """Submit so many windows, and wait for all."""
        left = threading.Semaphore(0)
        for _ in range(n_windows):
            self.dispatcher.submit(self.job(lambda _: left.release()))
        for _ in range(n_windows):
            left.acquire()

    def bare(self, n_windows):
        """Have as many threads make the same calls."""
        encode_size, decode_size = self.sizes.of(self.frames)
        batches = [decode_size] * (n_windows // decode_size)

        def work():
            while batches:
                try:
                    size = batches.pop()
                except IndexError:
                    return
                self.call(size, encode_size)

        threads = [threading.Thread(target=work) for _ in range(self.n_workers)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def overhead(self, n_rounds, seconds):
        """Return how much longer saturated batches, and how many seconds longer idle ones take."""
        encode_size, decode_size = self.sizes.of(self.frames)
        # So that all workers end at about the same time.
        batch = decode_size * self.n_workers
        self.bare(batch)
        took, _ = timed(self.bare, batch)
        n_windows = batch * max(round(seconds / took), 2)
        walls, cpus, idles = [], [], []
        for _ in range(n_rounds):
            wall, cpu = timed(self.dispatched, n_windows)
            bare_wall, bare_cpu = timed(self.bare, n_windows)
            walls.append(wall / bare_wall - 1)
            cpus.append(cpu / bare_cpu - 1)
        for _ in range(10 * n_rounds):
            wall, _ = timed(self.dispatched, 1)
            bare_wall, _ = timed(self.call, 1, 1)
            idles.append(wall - bare_wall)
        return *map(statistics.median, (walls, cpus, idles)), encode_size, decode_size


def timed(function, *arguments):
    started, cpu_started = time.perf_counter(), time.process_time()
    function(*arguments)
    return time.perf_counter() - started, time.process_time() - cpu_started


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="pico only, three rounds")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--seconds", type=float, default=1.0, help="of a saturated measurement")
    parser.add_argument("--beam", type=int, default=5)
    parser.add_argument("--models", nargs="+", choices=("pico", "tiny"), default=["pico", "tiny"])
    parser.add_argument("--tokenizer", type=Path, metavar="DIRECTORY")
    arguments = parser.parse_args()
    n_rounds = 3 if arguments.quick else arguments.rounds
    cases = [case for case in (QUICK if arguments.quick else CASES) if case[0] in arguments.models]
    curves = []
    print(f"{usable_cores()} workers of one thread, beam {arguments.beam}, {n_rounds} rounds\n")
    print("| model | context | batch: encode, decode | saturated | CPU time | idle, per window |")
    print("|---|---:|---:|---:|---:|---:|")
    with tempfile.TemporaryDirectory() as directory:
        if any(name == "tiny" for name, _ in cases):
            write_model("tiny", directory, tokenizer=arguments.tokenizer)
        for name in dict.fromkeys(name for name, _ in cases):
            model = speechrnt.load_model(
                directory if name == "tiny" else name,
                "cpu",
                cpu_threads=1,
                num_workers=usable_cores(),
            )
            for frames in (frames for other, frames in cases if other == name):
                case = Case(model, frames, arguments.beam)
                wall, cpu, idle, *sizes = case.overhead(n_rounds, arguments.seconds)
                case.close()
                print(
                    f"| {name} | {frames / 100:g} s | {sizes[0]}, {sizes[1]} | {wall:+.1%} "
                    f"| {cpu:+.1%} | {idle * 1e3:+.2f} ms |",
                    flush=True,
                )
                curves.append((name, frames, case.costs))
    print("\nms a window, by windows in the call\n")
    print("| model | context | part | 1 | 2 | 4 | 8 |\n|---|---:|---|---:|---:|---:|---:|")
    for name, frames, costs in curves:
        for part, curve in (("encode", costs.encode), ("decode", costs.decode)):
            cells = (f"{curve[size] * 1e3:.2f}" if size in curve else "" for size in (1, 2, 4, 8))
            print(f"| {name} | {frames / 100:g} s | {part} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
