"""The future of a task does what the standard one does: each scenario runs on both."""

import asyncio
import gc
import logging
import os
import re
import signal
import subprocess
import sys
import threading
import weakref
from concurrent import futures
from concurrent.futures import Future

import pytest

from speechrnt import Scheduler
from speechrnt._future import TaskFuture

SCALE = 1 if os.environ.get("SPEECHRNT_BUILD", "debug") == "debug" else 10
STATES = ["pending", "running", "cancelled", "cancelled and told", "finished", "failed"]


@pytest.fixture(params=[Future, TaskFuture])
def make(request):
    return request.param


def in_state(make, state):
    future = make()
    if state.startswith("cancelled"):
        future.cancel()
    if state in ("running", "cancelled and told", "finished", "failed"):
        future.set_running_or_notify_cancel()
    if state == "finished":
        future.set_result(42)
    elif state == "failed":
        future.set_exception(ZeroDivisionError("x"))
    return future


def outcome(call):
    """Return what a call returned or raised, as text without addresses and class names."""
    try:
        told = repr(call())
    except (Exception, asyncio.CancelledError) as error:
        told = f"{type(error).__name__}: {error}"
    return re.sub(r"<\w+ at 0x\w+", "<", told)


def run_thread(target):
    thread = threading.Thread(target=target)
    thread.start()
    return thread


def wait_until_blocked(future):
    """Wait until a thread waits in `result`, for a future of either class."""
    if isinstance(future, TaskFuture):
        return  # it shows nothing; both orders must do
    while not future._condition._waiters:
        pass


def test_what_it_is():
    future = TaskFuture()
    assert isinstance(future, Future)
    assert issubclass(TaskFuture, Future)
    assert weakref.ref(future)() is future
    assert future in {future}
    future.note = "an attribute"
    assert future.note == "an attribute"
    assert TaskFuture[int]
    public = {name for name in dir(Future) if not name.startswith("_")}
    for name in public:  # none is left that would see an unused state of its own
        assert name in vars(TaskFuture.__mro__[1]), name
    with Scheduler(workers=1) as scheduler:
        assert type(scheduler.submit(int)) is TaskFuture


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize(
    "act",
    [
        lambda future: future.cancel(),
        lambda future: future.set_running_or_notify_cancel(),
        lambda future: future.set_result("again"),
        lambda future: future.set_exception(ValueError("again")),
        lambda future: future.result(0),
        lambda future: future.exception(timeout=-1),
        lambda future: future.result(timeout=0.001),
        lambda future: future.add_done_callback(lambda done: done.result()),
        lambda future: futures.wait([future], timeout=0).done == {future},
        lambda future: list(futures.as_completed([future], timeout=0)) == [future],
        lambda future: asyncio.run(later(future)),
    ],
    ids="cancel run set fail result exception wait call waits completed asyncio".split(),
)
@pytest.mark.parametrize("with_condition", [False, True])
def test_each_act_in_each_state(state, act, with_condition, caplog):
    caplog.set_level(logging.CRITICAL + 1, "concurrent.futures")
    seen = []
    for make in (Future, TaskFuture):
        future = in_state(make, state)
        if with_condition:
            with future._condition:
                assert future._waiters == []
        before = repr(future) if with_condition else ""
        did = outcome(lambda future=future: act(future))
        after = [
            future.cancelled(),
            future.running(),
            future.done(),
            future._state,
            outcome(lambda future=future: future.result(0)),
            outcome(lambda future=future: future.exception(0)),
        ]
        seen.append([re.sub(r"<\w+ at \w+", "<", before), did, after])
    assert seen[0] == seen[1]


async def later(future):
    wrapped = asyncio.wrap_future(future)
    for _ in range(3):  # turns of the loop, which do for what is done
        await asyncio.sleep(0)
    if not wrapped.done():
        wrapped.cancel()
    return await wrapped


@pytest.mark.parametrize("state", STATES)
def test_repr(state):
    standard, ours = (repr(in_state(make, state)) for make in (Future, TaskFuture))
    assert ours == re.sub("<Future at 0x\\w+", ours.split(" state")[0], standard)


def test_the_log_of_a_wrong_state(make, caplog):
    future = in_state(make, "finished")
    with pytest.raises(RuntimeError, match="unexpected state"):
        future.set_running_or_notify_cancel()
    assert f"Future {id(future)} in unexpected state: FINISHED" in caplog.text


@pytest.mark.parametrize("end", ["set_result", "set_exception", "cancel"])
@pytest.mark.parametrize("method", ["result", "exception"])
def test_all_that_block_are_woken(make, end, method):
    future = make()
    got = []
    threads = [run_thread(lambda: got.append(outcome(getattr(future, method)))) for _ in range(3)]
    wait_until_blocked(future)
    getattr(future, end)(*{"set_result": [1], "set_exception": [KeyError("k")]}.get(end, []))
    for thread in threads:
        thread.join()
    assert got == [outcome(getattr(future, method))] * 3


def test_callbacks(make, caplog):
    called = []
    future = make()

    def fail(done):
        raise RuntimeError("in the callback")

    for callback in (called.append, fail, lambda done: called.append(done.result())):
        future.add_done_callback(callback)
    future.set_result(7)
    assert called == [future, 7]
    assert "exception calling callback for" in caplog.text
    assert "in the callback" in caplog.text
    future.add_done_callback(lambda done: called.append("late"))
    future.add_done_callback(fail)
    assert called[2:] == ["late"]
    with pytest.raises(SystemExit):
        future.add_done_callback(sys.exit)


