"""The public C interface, from a package of its own that is built against the installed one."""

import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from speechrnt.pools import AudioBufferPool

DOWNSTREAM = Path(__file__).parent.parent / "downstream"


@pytest.mark.skipif(
    shutil.which((sysconfig.get_config_var("CC") or "cc").split()[0]) is None,
    reason="needs a C compiler",
)
def test_a_package_takes_and_returns_buffers(tmp_path, monkeypatch):
    project = tmp_path / "downstream"
    shutil.copytree(DOWNSTREAM, project)
    build = [sys.executable, "setup.py", "build_ext", "--inplace"]
    done = subprocess.run(build, cwd=project, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    monkeypatch.syspath_prepend(project)
    from sr_downstream import buffers

    pool = AudioBufferPool()
    assert buffers.audio_rounds(pool, 1_920_000, 1_000_000) == 0
    statistics = pool.statistics()
    assert (statistics.misses, statistics.hits, statistics.in_use) == (1, 999_999, 0)
    assert buffers.object_rounds(1_000_000) == 0
    with pytest.raises(TypeError):
        buffers.audio_rounds("not a pool", 1, 1)
