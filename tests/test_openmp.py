"""CTranslate2's OpenMP: how long its threads look, and loading that leaves no helper behind."""

import gc
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import weakref

import pytest

from speechrnt import openmp
from speechrnt.openmp import call_in_passing_thread


def test_the_result_comes_from_another_thread_that_has_ended():
    thread = call_in_passing_thread(threading.current_thread)
    assert thread is not threading.current_thread()
    assert not thread.is_alive()


def test_an_exception_is_raised_here_and_shows_where_it_came_from():
    def fail():
        raise LookupError("nothing there")

    with pytest.raises(LookupError, match="nothing there") as caught:
        call_in_passing_thread(fail)
    assert caught.traceback[-1].name == "fail"


def test_an_exception_is_freed_without_the_garbage_collector():
    class Mark:
        pass

    def fail(mark):
        raise LookupError

    mark = Mark()
    freed = weakref.ref(mark)
    gc.disable()
    try:
        with pytest.raises(LookupError):
            call_in_passing_thread(lambda mark=mark: fail(mark))
        del mark
        assert freed() is None
    finally:
        gc.enable()


@pytest.mark.skipif(sys.platform == "win32", reason="sends a signal to a thread")
def test_an_interrupt_is_raised_when_the_call_is_over():
    over = []

    def interrupted():
        for _ in range(2):
            signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
            time.sleep(0.05)
        over.append(threading.current_thread())

    with pytest.raises(KeyboardInterrupt):
        call_in_passing_thread(interrupted)
    [thread] = over
    assert not thread.is_alive()


def test_without_another_thread_this_one_does_it(monkeypatch):
    def refuse(thread):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    assert call_in_passing_thread(threading.current_thread) is threading.current_thread()


# Imports in the given order, and prints: what the variable is then, and the threads that there are
# more than before, when a model is loaded, loaded again, and one is loaded without us.
PROGRAM = """
import json, os, sys, time

def threads():
    return len(os.listdir("/proc/self/task"))

def settled(count):
    end = time.monotonic() + 60
    while threads() != count and time.monotonic() < end:
        time.sleep(0.001)
    return threads()

for module in sys.argv[1].split():
    __import__(module)
speechrnt, ctranslate2 = sys.modules["speechrnt"], sys.modules["ctranslate2"]
before = threads()
expected = int(sys.argv[2])
model = speechrnt.load_model("pico", "cpu", cpu_threads=2)
counts = [settled(before + expected) - before]
model.unload()
model.load()
counts.append(settled(before + expected) - before)
again = threads()
bare = ctranslate2.models.Whisper(speechrnt.download_model("pico"), intra_threads=2)
counts.append(settled(again + 3 - expected) - again)
print(json.dumps([os.environ.get("GOMP_SPINCOUNT"), *counts]))
"""

wheel_for_linux = pytest.mark.skipif(
    openmp._libgomp() is None, reason="CTranslate2 has no libgomp of its own here"
)


def run(imports, expected, **variables):
    """Return what the program printed, and what libgomp says it was set to."""
    environment = {**os.environ, "OMP_DISPLAY_ENV": "verbose"}
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        environment.pop(name, None)
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, imports, str(expected)],
        env=environment | variables,
        capture_output=True,
        text=True,
        check=True,
    )
    [spins] = set(re.findall(r"GOMP_SPINCOUNT = '(\d+)'", done.stderr))
    return json.loads(done.stdout), int(spins)


@wheel_for_linux
def test_waits_are_short_and_loading_leaves_no_helpers():
    """One thread for the worker; its helper comes with the first call."""
    (left, *counts), spins = run("speechrnt ctranslate2", 1)
    assert spins == openmp._LOOKS
    assert left is None
    # Without a thread of its own, loading leaves one more.
    assert counts == [1, 1, 2]


@wheel_for_linux
def test_where_ctranslate2_is_imported_first_nothing_changes():
    (left, *counts), spins = run("ctranslate2 speechrnt", 2)
    assert spins > openmp._LOOKS
    assert left is None
    # The thread that loads has its helper from the first time on.
    assert counts == [2, 2, 1]


@wheel_for_linux
def test_a_number_of_the_users_stays():
    (left, *counts), spins = run("speechrnt", 1, GOMP_SPINCOUNT="77")
    assert (left, counts, spins) == ("77", [1, 1, 2], 77)
