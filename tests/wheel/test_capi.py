"""The public C interface, from a package of its own that is built against the installed one."""

import importlib
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
import threading
import warnings
from pathlib import Path

import pytest

from speechrnt import Priority, Scheduler
from speechrnt.pools import AudioBufferPool

DOWNSTREAM = Path(__file__).parent.parent / "downstream"
ROUNDS = 1_000_000

pytestmark = pytest.mark.skipif(
    shutil.which((sysconfig.get_config_var("CC") or "cc").split()[0]) is None,
    reason="needs a C compiler",
)


@pytest.fixture(scope="module")
def downstream(tmp_path_factory):
    """Build the package; return a function that imports a module of it."""
    project = tmp_path_factory.mktemp("project") / "downstream"
    shutil.copytree(DOWNSTREAM, project)
    build = [sys.executable, "setup.py", "build_ext", "--inplace"]
    done = subprocess.run(build, cwd=project, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    sys.path.insert(0, str(project))
    yield lambda name: importlib.import_module(f"sr_downstream.{name}")
    sys.path.remove(str(project))


@pytest.fixture
def tasks(downstream):
    return downstream("tasks")


def test_a_package_takes_and_returns_buffers(downstream):
    buffers = downstream("buffers")
    pool = AudioBufferPool()
    assert buffers.audio_rounds(pool, 1_920_000, ROUNDS) == 0
    statistics = pool.statistics()
    assert (statistics.misses, statistics.hits, statistics.in_use) == (1, ROUNDS - 1, 0)
    assert buffers.object_rounds(ROUNDS) == 0
    with pytest.raises(TypeError):
        buffers.audio_rounds("not a pool", 1, 1)


@pytest.mark.parametrize("how", ["submit", "submit_many", "spawn"])
def test_a_package_runs_tasks(tasks, how):
    with Scheduler(workers=2, max_queued=ROUNDS) as scheduler:
        squares = tasks.Squares(scheduler, ROUNDS)
        assert getattr(squares, how)() == 0
        assert squares.wait() == 0
        assert (squares.pending(), squares.queued()) == (0, 0)
        assert squares.wrong(first=1 if how == "spawn" else 0) == 0
        scheduler.drain()
        statistics = scheduler.statistics()
        assert sum(statistics.executed.values()) == ROUNDS
        assert statistics.executed[Priority.LOW] == (how == "spawn")


def test_more_tasks_than_may_wait(tasks):
    with Scheduler(workers=1, max_queued=100) as scheduler:
        squares = tasks.Squares(scheduler, 10_000)
        assert squares.submit_many() == tasks.STATUSES["overloaded"]
        assert (squares.pending(), squares.queued()) == (0, 0)
        assert squares.submit() == 0
        assert squares.wait() == 0
        assert squares.wrong() == 0


def test_tasks_that_fail_are_dropped_or_refused(tasks):
    scheduler = Scheduler(workers=1)
    squares = tasks.Squares(scheduler, 10)
    squares.fail()
    assert [squares.wait(), squares.wait()] == [42, 0]
    release = threading.Event()
    scheduler.submit(release.wait, priority=Priority.CRITICAL)
    assert tasks.Squares(scheduler, 1).wait() == 0
    squares = tasks.Squares(scheduler, 10)
    while scheduler.statistics().queued[Priority.CRITICAL]:
        pass
    assert squares.submit_many() == 0
    assert squares.pending() == 10
    scheduler.shutdown(wait=False, cancel_futures=True)
    assert squares.wait() == tasks.STATUSES["cancelled"]
    release.set()
    scheduler.shutdown()
    assert squares.submit() == 10
    assert squares.submit_many() == tasks.STATUSES["closed"]


def test_what_is_no_task_is_refused(tasks):
    with Scheduler(workers=1) as scheduler:
        squares = tasks.Squares(scheduler, 10)
        statuses = squares.init_wrongly()
        assert statuses.pop(6) == 0
        assert set(statuses) == {tasks.STATUSES["invalid"]}
        assert squares.queued() == 0
        with pytest.raises(TypeError, match="a Scheduler is needed, not str"):
            tasks.Squares("not a scheduler", 1)
        squares = tasks.Squares(scheduler, 10)
        assert squares.submit_many() == 0
        assert squares.wait() == 0
        assert squares.wrong() == 0


def test_what_is_queued_is_not_queued_again(tasks):
    scheduler = Scheduler(workers=1)
    squares = tasks.Squares(scheduler, 10)
    for cancel in (False, True):
        release = threading.Event()
        scheduler.submit(release.wait, priority=Priority.CRITICAL)
        while scheduler.statistics().queued[Priority.CRITICAL]:
            pass
        assert squares.submit_twice() == [0] + [tasks.STATUSES["in_use"]] * 3
        assert squares.pending() == 10
        if cancel:
            scheduler.shutdown(wait=False, cancel_futures=True)
        release.set()
        assert squares.wait() == (tasks.STATUSES["cancelled"] if cancel else 0)
        assert cancel or squares.wrong() == 0
    scheduler.shutdown()
    assert squares.submit_many() == tasks.STATUSES["closed"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the platform has no fork")
def test_a_forked_child_refuses(tasks):
    with Scheduler(workers=1) as scheduler:
        squares = tasks.Squares(scheduler, 1)
        release = threading.Event()
        started = threading.Event()
        scheduler.submit(lambda: started.set() or release.wait())
        started.wait()
        squares.submit()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # forking with threads is what is tested
            child = os.fork()
        if child == 0:
            waited = squares.wait() == tasks.STATUSES["cancelled"]
            os._exit(0 if waited and squares.submit() == 1 else 1)
        release.set()
        assert os.waitpid(child, 0)[1] == 0
        assert squares.wait() == 0
        assert squares.wrong() == 0


@pytest.mark.skipif(
    importlib.util.find_spec("speechrnt._gpu") is None or importlib.util.find_spec("cuda") is None,
    reason="needs the GPU modules and cuda-bindings",
)
def test_a_package_for_gpus_can_be_imported_without_one(downstream):
    assert downstream("gpu_blocks").__doc__.startswith("Takes and frees")
