"""The short form of the soak: hundreds of short streams leave nothing behind."""

import re
import subprocess
import sys
from pathlib import Path

SOAK = Path(__file__).parent.parent / "perf" / "soak_streams.py"


def test_short_streams_leave_nothing_behind():
    done = subprocess.run(
        [sys.executable, "-W", "error", SOAK, "--streams", "700", "--idle", "100"],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"second half: [+-]\d+\.\d+ MiB allocated, [+-]\d+ objects", done.stdout)
    assert done.stderr == ""
