"""The dispatcher on the real model: company, turns, faults, cancellation, and its end."""

import os
import random
import subprocess
import sys
import threading
import time
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import replace
from functools import cache, partial

import numpy as np
import pytest

from speechrnt import DeadlineExceeded, ModelError, Overloaded, Priority, load_model
from speechrnt._mel_task import compute
from speechrnt.batch_sizes import BatchSizes
from speechrnt.batching import Dispatcher, Job, SearchOptions
from speechrnt.decoding import build_prompt, length_limit
from speechrnt.executor import InlineExecutor
from speechrnt.job_queue import ROUND_S
from speechrnt.models import Model
from speechrnt.pools import AudioBufferPool, PoolLimits
from speechrnt.utterance import WindowFeatures

CRITICAL, HIGH, NORMAL, LOW = Priority


class Sizes(BatchSizes):
    """Sizes that stay what they are."""

    def __init__(self, encode, decode):
        super().__init__(64, lambda frames: 64, "cpu")
        self.fixed = encode, decode

    def of(self, frames):
        return self.fixed


@pytest.fixture(scope="module")
def model():
    return load_model("pico", "cpu", num_workers=2, cpu_threads=1)


@pytest.fixture(scope="module")
def buffers():
    pool = AudioBufferPool(PoolLimits(overflow="allocate"))
    yield pool
    assert pool.statistics().in_use == 0


@pytest.fixture(scope="module")
def windows(model, buffers, clips):
    """The features of each recording."""
    features = []
    for clip in clips:
        each = WindowFeatures(len(clip), model.n_mels, buffers)
        each.maximum = compute(clip, each.log10_mel)
        features.append(each)
    yield features
    for each in features:
        each.release()


@pytest.fixture
def dispatcher_of(model, buffers):
    made = []

    def make(workers=1, encode=1, decode=8, max_queued=1000):
        dispatcher = Dispatcher(
            model, workers, Sizes(encode, decode), buffers, InlineExecutor(), max_queued
        )
        made.append(dispatcher)
        return dispatcher

    yield make
    for dispatcher in made:
        dispatcher.close(cancel=True)


def job_of(features, *, frames=600, language="en", previous=(), beam_size=5, tokens=60, **more):
    """Return a job for recorded features, and the future of its result."""
    future = Future()
    prompt_length = len(previous) + bool(previous) + 4
    job = Job(
        frames=frames,
        features=getattr(features, "write", features),
        language=language,
        prompt=partial(prompt_of, more.pop("task", "transcribe"), previous),
        prompt_shape=len(previous),
        max_length=length_limit(tokens, prompt_length),
        search=SearchOptions(beam_size=beam_size),
        done=future.set_result,
        failed=future.set_exception,
        **more,
    )
    return job, future


@cache
def tokenizer():
    return load_model("pico", "cpu").tokenizer


def prompt_of(task, previous, language):
    return build_prompt(tokenizer(), language, task, previous, True, max(len(previous), 1))


@contextmanager
def busy(dispatcher, features):
    """Keep a worker busy with a job of its own inside the block."""
    begun, go_on = threading.Event(), threading.Event()

    def write(out):
        begun.set()
        assert go_on.wait(60)
        features.write(out)

    job, future = job_of(write, priority=CRITICAL, lane=99)
    dispatcher.submit(job)
    assert begun.wait(60)
    try:
        yield
    finally:
        go_on.set()
    future.result(60)


def submit(dispatcher, features, **more):
    job, future = job_of(features, **more)
    dispatcher.submit(job)
    return future


def said(result):
    """All that a result says of its window."""
    output = result.output
    return (
        output.sequences_ids,
        output.scores,
        output.no_speech_prob,
        result.languages,
        result.prompt_length,
    )


def settled(dispatcher):
    """Wait until nothing runs, and return the statistics, which must add up."""
    end = time.monotonic() + 60
    while True:
        now = dispatcher.statistics()
        ended = now.completed + now.failed + now.cancelled + now.expired
        assert now.submitted == ended + now.running + sum(now.queued.values())
        if not now.running and not sum(now.queued.values()):
            return now
        assert time.monotonic() < end
        time.sleep(0.001)


