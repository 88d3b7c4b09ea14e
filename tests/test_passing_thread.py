"""Calls in threads that end with them, and what they are good for: no helper is left behind."""

import gc
import json
import signal
import subprocess
import sys
import threading
import time
import weakref

import pytest

from speechrnt.passing_thread import call_in_passing_thread


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


@pytest.mark.skipif(sys.platform != "linux", reason="counts threads in /proc")
def test_loading_a_model_leaves_no_helpers_of_openmp():
    """One thread for the worker; its helper comes with the first call."""
    program = """
import json, os, sys, time
import ctranslate2
import speechrnt
from speechrnt.hub import EMBEDDED_MODELS

def threads():
    return len(os.listdir("/proc/self/task"))

def settled(count):
    end = time.monotonic() + 60
    while threads() != count and time.monotonic() < end:
        time.sleep(0.001)
    return threads()

before = threads()
model = speechrnt.load_model("pico", "cpu", cpu_threads=2)
counts = [settled(before + 1) - before]
model.unload()
model.load()
counts.append(settled(before + 1) - before)
bare = ctranslate2.models.Whisper(str(EMBEDDED_MODELS["pico"]), intra_threads=2)
counts.append(settled(before + 3) - before)
print(json.dumps(counts))
"""
    done = subprocess.run(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, check=True
    )
    loaded, again, bare = json.loads(done.stdout)
    assert (loaded, again) == (1, 1)
    # Or else this test would no longer show anything.
    assert bare == 3
