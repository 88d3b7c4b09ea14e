"""The inference memory with real models, and its switches.

What concerns the process runs in processes of its own, as the pool stays for the life of one.
"""

import os
import re
import subprocess
import sys

import pytest
from inference_helpers import CAN_BE_SERVED, MIB, ROOT, run, served_here, start

from speechrnt import _inference_memory, inference_memory, system
from speechrnt.errors import GpuUnavailable, OptionError


def test_this_machine_is_served_or_the_reason_is_told():
    if CAN_BE_SERVED:
        assert _inference_memory.why_not() is None
    else:
        assert "only its x86-64 build for Linux is known" in inference_memory.status()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A model with the encoder of Whisper tiny and random weights."""
    directory = tmp_path_factory.mktemp("tiny")
    script = ROOT / "perf" / "random_whisper.py"
    subprocess.run(
        [sys.executable, script, "tiny", directory],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])},
        check=True,
    )
    return directory


COMMON = """
import ctypes, gc, hashlib, json, os, resource, sys, threading
import numpy as np
from memory_helpers import anonymous_bytes
from speechrnt import _inference_memory, inference_memory, load_model

def encode(model, batch=1, frames=3000):
    rng = np.random.default_rng(batch)
    return model.encode(rng.standard_normal((batch, model.n_mels, frames), dtype=np.float32))

def digest(encoding):
    return hashlib.sha256(np.asarray(encoding).tobytes()).hexdigest()

def load(path, **options):
    return load_model(path, "cpu", cpu_threads=1, **options)

def hooks():
    "What MKL calls to take and to return memory."
    with open("/proc/self/maps") as file:
        [path] = {line.split()[-1] for line in file if "libctranslate2" in line}
    library = ctypes.CDLL(path)
    take = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_size_t)
    give = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
    at = lambda name: ctypes.c_void_p.in_dll(library, name).value
    return take(at("i_malloc")), give(at("i_free"))

"""

OUTPUTS_SCRIPT = """
from pathlib import Path
from speechrnt import WhisperModel

tiny = load(sys.argv[1])
outputs = [digest(encode(tiny, batch)) for batch in (1, 3)]
pico = WhisperModel("pico", cpu_threads=1)
for path in sorted(Path(sys.argv[2]).glob("*.wav")):
    segments, _ = pico.transcribe(path)
    outputs.append([(s.start, s.end, s.text, s.avg_logprob) for s in segments])
print(json.dumps([inference_memory.statistics().hits > 0, outputs]))
"""


@served_here
class TestModels:
    def test_outputs_are_the_same_with_and_without(self, tiny, samples):
        code = COMMON + OUTPUTS_SCRIPT
        used, outputs = run(code, tiny, samples)
        unused, expected = run(code, tiny, samples, SPEECHRNT_INFERENCE_MEMORY="off")
        assert (used, unused) == (True, False)
        assert outputs == expected

    def test_encoding_30_s_again_faults_in_no_pages(self, tiny):
        faults = run(
            COMMON
            + """
def faults(model):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    encode(model)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

model = load(sys.argv[1])
for _ in range(3):
    encode(model)
print(json.dumps([faults(model) for _ in range(5)]))
""",
            tiny,
        )
        # 77 000 without the pool. What is left is not memory of tensors.
        assert sorted(faults)[2] < 1000

    def test_memory_of_others_is_not_touched(self, tiny):
        found = run(
            COMMON
            + """
libc = ctypes.CDLL(None)
def functions():
    return [ctypes.cast(libc[name], ctypes.c_void_p).value
            for name in ("malloc", "calloc", "realloc", "free")]
before = functions()
model = load(sys.argv[1])
libc.malloc.restype = ctypes.c_void_p
owned = [_inference_memory.owns(np.empty(size, np.uint8).ctypes.data)
         for size in (1, 2**20, 2**26, 2**28)]
owned += [_inference_memory.owns(libc.malloc(2**26))]
encoding = encode(model)
view = np.asarray(encoding)
print(json.dumps([functions() == before, owned, _inference_memory.owns(view.ctypes.data)]))
""",
            tiny,
        )
        assert found == [True, [False] * 5, True]

    def test_unloading_returns_everything_and_trim_gives_it_back(self, tiny):
        weights, after, reserved, released, fallen, end = run(
            COMMON
            + """
model = load(sys.argv[1])
weights = inference_memory.statistics().in_use
encode(model, 2)
gc.collect()
after = inference_memory.statistics().in_use
model.whisper.unload_model()
del model
reserved = inference_memory.statistics().reserved
before = anonymous_bytes()
released = inference_memory.trim()
fallen = before - anonymous_bytes()
end = inference_memory.statistics()
print(json.dumps([weights, after, reserved, released, fallen, [end.in_use, end.blocks,
                  end.reserved]]))