def random_requests(windows, manifest, rng, n):
    requests = []
    for _ in range(n):
        index = rng.randrange(len(windows))
        frames = rng.choice([500, 600, 800])
        requests.append(
            {
                "features": windows[index],
                "frames": frames,
                "language": rng.choice([None, manifest[index]["lang"], "en"]),
                "task": rng.choice(["transcribe", "translate"]),
                "previous": tuple(rng.randrange(300, 400) for _ in range(rng.choice([0, 0, 8]))),
                "beam_size": rng.choice([1, 5]),
                "tokens": rng.choice([60, 90]),
                "lane": rng.choice([0, 0, 1]),
            }
        )
    return requests


@pytest.mark.parametrize(("encode", "decode"), [(1, 8), (4, 8), (1, 3)])
def test_what_a_window_says_does_not_depend_on_its_company(
    dispatcher_of, windows, manifest, encode, decode
):
    rng = random.Random(encode * 10 + decode)
    requests = random_requests(windows, manifest, rng, 32)
    alone = dispatcher_of()
    expected = [said(submit(alone, **request).result(60)) for request in requests]
    assert alone.statistics().batch_sizes == {1: 32}
    for workers in (1, 2):
        dispatcher = dispatcher_of(workers, encode, decode)
        order = list(range(len(requests)))
        rng.shuffle(order)
        with busy(dispatcher, windows[0]):
            futures = {index: submit(dispatcher, **requests[index]) for index in order}
        for index, future in futures.items():
            assert said(future.result(60)) == expected[index]
        assert max(settled(dispatcher).batch_sizes) > 1


def test_batches_form_while_the_worker_is_busy_and_are_never_too_large(dispatcher_of, windows):
    dispatcher = dispatcher_of(decode=4)
    with busy(dispatcher, windows[0]):
        futures = [submit(dispatcher, each) for each in windows[:10]]
    for future in futures:
        future.result(60)
    assert settled(dispatcher).batch_sizes == {1: 1, 4: 2, 2: 1}


def test_an_idle_worker_takes_what_comes_at_once(dispatcher_of, windows):
    dispatcher = dispatcher_of()
    for each in windows[:5]:
        submit(dispatcher, each).result(60)
    assert settled(dispatcher).batch_sizes == {1: 5}


@pytest.mark.parametrize(
    "other",
    [
        {"frames": 800},
        {"beam_size": 1},
        {"previous": (301, 302)},
        {"tokens": 90},
        {"lane": 1},
    ],
)
def test_what_the_model_cannot_do_in_one_call_is_not_batched(dispatcher_of, windows, other):
    dispatcher = dispatcher_of()
    with busy(dispatcher, windows[0]):
        futures = [submit(dispatcher, windows[1]), submit(dispatcher, windows[2], **other)]
    for future in futures:
        future.result(60)
    assert settled(dispatcher).batch_sizes == {1: 3}


def test_languages_and_tasks_share_a_batch(dispatcher_of, windows):
    dispatcher = dispatcher_of()
    with busy(dispatcher, windows[0]):
        futures = [
            submit(dispatcher, windows[0], language=language, task=task)
            for language in (None, "es", "de")
            for task in ("transcribe", "translate")
        ]
    results = [future.result(60) for future in futures]
    assert settled(dispatcher).batch_sizes == {1: 1, 6: 1}
    assert [result.languages is not None for result in results] == [True, True] + [False] * 4
    assert results[0].languages[0][0] == "es"
    assert said(results[0])[0] == said(results[2])[0] != said(results[3])[0]


def order_of(dispatcher, windows, jobs):
    """Submit jobs while the worker is busy; return the names in the order of their ends."""
    order = []
    futures = []
    with busy(dispatcher, windows[0]):
        for name, more in jobs:
            future = submit(dispatcher, windows[1], **more)
            future.add_done_callback(lambda _, name=name: order.append(name))
            futures.append(future)
    for future in futures:
        future.exception(60)
    return order


def test_priorities_are_observed(dispatcher_of, windows):
    jobs = [(priority, {"priority": priority}) for priority in (LOW, NORMAL, HIGH, CRITICAL) * 2]
    order = order_of(dispatcher_of(decode=1), windows, jobs)
    assert order == [CRITICAL, CRITICAL, HIGH, HIGH, NORMAL, NORMAL, LOW, LOW]


def test_deadlines_are_observed_inside_a_priority(dispatcher_of, windows):
    now = time.monotonic()
    jobs = [(d, {"deadline": d and now + d}) for d in (None, 300, 100, 200)]
    jobs[0] = (0, {})
    # Without a deadline, a job is due sooner than these.
    assert order_of(dispatcher_of(decode=1), windows, jobs) == [0, 100, 200, 300]


