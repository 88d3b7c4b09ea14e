"""Whisper on a GPU with the memory settings of speechrnt and without.

    python perf/bench_gpu_inference.py [--models M ...] [--compute-type T] [--rounds N] [--output F]

Encodes and decodes a 30 s window of noise, one request at a time with a pause before each, as when
little is going on: that is when the driver takes idle memory away. Two settings are compared, each
in a process of its own, taking turns round by round:

- memory: the driver's default, release threshold 0, against the pool that keeps it;
- features: CTranslate2's own way to the GPU against page-locked memory through a pool.

The table shows the median and the 90th percentile over all requests of all rounds, and what the
driver's pool held before and after a pause. Needs a GPU. With --device cpu the script runs without
one, and then compares the CPU's memory settings only.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

SETTINGS = {
    "plain": {"SPEECHRNT_INFERENCE_MEMORY": "off", "SPEECHRNT_GPU_POOL": "off"},
    "memory kept": {"SPEECHRNT_INFERENCE_MEMORY": "pool", "SPEECHRNT_GPU_POOL": "off"},
    "features pinned": {"SPEECHRNT_INFERENCE_MEMORY": "off", "SPEECHRNT_GPU_POOL": "on"},
    "both": {"SPEECHRNT_INFERENCE_MEMORY": "pool", "SPEECHRNT_GPU_POOL": "on"},
}
PAUSES_MS = (0, 10, 100)
WARM_UPS = 5
REQUESTS = 40
NEW_TOKENS = 20


def run_peer(model_name, device, compute_type, batch):
    """Measure in this process, and print the times in milliseconds as JSON."""
    from speechrnt import inference_memory, load_model

    model = load_model(model_name, device, compute_type)
    tokens = [*model.tokenizer.sot_sequence("en", "transcribe"), model.tokenizer.no_timestamps]
    rng = np.random.default_rng(0)
    features = rng.uniform(-1, 1, (batch, model.n_mels, 3000)).astype(np.float32)
    results = {}
    for pause_ms in PAUSES_MS:
        encode, total, kept = [], [], []
        for _ in range(WARM_UPS + REQUESTS):
            time.sleep(pause_ms / 1000)
            kept.append(inference_memory.statistics(device).reserved)
            started = time.perf_counter()
            encoding = model.encode(features)
            encoded = time.perf_counter()
            model.generate(encoding, [tokens] * batch, beam_size=1, max_length=2 * NEW_TOKENS)
            del encoding
            total.append((time.perf_counter() - started) * 1000)
            encode.append((encoded - started) * 1000)
        results[pause_ms] = {
            "encode": encode[WARM_UPS:],
            "total": total[WARM_UPS:],
            "reserved_before": statistics.median(kept[WARM_UPS:]),
        }
    counters = None if model.handover is None else vars(model.handover.statistics())
    status = inference_memory.status(device)
    print(json.dumps({"results": results, "memory": status, "features": counters}))


def measure(setting, *arguments):
    command = [sys.executable, __file__, "--peer", *map(str, arguments)]
    environment = os.environ | SETTINGS[setting]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def hardware(device):
    if device == "cpu":
        from speechrnt.system import cpu_name

        return cpu_name()
    from speechrnt import gpu

    return gpu.device_name(0)


def percentile(values, part):
    return sorted(values)[min(len(values) - 1, int(part * len(values)))]


def compare():
    """Measure all rounds and print a table for each model."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=["pico"])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--compute-type", default="auto")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path, help="where to put all measurements, as JSON")
    options = parser.parse_args()
    if options.device == "cuda":
        from speechrnt.system import why_no_gpu

        reason = why_no_gpu()
        if reason is not None:
            raise SystemExit(f"nothing to measure: {reason}")
    settings = list(SETTINGS) if options.device == "cuda" else ["plain", "memory kept"]
    raw = {"hardware": hardware(options.device), "python": platform.python_version(), "runs": []}
    print(f"{raw['hardware']}, {options.compute_type}, batch {options.batch}")
    print(f"{'model':16}{'pause':>7}  {'setting':16}", end="")
    print(*(f"{name:>12}" for name in ("encode p50", "p90", "total p50", "p90", "reserved")))
    for model in options.models:
        runs = {setting: [] for setting in settings}
        for _ in range(options.rounds):
            for setting in settings:
                arguments = (model, options.device, options.compute_type, options.batch)
                run = measure(setting, *arguments)
                runs[setting].append(run)
                raw["runs"].append({"model": model, "setting": setting, **run})
        for pause_ms in map(str, PAUSES_MS):
            for setting in settings:
                found = [run["results"][pause_ms] for run in runs[setting]]
                cells = []
                for part in ("encode", "total"):
                    values = [value for each in found for value in each[part]]
                    cells += [percentile(values, 0.5), percentile(values, 0.9)]
                reserved = statistics.median(each["reserved_before"] for each in found) / 2**20
                print(f"{Path(model).name:16}{pause_ms:>4} ms  {setting:16}", end="")
                print(*(f"{cell:9.2f} ms" for cell in cells), f"{reserved:8.0f} MiB", flush=True)
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(raw, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--peer"]:
        name, device, compute_type, batch = sys.argv[2:]
        run_peer(name, device, compute_type, int(batch))
    else:
        compare()
