"""What the tests of the scheduler share: keeping its threads busy, and other processes."""

import os
import subprocess
import sys
import textwrap
import threading
import time
from contextlib import contextmanager

from speechrnt import Priority

# A sanitizer makes everything ten times slower.
SCALE = 1 if os.environ.get("SPEECHRNT_BUILD", "debug") == "debug" else 10
LEVELS = len(Priority)
FAIR_PERIOD = 32


class Blocker:
    """Occupies the workers of a scheduler until released."""

    def __init__(self, scheduler, workers=1, priority=Priority.CRITICAL):
        self._release = threading.Event()
        started = threading.Semaphore(0)

        def block():
            started.release()
            self._release.wait()

        self.futures = [scheduler.submit(block, priority=priority) for _ in range(workers)]
        for _ in range(workers):
            started.acquire()

    def __enter__(self):
        return self

    def __exit__(self, *exc_info):
        self._release.set()


@contextmanager
def held_timer(scheduler):
    """Keep the timer's thread from making calls inside the block."""
    reached, go_on = threading.Event(), threading.Event()

    def hold():
        reached.set()
        go_on.wait()

    scheduler._core.timer.call_at(time.monotonic(), hold)
    assert reached.wait(60)
    try:
        yield
    finally:
        go_on.set()


def run_script(script, **environment):
    """Run a script in a Python of its own; return what it printed."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        capture_output=True,
        text=True,
        env=os.environ | environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout.split()
