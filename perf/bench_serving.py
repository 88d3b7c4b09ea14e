"""The engine under load, against faster-whisper and bare CTranslate2.

    python perf/bench_serving.py [--quick] [--rounds N] [--seconds S] [--clients N ...]
        [--loads PERCENT ...] [--rows ROW ...] [--beams N ...] [--config JSON]
        [--tokenizer DIRECTORY] [--tokens N]

Short clips (the recordings of the tests that are one window each), int8, all cores, the language
given, no second attempts: the same options for everybody. The peers are

- lock: faster-whisper, one call at a time, on all cores;
- workers: faster-whisper with as many `num_workers` as cores, one core each;
- engine: `PerformanceOptimizedSTT`, which also looks for speech;
- limit: the engine's arithmetic (voice activity, features, encode, decode, text) in a plain loop
  around CTranslate2: no queue, no futures, no callbacks. It knows as many clips as there are
  clients at the time, and what batches they make, and uses the batch size that is best for it.

Each peer is a process of its own, all idle but one: they take turns, round by round, so that a busy
machine disturbs all alike. Closed loop: each client sends its next clip when it has the text of the
last. Open loop: clips come as a Poisson process, at a share of what the same peer managed in the
closed loop; latency counts from when a clip was due. The tables show medians over the rounds, and
of the rounds' ratios.

The rows: pico, whose context is the audio (auto) or 30 s (full), and random weights in the shapes
of tiny and base, 30 s, which say `--tokens` tokens to everything. Those have pico's small
vocabulary unless `--tokenizer` names a directory with Whisper's `tokenizer.json` and
`vocabulary.json`, which makes a step of the decoder cost what it really does.
"""

import argparse
import itertools
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import CancelledError, ThreadPoolExecutor, wait
from contextlib import ExitStack, suppress
from pathlib import Path

import numpy as np
from random_whisper import write_model

ROOT = Path(__file__).parent.parent
SAMPLES = ROOT / "tests" / "samples"

ROWS = {  # model, context, how much longer a measurement is
    "pico auto": ("pico", "auto", 1),
    "pico full": ("pico", "full", 1),
    "tiny full": ("tiny", "full", 3),
    "base full": ("base", "full", 3),
}
PEERS = ("lock", "workers", "limit", "engine")
LIMIT_BATCHES = (1, 2, 4, 8)
# Clips whose texts are compared, at the start.
COMPARED = 8
# Part of a measurement after which its clients are in step.
LEAD = 0.25
# A measurement goes on until so many clips are finished, but not forever.
LEAST_FINISHED = 8
MOST_S = 60
# Arrivals of an open loop that wait at most in threads, where a peer's calls block.
MOST_THREADS = 256

THRESHOLDS = dict.fromkeys(
    ("compression_ratio_threshold", "log_prob_threshold", "no_speech_threshold")
)


def cores():
    from speechrnt.system import usable_cores

    return usable_cores()


class FasterWhisper:
    """faster-whisper, one call at a time or several."""

    def __init__(self, setup):
        from faster_whisper import WhisperModel

        self.is_locked = setup["peer"] == "lock"
        threads, workers = (cores(), 1) if self.is_locked else (1, cores())
        self._model = WhisperModel(setup["model"], "cpu", cpu_threads=threads, num_workers=workers)
        self._slots = threading.Semaphore(1 if self.is_locked else MOST_THREADS)
        self._options = THRESHOLDS | {
            "beam_size": setup["beam"],
            "temperature": 0.0,
            "without_timestamps": True,
        }
        self._is_over = False

    def transcribe(self, clip):
        samples, language = clip
        with self._slots:
            if self._is_over:
                raise CancelledError
            segments, _ = self._model.transcribe(samples, language, **self._options)
            segments = list(segments)
        text = "".join(segment.text for segment in segments).strip()
        return text, sum(len(segment.tokens) for segment in segments)

    def begin(self):
        self._is_over = False

    def abandon(self):
        self._is_over = True

    def batch(self):
        return 1.0