def test_a_callback_may_use_the_future(make):
    future = make()
    called = []

    def callback(done):
        done.add_done_callback(lambda again: called.append("inner"))
        called.append((done.done(), done.cancel(), done.result()))

    future.add_done_callback(callback)
    future.set_result(1)
    assert called == ["inner", (True, False, 1)]


@pytest.mark.parametrize(
    "return_when", [futures.ALL_COMPLETED, futures.FIRST_COMPLETED, futures.FIRST_EXCEPTION]
)
def test_wait(make, return_when):
    group = [make() for _ in range(4)]
    waiting = threading.Event()
    results = []

    def wait():
        waiting.set()
        results.append(futures.wait(group, return_when=return_when))

    thread = run_thread(wait)
    waiting.wait()
    group[0].set_result(1)
    group[1].cancel()
    group[1].set_running_or_notify_cancel()
    group[2].set_exception(ValueError())
    group[3].set_result(2)
    thread.join()
    done, not_done = results[0]
    assert done | not_done == set(group)
    if return_when == futures.ALL_COMPLETED:
        assert not not_done
    else:
        assert done
    assert all(future._waiters == [] for future in group)


def test_as_completed(make):
    group = [make() for _ in range(20)]

    def resolve():
        for number, future in enumerate(group):
            future.set_running_or_notify_cancel()
            future.set_result(number)

    thread = run_thread(resolve)
    assert sorted(future.result() for future in futures.as_completed(group)) == list(range(20))
    thread.join()
    with pytest.raises(futures.TimeoutError):
        list(futures.as_completed([make()], timeout=0.001))


def test_asyncio(make):
    async def main():
        future = make()
        wrapped = asyncio.wrap_future(future)
        thread = run_thread(lambda: future.set_result(3))
        assert await wrapped == 3
        thread.join()
        future = make()
        wrapped = asyncio.wrap_future(future)
        wrapped.cancel()
        with pytest.raises(asyncio.CancelledError):
            await wrapped
        return future

    assert asyncio.run(main()).cancelled()


def test_timeouts_leave_nothing(make):
    future = make()
    for timeout in (0, -1, 0.0001, 0.001):
        with pytest.raises(futures.TimeoutError):
            future.result(timeout)
    with pytest.raises(TypeError):
        future.result("soon")
    future.set_result(1)
    assert future.result("soon") == 1


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="the platform has no timers")
def test_a_signal_interrupts_result(make):
    class AlarmError(Exception):
        pass

    def handle(number, frame):
        raise AlarmError

    def wait():
        signal.setitimer(signal.ITIMER_REAL, 0.01)
        future.result()

    future = make()
    before = signal.signal(signal.SIGALRM, handle)
    try:
        with pytest.raises(AlarmError):
            wait()
    finally:
        signal.signal(signal.SIGALRM, before)
    future.set_result(5)
    assert future.result() == 5


def test_the_exception_is_not_tied_to_the_future(make):
    future = make()
    error = ValueError("x")
    future.set_exception(error)
    with pytest.raises(ValueError, match="x") as caught:
        future.result()
    assert caught.value is error
    reference = weakref.ref(future)
    gc.disable()
    try:
        del future
        assert reference() is None
    finally:
        gc.enable()


def test_cycles_are_collected(make):
    future = make()
    future.add_done_callback(lambda done, future=future: None)
    reference = weakref.ref(future)
    del future
    gc.collect()
    assert reference() is None


def race(pool, future):
    """Do all to a future at once; return the outcomes."""
    start = threading.Barrier(5)
    told = []

    def finish():
        if future.set_running_or_notify_cancel():
            future.set_result(7)

    def act(call):
        start.wait()
        return call()

    calls = [
        finish,
        future.cancel,
        lambda: outcome(future.result),
        lambda: future.add_done_callback(told.append),
        lambda: futures.wait([future]),
    ]
    _, cancelled, result, _, _ = pool.map(act, calls)
    return cancelled, result, told


def test_race_of_all_against_all(make):
    """Each future gets one outcome, and everybody is told of that one."""
    with futures.ThreadPoolExecutor(5) as pool:
        for _ in range(300 // SCALE):
            future = make()
            cancelled, result, told = race(pool, future)
            assert cancelled == future.cancelled()
            assert result == ("CancelledError: " if cancelled else "7")
            assert told == [future]


def test_many_threads_wait_for_many_tasks():
    with Scheduler(workers=2) as scheduler, futures.ThreadPoolExecutor(4) as pool:
        tasks = [scheduler.submit(abs, -i) for i in range(2000 // SCALE)]
        sums = [pool.submit(lambda: sum(task.result() for task in tasks)) for _ in range(4)]
        waits = pool.submit(futures.wait, tasks)
        assert len({future.result() for future in sums}) == 1
        assert waits.result().done == set(tasks)


def test_a_future_survives_its_scheduler():
    script = """
from speechrnt import Scheduler
scheduler = Scheduler(workers=1)
future = scheduler.submit(pow, 2, 5)
scheduler.shutdown()
del scheduler
print(future.result(0))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("32\n", "")