""",
            tiny,
        )
        assert weights > 8 * MIB
        assert weights == after
        assert released == reserved > 100 * MIB
        assert fallen > 0.9 * released
        assert end == [0, 0, 0]

    def test_a_scheduler_gives_back_what_is_idle(self, tiny):
        weights, left = run(
            COMMON
            + """
import time
from speechrnt import Scheduler
from speechrnt.pools import maintain_on
inference_memory._KEEP_S = 1
model = load(sys.argv[1])
weights = inference_memory.statistics().reserved
encode(model)
encoded = anonymous_bytes()
with Scheduler(workers=1) as scheduler, maintain_on(scheduler, [inference_memory], 0.1):
    end = time.monotonic() + 60
    while inference_memory.statistics().reserved > weights and time.monotonic() < end:
        time.sleep(0.05)
fallen = encoded - anonymous_bytes()
print(json.dumps([weights, inference_memory.statistics().reserved]))
assert fallen > 50 << 20
""",
            tiny,
        )
        assert left <= weights

    def test_beyond_the_limit_libc_serves_the_same_results(self, tiny):
        code = (
            COMMON
            + """
if sys.argv[2] != "none":
    inference_memory.configure(limit=int(sys.argv[2]))
model = load(sys.argv[1])
result = digest(encode(model))
end = inference_memory.statistics()
print(json.dumps([result, end.overflows, end.limit, end.reserved]))
"""
        )
        expected, overflows, *_ = run(code, tiny, "none")
        assert overflows == 0
        result, overflows, limit, reserved = run(code, tiny, 32 * MIB)
        assert result == expected
        assert overflows > 0
        assert reserved <= limit == 32 * MIB

    def test_workers_at_once(self, tiny):
        results, expected, in_use = run(
            COMMON
            + """
from concurrent.futures import ThreadPoolExecutor
model = load(sys.argv[1], num_workers=2)
expected = [digest(encode(model, batch)) for batch in (1, 2)]
before = inference_memory.statistics().in_use
with ThreadPoolExecutor(4) as pool:
    results = list(pool.map(lambda batch: digest(encode(model, batch)), [1, 2] * 4))
print(json.dumps([results, expected, inference_memory.statistics().in_use - before]))
""",
            tiny,
        )
        assert results == expected * 4
        assert in_use == 0

    def test_a_child_of_a_busy_process_can_allocate(self, tiny):
        code = """
import signal, warnings
warnings.simplefilter("ignore", DeprecationWarning)  # forking with threads is the point
model = load(sys.argv[1])
take, give = hooks()
stop = threading.Event()
def work():
    while not stop.is_set():
        for _ in range(100):
            give(take(2**20))
threads = [threading.Thread(target=work) for _ in range(2)]
for thread in threads:
    thread.start()
codes = []
for _ in range(100):
    child = os.fork()
    if child == 0:
        signal.alarm(120)
        block = take(2**22)
        ctypes.memset(block, 1, 2**22)
        os._exit(0 if _inference_memory.owns(block) else 1)
    codes.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
stop.set()
for thread in threads:
    thread.join()
print(json.dumps(codes))
"""
        assert run(COMMON + code, tiny) == [0] * 100

    def test_the_process_ends_with_models_and_outputs_alive(self, tiny):
        code = """
model = load(sys.argv[1])
outputs = [encode(model) for _ in range(2)]
kept_by_nobody = load(sys.argv[1])
print(json.dumps(inference_memory.statistics().blocks > 0))
"""
        assert run(COMMON + code, tiny)

    def test_after_a_model_loaded_by_other_means_it_is_too_late(self, tiny):
        status, limit, hits = run(
            """
import ctranslate2
other = ctranslate2.models.Whisper(__import__("sys").argv[1], intra_threads=1)
"""
            + COMMON
            + """
model = load(sys.argv[1])
encode(model)
end = inference_memory.statistics()
print(json.dumps([inference_memory.status(), end.limit, end.hits + end.misses]))
""",
            tiny,
        )
        assert status.startswith("off: CTranslate2's library: it had allocated before")
        assert (limit, hits) == (0, 0)


@served_here
class TestSwitches:
    def test_it_is_on_for_a_model_on_the_cpu(self):
        before, after, limit = run(
            COMMON
            + """
from speechrnt.system import usable_memory
before = inference_memory.status()
load("pico")
print(json.dumps([before, inference_memory.status(),
                  inference_memory.statistics().limit / usable_memory()]))
"""
        )
        assert before == "pool"
        assert after.startswith("pool, up to ")
        assert limit == pytest.approx(0.5, abs=0.01)

    def test_the_environment_turns_it_off(self):
        found = run(
            COMMON
            + """