class Engine:
    """Ours."""

    def __init__(self, setup):
        from speechrnt import OptimizationConfig, PerformanceOptimizedSTT

        config = OptimizationConfig(max_queued_requests=4096, **setup["config"])
        self._stt = PerformanceOptimizedSTT(config, setup["model"], device="cpu")
        self._options = THRESHOLDS | {
            "beam_size": setup["beam"],
            "audio_context": setup["context"],
        }
        self._stt.warm_up(**self._options)
        self._futures = set()

    def submit(self, clip):
        samples, language = clip
        return self._stt.transcribe_async(samples, language, **self._options)

    def transcribe(self, clip):
        future = self.submit(clip)
        self._futures.add(future)
        try:
            result = future.result()
        finally:
            self._futures.discard(future)
        return result.text, sum(len(segment.tokens) for segment in result.segments)

    def begin(self):
        self._sizes_before = dict(self._stt.get_performance_statistics().dispatcher.batch_sizes)

    def abandon(self):
        for future in list(self._futures):
            future.cancel()

    def batch(self):
        """Return how many windows were decoded at once, on average."""
        sizes = self._stt.get_performance_statistics().dispatcher.batch_sizes
        counts = {size: n - self._sizes_before.get(size, 0) for size, n in sizes.items()}
        return sum(size * n for size, n in counts.items()) / max(sum(counts.values()), 1)


class Limit:
    """The engine's arithmetic without the engine."""

    def __init__(self, setup):
        from speechrnt import OptimizationConfig, load_model

        config = OptimizationConfig(**setup["config"])
        self._workers, threads = config.model_threads("cpu", cores())
        self._model = load_model(
            setup["model"], "cpu", num_workers=self._workers, cpu_threads=threads
        )
        self._beam_size = setup["beam"]
        self._plan = make_plan(self._model, setup["context"])
        self._contexts = {}

    def context(self, clip):
        """Return the context of a clip, which the loop may know before it has looked."""
        key = id(clip)
        if key not in self._contexts:
            self._contexts[key] = self._features(clip).shape[1]
        return self._contexts[key]

    def _features(self, clip):
        from speechrnt import _mel, _mel_task
        from speechrnt.features import HOP_LENGTH

        [samples] = windows(clip[0], self._plan)
        frames = len(samples) // HOP_LENGTH
        features = np.empty((self._model.n_mels, self._plan.context(frames)), np.float32)
        log10_mel = np.empty((self._model.n_mels, frames), np.float32)
        maximum = _mel_task.compute(samples, log10_mel)
        _mel.normalize(log10_mel, out=features[:, :frames], maximum=maximum)
        features[:, frames:] = (max(-10.0, maximum - 8) + 4) / 4
        return features

    def transcribe_batch(self, clips):
        from speechrnt.decoding import build_prompt, length_limit, parse_result

        model, plan = self._model, self._plan
        features = np.stack([self._features(clip) for clip in clips])
        prompts = [
            build_prompt(model.tokenizer, language, "transcribe", (), True) for _, language in clips
        ]
        context = features.shape[2]
        limit = length_limit(plan.most_tokens(1, context), len(prompts[0]))
        outputs = model.generate(
            model.encode(features),
            prompts,
            beam_size=self._beam_size,
            max_length=limit,
            return_scores=True,
            return_no_speech_prob=True,
            suppress_tokens=list(plan.search.suppress_tokens),
        )
        results = [
            parse_result(output, model.tokenizer, len(prompt), 0.0, 1.0, limit)
            for output, prompt in zip(outputs, prompts, strict=True)
        ]
        return [(result.text, len(result.tokens)) for result in results]

    def transcribe(self, clip):
        [result] = self.transcribe_batch([clip])
        return result

    def closed_loop(self, clips, n_clients, seconds, batch):
        """Measure with as many clips at a time, in batches of so many."""
        measurement = Measurement(seconds)
        lock = threading.Lock()
        upcoming = itertools.cycle(clips)
        waiting = []
        in_hand = 0

        def take():
            while len(waiting) + in_hand < n_clients:
                waiting.append((next(upcoming), time.perf_counter()))
            if not waiting:
                return []
            context = self.context(waiting[0][0])
            alike = [i for i, (clip, _) in enumerate(waiting) if self.context(clip) == context]
            return [waiting.pop(i) for i in reversed(alike[:batch])]

        def work():
            nonlocal in_hand
            while not measurement.is_over:
                with lock:
                    taken = take()
                    in_hand += len(taken)
                if not taken:
                    time.sleep(0.001)
                    continue
                self.transcribe_batch([clip for clip, _ in taken])
                with lock:
                    in_hand -= len(taken)
                    for _, sent in taken:
                        measurement.count(sent)

        threads = [threading.Thread(target=work) for _ in range(min(self._workers, n_clients))]
        for thread in threads:
            thread.start()
        measurement.run()
        for thread in threads:
            thread.join()
        return measurement.result() | {"batch": batch}