def test_a_flood_of_one_client_does_not_shut_out_another(dispatcher_of, windows):
    dispatcher = dispatcher_of(decode=1)
    dispatcher._sizes.expected_s = lambda frames: 0.03
    jobs = [("flood", {"client": "flood"})] * 60 + [("light", {"client": "light"})]
    # After those of the flood that begin in its first round.
    assert order_of(dispatcher, windows, jobs).index("light") == 1 + ROUND_S // 0.03


def test_a_late_job_fails_and_costs_the_model_nothing(dispatcher_of, windows):
    dispatcher = dispatcher_of()
    with busy(dispatcher, windows[0]):
        late = submit(dispatcher, windows[1], deadline=time.monotonic() - 1)
        good = submit(dispatcher, windows[1])
        also_late = submit(dispatcher, windows[1], deadline=time.monotonic())
        time.sleep(0.002)
    for future in (late, also_late):
        with pytest.raises(DeadlineExceeded, match="deadline"):
            future.result(60)
    good.result(60)
    now = settled(dispatcher)
    assert (now.expired, now.completed, now.batch_sizes) == (2, 2, {1: 2})


def test_a_job_that_waits_can_be_taken_back(dispatcher_of, windows):
    dispatcher = dispatcher_of()
    with busy(dispatcher, windows[0]):
        job, future = job_of(windows[1])
        dispatcher.submit(job)
        assert dispatcher.cancel(job)
        assert not dispatcher.cancel(job)
        last = submit(dispatcher, windows[2])
    last.result(60)
    assert not future.done()
    assert settled(dispatcher).cancelled == 1


def test_a_job_that_runs_or_is_done_cannot(dispatcher_of, windows):
    dispatcher = dispatcher_of()
    begun, go_on = threading.Event(), threading.Event()

    def write(out):
        begun.set()
        assert go_on.wait(60)
        windows[0].write(out)

    job, future = job_of(write)
    dispatcher.submit(job)
    assert begun.wait(60)
    assert dispatcher.statistics().running == 1
    assert not dispatcher.cancel(job)
    go_on.set()
    assert future.result(60).output.sequences_ids
    assert not dispatcher.cancel(job)
    assert settled(dispatcher).cancelled == 0


def test_features_that_cannot_be_written_fail_one_job_alone(dispatcher_of, windows, buffers):
    def fail(out):
        raise ValueError("no features")

    dispatcher = dispatcher_of()
    expected = said(submit(dispatcher, windows[1]).result(60))
    in_use = buffers.statistics().in_use
    with busy(dispatcher, windows[0]):
        good = [submit(dispatcher, windows[1]) for _ in range(3)]
        bad = submit(dispatcher, fail)
        good += [submit(dispatcher, windows[1]) for _ in range(3)]
    assert [said(future.result(60)) for future in good] == [expected] * 6
    with pytest.raises(ModelError, match="no features"):
        bad.result(60)
    error = bad.exception()
    assert isinstance(error.__cause__, ValueError)
    now = settled(dispatcher)
    assert (now.failed, now.completed, now.isolated) == (1, 8, 1)
    # While the error is still held: its traceback holds no buffer.
    assert buffers.statistics().in_use == in_use


@pytest.mark.parametrize("method", ["encode", "generate", "detect_languages"])
def test_a_call_that_fails_harms_only_who_makes_it_fail(
    dispatcher_of, windows, monkeypatch, buffers, method
):
    """A batch that fails is done again one by one; what fails alone, fails."""
    dispatcher = dispatcher_of(encode=4 if method != "generate" else 1)
    expected = said(submit(dispatcher, windows[1], language=None).result(60))
    in_use = buffers.statistics().in_use
    original = getattr(Model, method)
    alone = []

    def fault(self, what, *rest, **more):
        if what.shape[0] > 1:
            raise RuntimeError("out of memory")
        alone.append(1)
        if len(alone) == 4:
            raise RuntimeError("out of luck")
        return original(self, what, *rest, **more)

    def joined(self, what, prompts, **more):
        if len(prompts) > 1:
            raise RuntimeError("out of memory")
        return fault(self, what, prompts, **more)

    with busy(dispatcher, windows[0]):
        monkeypatch.setattr(Model, method, joined if method == "generate" else fault)
        futures = [submit(dispatcher, windows[1], language=None) for _ in range(4)]
    outcomes = [future.exception(60) for future in futures]
    failed = [outcome for outcome in outcomes if outcome is not None]
    assert len(failed) == 1
    assert isinstance(failed[0], ModelError)
    assert "out of luck" in str(failed[0])
    assert [said(f.result()) for f in futures if f.exception() is None] == [expected] * 3
    monkeypatch.undo()
    assert said(submit(dispatcher, windows[1], language=None).result(60)) == expected
    now = settled(dispatcher)
    assert (now.failed, now.isolated) == (1, 1)
    assert buffers.statistics().in_use == in_use


