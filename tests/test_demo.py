import os
import pty
import subprocess
import sys

from speechrnt import demo


def test_the_demo_shows_every_part_without_a_terminal():
    done = subprocess.run(
        [sys.executable, "-m", "speechrnt", "demo"],
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    headings = [
        line.split(":")[0]
        for line, below in zip(done.stdout.splitlines(), done.stdout.splitlines()[1:], strict=False)
        if below and set(below) == {"-"}
    ]
    assert headings == [
        "Memory pools",
        "Inference memory",
        "Scheduler",
        "Work stealing",
        "Streaming",
        "All together",
        "Report",
    ]
    assert "\x1b" not in done.stdout
    assert "In one piece the recording gives the same text." in done.stdout
    without, stolen = (
        int(line.split("; ")[1].split()[0])
        for line in done.stdout.splitlines()
        if "stolen" in line and "by worker" in line
    )
    assert without == 0 < stolen
    assert "Healthy." in done.stdout


def test_a_live_line_fits_the_terminal(monkeypatch):
    leader, follower = pty.openpty()
    with os.fdopen(leader, "rb", 0) as shown, os.fdopen(follower, "w", encoding="utf-8") as out:
        monkeypatch.setattr(sys, "stdout", out)
        monkeypatch.setenv("COLUMNS", "20")
        demo._Screen().live("x" * 50)
        assert shown.read(1000) == b"\r\x1b[K" + b"x" * 19


def test_a_reader_that_leaves_while_streaming_ends_the_demo_silently():
    with subprocess.Popen(
        [sys.executable, "-m", "speechrnt", "demo"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        encoding="utf-8",
        env=os.environ | {"PYTHONUTF8": "1"},
    ) as process:
        for line in process.stdout:
            if "Two five one." in line:
                break
        process.stdout.close()
        assert process.stderr.read() == ""
        assert process.wait(60) == 1