def make_plan(model, context):
    """Return how the engine would go about a clip."""
    from speechrnt import plan

    return plan.make_plan(model, plan.UtteranceOptions(language="en", audio_context=context))


def windows(samples, plan):
    """Return the windows of a recording."""
    from speechrnt.segmentation import Cutter, WindowCut
    from speechrnt.vad import FRAME_SAMPLES

    cutter = Cutter(plan.segmentation, True)
    past = len(samples) - len(samples) % FRAME_SAMPLES
    events = [*cutter.push(samples[:past]), *cutter.flush(samples[past:])]
    return [samples[event.start : event.end] for event in events if isinstance(event, WindowCut)]


def find_clips():
    """Return file and language of the recordings that are one window."""
    import speechrnt

    plan = make_plan(speechrnt.load_model("pico", "cpu", cpu_threads=1), "full")
    entries = json.loads((SAMPLES / "manifest.json").read_text(encoding="utf-8"))
    clips = [(str(SAMPLES / entry["file"]), entry["lang"]) for entry in entries]
    return [
        clip for clip in clips if len(windows(speechrnt.load_audio(clip[0]).samples, plan)) == 1
    ]


def percentiles(latencies):
    cuts = statistics.quantiles(latencies, n=20, method="inclusive")
    return {"p50": cuts[9], "p95": cuts[18]}


class Measurement:
    """Counts what is finished in some time, from when the clients are in step."""

    def __init__(self, seconds):
        self._seconds = seconds
        self._latencies = []
        self._is_counting = False
        self.is_over = False

    def run(self):
        """Let the time pass; more of it if less is finished than says anything."""
        time.sleep(LEAD * self._seconds)
        started, cpu_started = time.perf_counter(), time.process_time()
        self._is_counting = True
        time.sleep(self._seconds)
        while len(self._latencies) < LEAST_FINISHED:
            time.sleep(0.01)
            if time.perf_counter() > started + MOST_S:
                sys.exit(f"less than {LEAST_FINISHED} clips were finished in {MOST_S} s")
        self._is_counting = False
        self._elapsed = time.perf_counter() - started
        self._cpu = time.process_time() - cpu_started
        self.is_over = True

    def count(self, sent):
        """Note that what was sent then is finished."""
        if self._is_counting:
            self._latencies.append(time.perf_counter() - sent)

    def result(self):
        finished = len(self._latencies)
        rate = finished / self._elapsed
        return {"rate": rate, "cpu": self._cpu / finished} | percentiles(self._latencies)


def closed_loop(peer, clips, n_clients, seconds):
    """Measure with so many clients, each of which waits for its text before it goes on."""
    measurement = Measurement(seconds)
    upcoming = itertools.cycle(clips)
    lock = threading.Lock()

    def client():
        with suppress(CancelledError):
            while not measurement.is_over:
                with lock:
                    clip = next(upcoming)
                sent = time.perf_counter()
                peer.transcribe(clip)
                measurement.count(sent)

    peer.begin()
    threads = [threading.Thread(target=client) for _ in range(n_clients)]
    for thread in threads:
        thread.start()
    measurement.run()
    batch = peer.batch()
    peer.abandon()
    for thread in threads:
        thread.join()
    return measurement.result() | {"batch": batch}