def test_detections_that_fail_together_are_done_one_by_one(dispatcher_of, windows, monkeypatch):
    dispatcher = dispatcher_of(encode=4)
    original = Model.encode

    def fault(self, what):
        if what.shape[0] > 1:
            raise RuntimeError("out of memory")
        return original(self, what)

    def detect():
        job, future = job_of(windows[1], language=None)
        job = replace(job, search=None)
        dispatcher.submit(job)
        return future

    alone = detect().result(60)
    with busy(dispatcher, windows[0]):
        monkeypatch.setattr(Model, "encode", fault)
        futures = [detect() for _ in range(3)]
    results = [future.result(60) for future in futures]
    assert [result.rankings[0][0] for result in results] == [alone.rankings[0][0]] * 3
    assert all(not result.outputs for result in results)
    now = settled(dispatcher)
    assert (now.failed, now.isolated, now.running) == (0, 1, 0)


def test_an_executor_that_fails_does_not_end_the_worker(model, buffers, windows):
    class Failing(InlineExecutor):
        broken = True

        def submit_nowait(self, fn, /, *args, priority):
            if self.broken:
                raise RuntimeError("no executor")
            super().submit_nowait(fn, *args, priority=priority)

    executor = Failing()
    dispatcher = Dispatcher(model, 1, Sizes(1, 8), buffers, executor, 10)
    lost = submit(dispatcher, windows[0])
    settled(dispatcher)
    executor.broken = False
    submit(dispatcher, windows[0]).result(60)
    assert not lost.done()
    dispatcher.close()


def test_a_full_queue_refuses_and_says_when_to_try_again(dispatcher_of, windows):
    dispatcher = dispatcher_of(max_queued=3)
    with busy(dispatcher, windows[0]):
        futures = [submit(dispatcher, windows[1]) for _ in range(3)]
        with pytest.raises(Overloaded, match="3 windows") as refusal:
            submit(dispatcher, windows[1])
        assert refusal.value.retry_after_s >= 0.1
        assert dispatcher.retry_after_s() >= 0.1
    for future in futures:
        future.result(60)
    submit(dispatcher, windows[1]).result(60)
    now = settled(dispatcher)
    assert (now.rejected, now.submitted, now.completed) == (1, 5, 5)


def test_the_wait_that_is_told_grows_with_the_work_that_waits(dispatcher_of, windows):
    dispatcher = dispatcher_of()
    for _ in range(3):
        submit(dispatcher, windows[1]).result(60)
    dispatcher._sizes.observe(600, 1, 100.0)
    with busy(dispatcher, windows[0]):
        told = []
        for _ in range(3):
            submit(dispatcher, windows[1])
            told.append(dispatcher.retry_after_s())
    assert told[0] > 1
    assert told == sorted(told)
    assert told[2] == pytest.approx(3 * told[0], rel=0.01)


def test_closing_does_what_waits(model, buffers, windows):
    dispatcher = Dispatcher(model, 2, Sizes(1, 2), buffers, InlineExecutor(), 100)
    futures = [submit(dispatcher, each) for each in windows]
    dispatcher.close()
    assert all(future.result(0).output.sequences_ids for future in futures)
    assert not any(thread.is_alive() for thread in dispatcher._threads)
    with pytest.raises(ModelError, match="closed"):
        submit(dispatcher, windows[0])
    dispatcher.close()
    assert settled(dispatcher).completed == len(windows)


def test_closing_with_cancel_fails_what_waits_and_finishes_what_runs(model, buffers, windows):
    dispatcher = Dispatcher(model, 1, Sizes(1, 8), buffers, InlineExecutor(), 100)
    begun, go_on = threading.Event(), threading.Event()

    def write(out):
        begun.set()
        assert go_on.wait(60)
        windows[0].write(out)

    running = submit(dispatcher, write)
    assert begun.wait(60)
    waiting = [submit(dispatcher, each) for each in windows[:5]]
    thread = threading.Thread(target=dispatcher.close, args=(True,))
    thread.start()
    for future in waiting:
        with pytest.raises(ModelError, match="closed"):
            future.result(60)
    assert thread.is_alive()
    go_on.set()
    thread.join(60)
    assert running.result(60).output.sequences_ids
    now = settled(dispatcher)
    assert (now.completed, now.cancelled) == (1, 5)


