import subprocess
import sys


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