def open_loop(peer, clips, rate, seconds, seed):
    """Measure with clips that come when they come."""
    rng = random.Random(seed)
    latencies = []

    def note(due):
        latencies.append(time.perf_counter() - due)

    with ThreadPoolExecutor(MOST_THREADS) as pool:

        def submit(clip):
            if isinstance(peer, Engine):
                return peer.submit(clip)
            return pool.submit(peer.transcribe, clip)

        peer.begin()
        futures = []
        due = started = time.perf_counter()
        for clip in itertools.cycle(clips):
            due += rng.expovariate(rate)
            if due > started + seconds and len(futures) >= LEAST_FINISHED:
                break
            time.sleep(max(due - time.perf_counter(), 0))
            future = submit(clip)
            future.add_done_callback(lambda _, due=due: note(due))
            futures.append(future)
        wait(futures)
        for future in futures:
            future.result()
    return {"rate": rate} | percentiles(latencies)


def run_peer(setup):
    """Be a peer: load, then measure what the standard input asks for."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    from speechrnt import load_audio

    clips = [(load_audio(file).samples, language) for file, language in setup["clips"]]
    peer = {"engine": Engine, "limit": Limit}.get(setup["peer"], FasterWhisper)(setup)
    texts = [peer.transcribe(clip) for clip in clips[:COMPARED]]  # which also warms up
    for line in itertools.chain(["{}"], sys.stdin):
        order = json.loads(line)
        if not order:
            answer = texts
        elif "load" in order:
            answer = open_loop(peer, clips, order["load"], order["seconds"], order["seed"])
        elif "batch" in order:
            answer = peer.closed_loop(clips, order["clients"], order["seconds"], order["batch"])
        else:
            answer = closed_loop(peer, clips, order["clients"], order["seconds"])
        print(json.dumps(answer), file=answers, flush=True)
    os._exit(0)  # nothing is to be waited for


class Peer:
    """A process that measures when it is told to."""

    def __init__(self, stack, setup):
        self.name = setup["peer"]
        command = [sys.executable, __file__, "--peer", json.dumps(setup)]
        # faster-whisper as it is where nothing of ours is in its process.
        memory = "pool" if self.name in ("limit", "engine") else "off"
        self._process = stack.enter_context(
            subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env=os.environ | {"SPEECHRNT_INFERENCE_MEMORY": memory},
            )
        )
        stack.callback(self._process.stdin.close)
        self._batches = {}
        self.texts = self._answer()

    def _answer(self):
        line = self._process.stdout.readline()
        if not line:
            sys.exit(f"{self.name}: ended with status {self._process.wait()}")
        return json.loads(line)

    def _ask(self, **order):
        print(json.dumps(order), file=self._process.stdin, flush=True)
        return self._answer()

    def closed_loop(self, clients, seconds):
        if self.name != "limit":
            return self._ask(clients=clients, seconds=seconds)
        if clients not in self._batches:
            sizes = [size for size in LIMIT_BATCHES if size <= clients]
            rates = {
                size: self._ask(clients=clients, seconds=seconds / 2, batch=size)["rate"]
                for size in sizes
            }
            self._batches[clients] = max(sizes, key=rates.get)
        return self._ask(clients=clients, seconds=seconds, batch=self._batches[clients])

    def open_loop(self, rate, seconds, seed):
        return self._ask(load=rate, seconds=seconds, seed=seed)


def check_texts(peers, n_tokens):
    """Make sure that the peers do the same work."""
    texts = {peer.name: peer.texts for peer in peers}
    if "engine" in texts and "limit" in texts and texts["engine"] != texts["limit"]:
        sys.exit("the engine's texts are not those of the same arithmetic without it")
    if n_tokens is not None:
        for name, said in texts.items():
            if any(count != n_tokens for _, count in said):
                sys.exit(f"{name}: did not decode {n_tokens} tokens each time")


def measure_row(row, beam, arguments, models, clips):
    model, context, longer = ROWS[row]
    seconds = arguments.seconds * longer
    closed, opened = [], []
    with ExitStack() as stack:
        peers = [
            Peer(
                stack,
                {
                    "peer": name,
                    "model": models[model],
                    "context": context,
                    "beam": beam,
                    "config": arguments.config,
                    "clips": clips,
                },
            )
            for name in arguments.peers
        ]
        check_texts(peers, None if model == "pico" else arguments.tokens)
        for seed in range(arguments.rounds):
            closed.append(
                {
                    clients: {peer.name: peer.closed_loop(clients, seconds) for peer in peers}
                    for clients in arguments.clients
                }
            )
            capacity = {
                name: max(results[name]["rate"] for results in closed[-1].values())
                for name in arguments.peers
            }
            opened.append(
                {
                    load: {
                        peer.name: peer.open_loop(
                            load / 100 * capacity[peer.name], 2 * seconds, seed
                        )
                        for peer in peers
                        if peer.name != "limit"
                    }
                    for load in arguments.loads
                }
            )
    for clients in arguments.clients:
        print_closed(f"{row}, beam {beam}", clients, [results[clients] for results in closed])
    return [(f"{row}, beam {beam}", load, [r[load] for r in opened]) for load in arguments.loads]


def median(rounds, peer, fact):
    return statistics.median(results[peer][fact] for results in rounds)


def print_closed(row, clients, rounds):
    def cells(peer):
        if peer not in rounds[0]:
            return "| | | "
        facts = ("rate", "p50", "p95", "cpu")
        rate, p50, p95, cpu = (median(rounds, peer, fact) for fact in facts)
        return f"| {rate:.1f} | {p50 * 1e3:.0f} / {p95 * 1e3:.0f} / {cpu * 1e3:.0f} "

    def batch(peer):
        return f"{median(rounds, peer, 'batch'):.1f}" if peer in rounds[0] else ""

    def ratio(peer):
        if not {peer, "engine"} <= rounds[0].keys():
            return "| "
        values = [results["engine"]["rate"] / results[peer]["rate"] for results in rounds]
        return f"| {statistics.median(values):.2f} x "

    print(
        f"| {row} | {clients} {''.join(map(cells, PEERS))}"
        f"| {batch('limit')}, {batch('engine')} {''.join(map(ratio, PEERS[:3]))}|",
        flush=True,
    )


def print_open(row, load, rounds):
    for peer in PEERS:
        if peer in rounds[0]:
            rate, p50, p95 = (median(rounds, peer, fact) for fact in ("rate", "p50", "p95"))
            print(
                f"| {row} | {load} % | {peer} | {rate:.1f} | {p50 * 1e3:.0f} | {p95 * 1e3:.0f} |",
                flush=True,
            )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one short round of two rows")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=1.5, help="of a measurement with pico")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--loads", type=int, nargs="*", default=[80], metavar="PERCENT")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=list(PEERS))
    parser.add_argument("--beams", type=int, nargs="+", default=[5])
    parser.add_argument("--config", type=json.loads, default={}, help="the engine's, as JSON")
    parser.add_argument("--tokenizer", type=Path, metavar="DIRECTORY")
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--peer", type=json.loads, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.peer:
        run_peer(arguments.peer)
    if arguments.quick:
        arguments.rounds, arguments.seconds = 1, 1.0
        arguments.clients, arguments.loads = [8], []
        arguments.rows = ["pico auto", "tiny full"]

    import speechrnt

    print(
        f"{cores()} cores, median of {arguments.rounds} round(s); clips/s; p50 / p95 / CPU in ms\n"
    )
    print(
        "| row | clients | lock | ms | workers | ms | limit | ms | engine | ms | batch: limit, "
        "engine | engine / lock | engine / workers | engine / limit |"
    )
    print("|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|")
    with tempfile.TemporaryDirectory() as directory:
        models = {"pico": str(speechrnt.download_model("pico"))}
        for row in arguments.rows:
            name = ROWS[row][0]
            if name not in models:
                models[name] = str(Path(directory) / name)
                write_model(
                    name,
                    models[name],
                    tokenizer=arguments.tokenizer,
                    n_tokens=arguments.tokens,
                )
        clips = find_clips()
        opened = [
            line
            for row in arguments.rows
            for beam in arguments.beams
            for line in measure_row(row, beam, arguments, models, clips)
        ]
    if opened:
        print("\nPoisson arrivals, at a share of what the peer managed in the closed loop\n")
        print("| row | load | peer | clips/s | p50 ms | p95 ms |\n|---|---:|---|---:|---:|---:|")
        for line in opened:
            print_open(*line)


if __name__ == "__main__":
    main()