before = inference_memory.status()
encode(load("pico"))
end = inference_memory.statistics()
print(json.dumps([before, inference_memory.status(), end.limit, end.peak, end.overflows]))
""",
            SPEECHRNT_INFERENCE_MEMORY="off",
        )
        assert found == ["off", "off, as configured", 0, 0, 0]

    def test_configure_goes_before_the_environment(self):
        code = "inference_memory.configure('pool', 2**27); load('pico')\n"
        code += "print(json.dumps(inference_memory.status()))"
        assert run(COMMON + code, SPEECHRNT_INFERENCE_MEMORY="off") == "pool, up to 128 MiB"

    def test_it_can_be_turned_off_and_on_while_a_model_is_loaded(self, tiny):
        blocks, again, same = run(
            COMMON
            + """
model = load(sys.argv[1])
first = digest(encode(model))
held = inference_memory.statistics()
inference_memory.configure("off")
second = digest(encode(model))
off = inference_memory.statistics()
inference_memory.configure("pool")
third = digest(encode(model))
on = inference_memory.statistics()
print(json.dumps([[held.blocks, off.blocks, off.hits + off.misses - held.hits - held.misses],
                  on.hits > off.hits, first == second == third]))
""",
            tiny,
        )
        assert blocks[0] == blocks[1] > 0
        assert blocks[2] == 0
        assert (again, same) == (True, True)

    def test_mallopt_is_the_other_way(self, tiny):
        status, faults, limit = run(
            COMMON
            + """
inference_memory.configure("mallopt")
model = load(sys.argv[1])
for _ in range(3):
    encode(model)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(3):
    encode(model)
faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(json.dumps([inference_memory.status(), faults, inference_memory.statistics().limit]))
""",
            tiny,
        )
        assert status == "kept by glibc (mallopt)"
        assert faults < 3000
        assert limit == 0

    def test_the_environment_is_checked(self):
        code = COMMON + "load('pico')"
        done = start(code, SPEECHRNT_INFERENCE_MEMORY="yes")
        assert "OptionError: SPEECHRNT_INFERENCE_MEMORY='yes' is unknown; use one of pool, " in (
            done.stderr
        )


def test_arguments_are_checked():
    with pytest.raises(OptionError, match="'on' is unknown; use one of pool, mallopt, off"):
        inference_memory.configure("on")
    for limit in (1000, -1, 2**64, "4 GiB", 2.5e9, True):
        with pytest.raises(OptionError, match="at least 2 MiB, not "):
            inference_memory.configure(limit=limit)
    for idle_s in (-1, 2**40, 0.5, "10", None):
        with pytest.raises(OptionError, match="idle_s must be whole seconds"):
            inference_memory.trim(idle_s)


def test_info_shows_it():
    done = subprocess.run(
        [sys.executable, "-m", "speechrnt", "info"],
        env=os.environ | {"PYTHONPATH": str(ROOT), "SPEECHRNT_INFERENCE_MEMORY": "off"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "inference memory    off" in done.stdout.splitlines()


# GPUs, where there is none; see tests/gpu for the rest


@pytest.fixture
def no_gpu():
    if system.why_no_cuda() is None:
        pytest.skip("there is a GPU")
    yield system.why_no_cuda()
    inference_memory._gpus.clear()


def test_without_a_gpu_its_memory_is_off_and_that_is_no_error(no_gpu):
    assert inference_memory.status("cuda") == f"off: {no_gpu}"
    inference_memory.prepare("cuda:1")
    inference_memory.configure("pool", 2**30, "cuda")
    for device in ("cuda", "cuda:0", "cuda:1"):
        assert inference_memory.status(device) == f"off: {no_gpu}"
        with pytest.raises(GpuUnavailable, match=re.escape(no_gpu)):
            inference_memory.statistics(device)
        with pytest.raises(GpuUnavailable, match=re.escape(no_gpu)):
            inference_memory.trim(device=device)
        inference_memory.configure("off", device=device)


@pytest.mark.parametrize("device", ["gpu", "cuda:", "cuda:-1", "cuda:x", "CPU", "", None, 0])
def test_an_unknown_device_is_an_option_error(device):
    for function in (
        lambda: inference_memory.configure("pool", device=device),
        lambda: inference_memory.prepare(device),
        lambda: inference_memory.statistics(device),
        lambda: inference_memory.status(device),
        lambda: inference_memory.trim(device=device),
    ):
        with pytest.raises(OptionError, match="use 'cpu', 'cuda' or 'cuda:<number>'"):
            function()


def test_what_only_the_cpu_has_is_refused_for_a_gpu():
    with pytest.raises(OptionError, match="'mallopt' is for the CPU"):
        inference_memory.configure("mallopt", device="cuda")
    with pytest.raises(OptionError, match="'heap' is unknown"):
        inference_memory.configure("heap", device="cuda")
    with pytest.raises(OptionError, match="idle_s: a GPU's memory pool does not know"):
        inference_memory.trim(10, device="cuda")
