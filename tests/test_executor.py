"""Work that runs in its caller, and on a scheduler for as long as that takes any."""

import logging
import threading

import pytest

from speechrnt import Priority, Scheduler
from speechrnt.executor import InlineExecutor, SchedulerExecutor

NORMAL = Priority.NORMAL


def test_inline_work_is_done_at_once_and_in_the_calling_thread():
    ran = []
    InlineExecutor().submit_nowait(
        lambda x: ran.append((x, threading.get_ident())), 7, priority=NORMAL
    )
    assert ran == [(7, threading.get_ident())]


def test_what_inline_work_submits_comes_after_it_however_long_the_chain():
    executor = InlineExecutor()
    order = []

    def link(n):
        order.append(("begin", n))
        if n < 20_000:
            executor.submit_nowait(link, n + 1, priority=NORMAL)
        order.append(("end", n))

    link_zero = 0
    executor.submit_nowait(link, link_zero, priority=NORMAL)
    assert order == [(what, n) for n in range(20_001) for what in ("begin", "end")]


def test_inline_work_that_raises_is_logged_and_the_rest_is_done(caplog):
    executor = InlineExecutor()
    ran = []

    def fail():
        executor.submit_nowait(ran.append, 1, priority=NORMAL)
        raise ValueError("no good")

    with caplog.at_level(logging.ERROR, "speechrnt"):
        executor.submit_nowait(fail, priority=NORMAL)
    assert ran == [1]
    assert "no good" in caplog.text


def test_an_interrupt_comes_through_and_leaves_the_executor_usable():
    executor = InlineExecutor()

    def interrupt():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        executor.submit_nowait(interrupt, priority=NORMAL)
    ran = []
    executor.submit_nowait(ran.append, 1, priority=NORMAL)
    assert ran == [1]


def test_threads_do_not_run_each_others_inline_work():
    executor = InlineExecutor()
    inside, checked = threading.Event(), threading.Event()

    def hold():
        inside.set()
        assert checked.wait(30)

    thread = threading.Thread(
        target=executor.submit_nowait, args=(hold,), kwargs={"priority": NORMAL}
    )
    thread.start()
    assert inside.wait(30)
    ran = []
    executor.submit_nowait(ran.append, 1, priority=NORMAL)
    assert ran == [1]
    checked.set()
    thread.join()


def test_a_scheduler_does_the_work_while_it_takes_any_and_the_caller_afterwards():
    scheduler = Scheduler(workers=1)
    executor = SchedulerExecutor(scheduler)
    threads = []
    executor.submit_nowait(lambda: threads.append(threading.get_ident()), priority=NORMAL)
    scheduler.shutdown()
    executor.submit_nowait(lambda: threads.append(threading.get_ident()), priority=NORMAL)
    assert threads[0] != threading.get_ident()
    assert threads[1] == threading.get_ident()


def test_work_that_a_full_scheduler_refuses_is_done_by_its_caller():
    with Scheduler(workers=1, max_queued=1) as scheduler:
        executor = SchedulerExecutor(scheduler)
        running, go_on = threading.Event(), threading.Event()
        scheduler.submit_nowait(lambda: (running.set(), go_on.wait(30)))
        assert running.wait(30)
        threads = []
        for _ in range(3):
            executor.submit_nowait(lambda: threads.append(threading.get_ident()), priority=NORMAL)
        assert threads == [threading.get_ident()] * 2
        go_on.set()
    assert len(threads) == 3