def test_workers_share_the_work(dispatcher_of, windows):
    dispatcher = dispatcher_of(workers=2, decode=1)
    threads = set()
    barrier = threading.Barrier(2)

    def write(out):
        threads.add(threading.get_ident())
        barrier.wait(60)  # both must be at work at the same time
        windows[0].write(out)

    for future in [submit(dispatcher, write) for _ in range(2)]:
        future.result(60)
    assert len(threads) == 2


def test_a_window_is_not_encoded_twice_if_its_encoding_is_known(
    dispatcher_of, windows, monkeypatch
):
    dispatcher = dispatcher_of()
    first = submit(dispatcher, windows[1]).result(60)
    calls = []
    original = Model.encode
    monkeypatch.setattr(Model, "encode", lambda *a: calls.append(1) or original(*a))
    again = submit(dispatcher, windows[1], encoding=first.encoding, lane=1).result(60)
    assert said(again) == said(first)
    assert not calls


def test_measuring_sets_the_sizes_and_leaves_no_memory_in_use(model, buffers, windows):
    sizes = BatchSizes(4, lambda frames: 4, "cpu")
    dispatcher = Dispatcher(model, 1, sizes, buffers, InlineExecutor(), 10)
    in_use = buffers.statistics().in_use
    costs = dispatcher.measure(600, SearchOptions())
    assert set(costs.encode) <= {1, 2, 4}
    assert all(seconds > 0 for seconds in (*costs.encode.values(), *costs.decode.values()))
    encode, decode = sizes.of(600)
    assert 1 <= encode <= decode <= 4
    assert buffers.statistics().in_use == in_use
    dispatcher.close()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_a_forked_child_is_refused_and_does_not_hang():
    program = """
import os, sys, warnings
warnings.simplefilter("ignore", DeprecationWarning)
from speechrnt import ModelError, load_model
from speechrnt.batch_sizes import BatchSizes
from speechrnt.batching import Dispatcher, Job, SearchOptions
from speechrnt.executor import InlineExecutor
from speechrnt.pools import AudioBufferPool

dispatcher = Dispatcher(
    load_model("pico", "cpu"), 1, BatchSizes(1, lambda n: 1, "cpu"), AudioBufferPool(),
    InlineExecutor(), 10,
)
job = Job(600, print, "en", print, 0, 100, SearchOptions(), print, print)
pid = os.fork()
if not pid:
    for call in (lambda: dispatcher.submit(job), lambda: dispatcher.cancel(job),
                 lambda: dispatcher.measure(600, SearchOptions())):
        try:
            call()
        except ModelError as error:
            assert "parent process" in str(error)
        else:
            os._exit(1)
    dispatcher.close()
    sys.exit(7)
assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7
dispatcher.close()
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=300)


def test_threads_that_submit_and_cancel_lose_nothing(dispatcher_of, windows):
    dispatcher = dispatcher_of(workers=2)
    answered, taken_back = [], []

    def work(seed):
        rng = random.Random(seed)
        for _ in range(25):
            job, future = job_of(windows[rng.randrange(10)], priority=Priority(rng.randrange(4)))
            dispatcher.submit(job)
            if rng.random() < 0.5 and dispatcher.cancel(job):
                taken_back.append(future)
            else:
                answered.append(future)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for future in answered:
        future.result(60)
    assert not any(future.done() for future in taken_back)
    now = settled(dispatcher)
    assert (now.submitted, now.completed, now.cancelled) == (150, len(answered), len(taken_back))
    assert sum(n * count for n, count in now.batch_sizes.items()) == len(answered)
    assert now.encode_s > 0
    assert now.decode_s > 0


def test_features_are_padded_with_silence(windows, model):
    out = np.empty((model.n_mels, 600), dtype=np.float32)
    windows[1].write(out)
    frames = windows[1].frames
    assert np.isfinite(out).all()
    assert out[:, :frames].max() == pytest.approx((windows[1].maximum + 4) / 4)
    assert np.unique(out[:, frames:]).size == 1
    assert out[:, frames:].max() <= out[:, :frames].min() + 1e-6
