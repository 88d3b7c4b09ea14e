"""What the tests of the pools share: other processes and many threads."""

import os
import subprocess
import sys
import textwrap
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import speechrnt

PACKAGES = Path(speechrnt.__file__).parent.parent  # a sanitizer's build is elsewhere


def run_python(code, *, path=(), **environment):
    """Run code in a process of its own; a failure shows what it printed."""
    python_path = os.pathsep.join([str(PACKAGES), *map(str, path)])
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(code)],
        env={**os.environ, "PYTHONPATH": python_path, **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def in_threads(n, function):
    """Run function(i) in n threads that start together; return the results."""
    barrier = threading.Barrier(n)

    def start(i):
        barrier.wait()
        return function(i)

    with ThreadPoolExecutor(n) as executor:
        return list(executor.map(start, range(n)))
