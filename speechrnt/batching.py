"""The dispatcher: when the model works, and on which windows at once.

When a model worker is idle, what comes goes. When all are busy, jobs wait in a `JobQueue`, and a
worker that comes free takes the next one and encodes it; as long as the batch is smaller than what
pays (`BatchSizes`) and the queue holds jobs that fit, it takes and encodes more of them; then it
decodes them together. So jobs join until the decoder starts, nobody waits for a timer, and several
workers share a queue evenly.

The workers are threads of the dispatcher's, or, in `CallerDispatcher`, whoever waits for a job.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from traceback import clear_frames
from typing import Any, Protocol, TypeAlias

import ctranslate2
import numpy as np
from numpy.typing import NDArray

from ._sched import Priority
from .batch_sizes import BatchSizes, Costs
from .decoding import build_prompt, length_limit, search_arguments
from .errors import DeadlineExceeded, ModelError, Overloaded, SpeechRNTError
from .executor import Executor
from .job_queue import JobQueue
from .models import Model

__all__ = ["Dispatcher", "DispatcherStatistics", "Executor", "Job", "JobResult", "SearchOptions"]

logger = logging.getLogger("speechrnt")

LanguageProbabilities: TypeAlias = list[tuple[str, float]]

# A short sentence.
_MEASURED_TOKENS = 16

# Not less: a client that comes back at once would find the queue as full.
_LEAST_RETRY_AFTER_S = 0.1

# Model time of a frame before anything is known of it. Too little would be unfair: a client's clock
# advances by it.
_UNMEASURED_S = 1e-4


class _Buffer(Protocol):
    @property
    def array(self) -> NDArray[np.float32]: ...


class Buffers(Protocol):
    """Where features and encodings of a batch are put together, such as an `AudioBufferPool`."""

    def acquire(self, size: int, /) -> AbstractContextManager[_Buffer]:
        """Return so many floats, for as long as the context lasts."""


@dataclass(frozen=True)
class SearchOptions:
    """How CTranslate2 shall search; the same for all of a batch. See `Whisper.generate`.

    At a `temperature` above 0 it draws `best_of` candidates instead.
    """

    beam_size: int = 5
    patience: float = 1.0
    temperature: float = 0.0
    best_of: int = 1
    length_penalty: float = 1.0
    repetition_penalty: float = 1.0
    no_repeat_ngram_size: int = 0
    suppress_blank: bool = True
    suppress_tokens: tuple[int, ...] = ()
    max_initial_timestamp_index: int = 50

    def arguments(self) -> dict[str, Any]:
        """Return them as CTranslate2 takes them."""
        return {
            "length_penalty": self.length_penalty,
            "repetition_penalty": self.repetition_penalty,
            "no_repeat_ngram_size": self.no_repeat_ngram_size,
            "suppress_blank": self.suppress_blank,
            "suppress_tokens": list(self.suppress_tokens),
            "max_initial_timestamp_index": self.max_initial_timestamp_index,
            **search_arguments(self.temperature, self.beam_size, self.patience, self.best_of),
        }


@dataclass(frozen=True)
class JobResult:
    """What the model says of a job's windows.

    Attributes
    ----------
    outputs
        The transcript of each; none if only the encoding was asked for.
    prompt_length
        Tokens that they were decoded from.
    rankings
        For each, code and probability of each language, best first, if they were asked for.
    encoding
        The encoder's output, for another attempt at them; None where it cannot be kept.
    queue_s, encode_s, decode_s
        Seconds in the queue, and of the model's calls that the job was part of.
    """

    outputs: Sequence[ctranslate2.models.WhisperGenerationResult]
    prompt_length: int
    rankings: Sequence[LanguageProbabilities] | None
    encoding: ctranslate2.StorageView | None
    queue_s: float
    encode_s: float
    decode_s: float

    @property
    def output(self) -> ctranslate2.models.WhisperGenerationResult:
        """The transcript of the only window."""
        [output] = self.outputs
        return output

    @property
    def languages(self) -> LanguageProbabilities | None:
        """The languages of the only window."""
        return None if self.rankings is None else self.rankings[0]


@dataclass(eq=False)
class Job:
    """One window for the model, or some that belong together.

    Attributes
    ----------
    frames
        Mel frames of the encoder's context.
    features
        An array of shape (windows, n_mels, frames), float32; or what writes one window to an array
        of shape (n_mels, frames), called by a model worker.
    language
        What is spoken. None: it is detected first, for each window.
    prompt
        Returns the tokens to decode from, given the language: as many for one as for another.
    prompt_shape
        What has to be equal for prompts to share a batch: how many tokens there are before
        <|startoftranscript|>, and after.
    max_length
        CTranslate2's limit: see `decoding.length_limit`.
    search
        How to search; None to encode only, and to detect the language if there is none.
    done, failed
        One of them is called, once, by the executor; neither if the job was cancelled.
    priority, deadline, client
        See `Queueable`; the deadline is a time of `time.monotonic`.
    lane
        Jobs of different lanes share no batch: further attempts do not hold up first ones.
    encoding
        The encoder's output if it is known already.
    """

    frames: int
    features: NDArray[np.float32] | Callable[[NDArray[np.float32]], None]
    language: str | None
    prompt: Callable[[str], list[int]]
    prompt_shape: Hashable
    max_length: int
    search: SearchOptions | None
    done: Callable[[JobResult], None]
    failed: Callable[[Exception], None]
    priority: Priority = Priority.NORMAL
    deadline: float | None = None
    client: Hashable | None = None
    lane: int = 0
    encoding: ctranslate2.StorageView | None = None
    key: Hashable = field(init=False)
    cost_s: float = field(default=0.0, init=False)
    queued_at: float = field(default=0.0, init=False)

    def __post_init__(self) -> None:
        # CTranslate2 takes one set of options and one place of <|startoftranscript|> per call.
        self.key = (self.frames, self.prompt_shape, self.max_length, self.search, self.lane)
        if self.search is not None and self.search.temperature:
            # What is drawn depends on all that is drawn in the same call.
            self.key = (self.key, id(self))

    @property
    def n_windows(self) -> int:
        """How many windows it has."""
        return 1 if callable(self.features) else len(self.features)

    def write_features(self, out: NDArray[np.float32]) -> None:
        """Write the features to an array of shape (windows, n_mels, frames)."""
        if callable(self.features):
            self.features(out[0])
        else:
            out[:] = self.features


@dataclass(frozen=True)
class DispatcherStatistics:
    """Counts since the start, consistent with each other.

    Attributes
    ----------
    submitted, completed, failed, cancelled, expired, rejected : int
        Jobs accepted; then done, failed, taken back, or past their deadline before they started;
        and jobs not accepted because the queue was full.
    queued : Mapping of Priority to int
        Jobs that wait now.
    running : int
        Jobs that a model worker has now.
    batch_sizes : Mapping of int to int
        How many times the decoder was called for so many windows.
    batch_room : int
        For how many windows those calls would have been worth their while, all together.
    isolated : int
        Batches that failed, and were done again window by window.
    encode_s, decode_s : float
        Seconds in the model's calls, of all workers.
    """

    submitted: int
    completed: int
    failed: int
    cancelled: int
    expired: int
    rejected: int
    queued: Mapping[Priority, int]
    running: int
    batch_sizes: Mapping[int, int]
    batch_room: int
    isolated: int
    encode_s: float
    decode_s: float


@dataclass(eq=False)
class _Item:
    """A job in a worker's hands."""

    job: Job
    started_at: float
    encoding: Any = None  # ctranslate2.StorageView, once there is one
    is_alone: bool = True  # in the encoder's output
    encode_s: float = 0.0
    rankings: Sequence[LanguageProbabilities] | None = None
    is_answered: bool = False


class Dispatcher:
    """The only caller of the model. Thread-safe.

    Parameters
    ----------
    model
        The model.
    workers
        Calls of the model at the same time; as many as it was loaded for.
    sizes
        How many windows pay.
    buffers
        Where features and encodings of a batch are put together.
    executor
        Runs the jobs' callbacks.
    max_queued
        Jobs that may wait.
    has_threads
        Whether the workers are threads of its own.
    """

    def __init__(
        self,
        model: Model,
        workers: int,
        sizes: BatchSizes,
        buffers: Buffers,
        executor: Executor,
        max_queued: int,
        has_threads: bool = True,
    ) -> None:
        self._model = model
        self._sizes = sizes
        self._buffers = buffers
        self._executor = executor
        self._max_queued = max_queued
        self._n_workers = workers
        # What is encoded together stays together: parts of a GPU's memory cannot be joined here.
        self._joins_encodings = model.whisper.device == "cpu"
        self._process = os.getpid()
        self._changed = threading.Condition()
        # Guarded by _changed, down to the threads.
        self._queue: JobQueue[Job] = JobQueue()
        self._is_closed = False
        self._running = 0
        self._busy_since: dict[threading.Thread, float] = {}
        self._counts: Counter[str] = Counter()
        self._batch_sizes: Counter[int] = Counter()
        self._batch_room = 0
        self._encode_s = 0.0
        self._decode_s = 0.0
        self._threads = [
            threading.Thread(target=self._work, name=f"speechrnt-model-{index}", daemon=True)
            for index in range(workers if has_threads else 0)
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, job: Job) -> None:
        """Queue a job.

        Raises
        ------
        Overloaded
            As many jobs wait as may.
        ModelError
            The dispatcher is closed, or belongs to a parent process.
        """
        self.check_process()
        job.cost_s = self._sizes.expected_s(job.frames) or job.frames * _UNMEASURED_S
        with self._changed:
            if self._is_closed:
                raise ModelError("the dispatcher is closed")
            if len(self._queue) >= self._max_queued:
                self._counts["rejected"] += 1
                raise Overloaded(
                    f"{self._max_queued} windows are waiting for the model, the most allowed",
                    self._retry_after_s(),
                )
            job.queued_at = time.monotonic()
            self._queue.add(job, job.queued_at)
            self._counts["submitted"] += 1
            self._changed.notify()

    def cancel(self, job: Job) -> bool:
        """Take a job back; False if it does not wait any more, and so will be answered."""
        self.check_process()
        with self._changed:
            if not self._queue.discard(job):
                return False
            self._counts["cancelled"] += 1
            return True

    def expected_s(self, frames: int) -> float:
        """Return the model time that a window of so many mel frames takes, 0 if not known yet."""
        return self._sizes.expected_s(frames)

    @property
    def backlog_s(self) -> float:
        """Expected seconds until what waits now has begun. Takes no lock."""
        return self._queue.cost_s / self._n_workers

    def retry_after_s(self) -> float:
        """Return the seconds until the work that waits now may be done, as far as can be told."""
        with self._changed:
            return self._retry_after_s()

    def statistics(self) -> DispatcherStatistics:
        """Return what was counted so far."""
        with self._changed:
            return DispatcherStatistics(
                submitted=self._counts["submitted"],
                completed=self._counts["completed"],
                failed=self._counts["failed"],
                cancelled=self._counts["cancelled"],
                expired=self._counts["expired"],
                rejected=self._counts["rejected"],
                queued=self._queue.sizes,
                running=self._running,
                batch_sizes=dict(self._batch_sizes),
                batch_room=self._batch_room,
                isolated=self._counts["isolated"],
                encode_s=self._encode_s,
                decode_s=self._decode_s,
            )

    def is_worker(self) -> bool:
        """Whether the caller is one of the threads that call the model."""
        return threading.current_thread() in self._threads

    def measure(self, frames: int, search: SearchOptions) -> Costs:
        """Time the model on one length of context, and use the batch sizes that pay from now on.

        Parameters
        ----------
        frames
            Mel frames of context.
        search
            How to decode.
        """
        self.check_process()
        model, tokenizer = self._model, self._model.tokenizer
        prompt = build_prompt(tokenizer, tokenizer.languages[0], "transcribe", (), True)
        shape = (self._sizes.largest(frames), model.n_mels, frames)
        noise = np.random.default_rng(0).uniform(-0.5, 0.5, shape).astype(np.float32)
        encodings: dict[int, ctranslate2.StorageView] = {}

        def encode(size: int) -> None:
            encodings[size] = model.encode(noise[:size])

        def decode(size: int) -> None:
            model.generate(
                encodings[size],
                [prompt] * size,
                beam_size=search.beam_size,
                patience=search.patience,
                max_length=length_limit(_MEASURED_TOKENS, len(prompt)),
                # So that no window ends before the others.
                suppress_tokens=[tokenizer.eot],
            )

        def prepare(size: int) -> None:
            if size not in encodings and self._joins_encodings:
                several = np.repeat(np.asarray(encodings[1]), size, axis=0)
                encodings[size] = ctranslate2.StorageView.from_array(several)
            elif size not in encodings:
                encode(size)
            decode(size)

        return self._sizes.measure(frames, encode, prepare)

    @property
    def queue_use(self) -> float:
        """Jobs that wait, as a share of the most allowed."""
        return len(self._queue) / self._max_queued

    def delays(self) -> tuple[float, float]:
        """Return how long the oldest job has waited, and the longest call has run, in seconds."""
        now = time.monotonic()
        with self._changed:
            oldest = min((job.queued_at for job in self._queue), default=now)
            longest = min(self._busy_since.values(), default=now)
        return now - oldest, now - longest

    def close(self, cancel: bool = False, wait: bool = True) -> None:
        """Accept nothing more, do what waits, and end the workers.

        May be called again. In a forked child it does nothing.

        Parameters
        ----------
        cancel
            Jobs that wait fail instead.
        wait
            Return when the workers have ended, but for the one that may be calling.
        """
        if os.getpid() != self._process:
            return
        dropped: list[Job] = []
        with self._changed:
            self._is_closed = True
            if cancel:
                while (job := self._queue.pick()) is not None:
                    dropped.append(job)
                self._counts["cancelled"] += len(dropped)
            self._changed.notify_all()
        for job in dropped:
            self._deliver(job, job.failed, ModelError("closed before the model came to this"))
        for thread in self._threads:
            if wait and thread is not threading.current_thread():
                thread.join()

    def check_process(self) -> None:
        """Raise `ModelError` in a forked child, which has no workers."""
        if os.getpid() != self._process:
            raise ModelError(
                "this dispatcher belongs to the parent process and has no workers here; "
                "start processes with the 'spawn' method, and load the model in each"
            )

    def _retry_after_s(self) -> float:
        return max(self._queue.cost_s / self._n_workers, _LEAST_RETRY_AFTER_S)

    def _work(self) -> None:
        while True:
            with self._changed:
                while not len(self._queue):
                    if self._is_closed:
                        return
                    self._changed.wait()
            self._work_once()

    def _work_once(self) -> None:
        """Do the next job, with whoever may join it; another worker may have taken it."""
        with self._changed:
            job = self._queue.pick()
            if job is None:
                return
            in_time = self._admit(job)
            if in_time:
                self._busy_since[threading.current_thread()] = time.monotonic()
        if not in_time:
            self._expire(job)
            return
        batch = [_Item(job, time.monotonic())]
        del job
        try:
            try:
                results = self._run(batch)
            except Exception as error:
                self._recover(batch, error)
            else:
                self._answer(batch, results)
        except BaseException:
            self._give_back(batch)
            raise
        finally:
            with self._changed:
                del self._busy_since[threading.current_thread()]

    def _give_back(self, batch: list[_Item]) -> None:
        """Queue again what was not answered, as the thread that worked on it is interrupted."""
        with self._changed:
            for item in batch:
                if not item.is_answered:
                    self._running -= 1
                    self._queue.add(item.job, item.job.queued_at)
            self._changed.notify_all()

    def _admit(self, job: Job) -> bool:
        """Count a picked job as running, unless it is too late for it; called with the lock."""
        if job.deadline is not None and time.monotonic() > job.deadline:
            self._counts["expired"] += 1
            return False
        self._running += 1
        return True

    def _expire(self, job: Job) -> None:
        late = DeadlineExceeded("the model had not come to this when its deadline passed")
        self._deliver(job, job.failed, late)

    def _join(self, batch: list[_Item], most: int, room: int) -> list[_Item]:
        """Take more jobs for the batch, at most so many, with at most so many windows."""
        joined: list[_Item] = []
        expired: list[Job] = []
        leader = batch[0].job
        with self._changed:
            while len(joined) < most and room > 0:
                job = self._queue.pick_like(leader, room)
                if job is None:
                    break
                if self._admit(job):
                    joined.append(_Item(job, time.monotonic()))
                    room -= job.n_windows
                else:
                    expired.append(job)
        for job in expired:
            self._expire(job)
        batch += joined
        return joined

    def _run(self, batch: list[_Item]) -> list[JobResult]:
        """Encode and decode a batch, and whoever joins it meanwhile."""
        started = time.monotonic()
        frames = batch[0].job.frames
        encode_size, decode_size = self._sizes.of(frames)
        n_windows = batch[0].job.n_windows
        new = [*batch, *self._join(batch, encode_size - 1, encode_size - n_windows)]
        self._encode(new)
        while self._joins_encodings and batch[0].job.search is not None:
            new = self._join(batch, encode_size, decode_size - _n_windows(batch))
            if not new:
                break
            self._encode(new)
        results = self._finish(batch)
        if batch[0].job.search is not None:
            self._sizes.observe(frames, _n_windows(batch), time.monotonic() - started)
        return results

    def _encode(self, items: list[_Item]) -> None:
        """Encode some jobs with one call, and detect their languages where that is asked."""
        started = time.monotonic()
        job = items[0].job
        if len(items) == 1 and job.encoding is not None:
            encoding = job.encoding
        elif len(items) == 1 and not callable(job.features):
            encoding = self._model.encode(job.features)
        else:
            shape = (_n_windows(items), self._model.n_mels, job.frames)
            with self._buffers.acquire(int(np.prod(shape))) as buffer:
                features = buffer.array.reshape(shape)
                for item, window in zip(items, _parts(items, features), strict=True):
                    item.job.write_features(window)
                encoding = self._model.encode(features)
                del features, window
        if any(item.job.language is None for item in items):
            rankings = self._model.detect_languages(encoding)
            for item, of_job in zip(items, _parts(items, rankings), strict=True):
                item.rankings = of_job if item.job.language is None else None
        elapsed = time.monotonic() - started
        for item in items:
            item.encoding = encoding
            item.is_alone = len(items) == 1
            item.encode_s = elapsed
        with self._changed:
            self._encode_s += elapsed

    def _finish(self, batch: list[_Item]) -> list[JobResult]:
        """Decode what is encoded, unless nothing but its language is asked for."""
        if batch[0].job.search is None:
            return [self._result(item) for item in batch]
        return self._decode(batch)

    def _decode(self, batch: list[_Item]) -> list[JobResult]:
        started = time.monotonic()
        job = batch[0].job
        assert job.search is not None
        prompts = [
            item.job.prompt(language)
            for item in batch
            for language in (
                [str(item.job.language)] * item.job.n_windows
                if item.rankings is None
                else [ranking[0][0] for ranking in item.rankings]
            )
        ]
        options = {
            **job.search.arguments(),
            "max_length": job.max_length,
            "return_scores": True,
            "return_no_speech_prob": True,
        }
        first = batch[0].encoding
        if all(item.encoding is first for item in batch):
            outputs = self._model.generate(first, prompts, **options)
        else:
            outputs = self._decode_joined(batch, prompts, options)
        decode_s = time.monotonic() - started
        _, room = self._sizes.of(job.frames)
        with self._changed:
            self._decode_s += decode_s
            self._batch_sizes[len(prompts)] += 1
            self._batch_room += max(room, len(prompts))
        return [
            self._result(item, of_job, len(prompts[0]), decode_s)
            for item, of_job in zip(batch, _parts(batch, outputs), strict=True)
        ]

    def _result(
        self,
        item: _Item,
        outputs: Sequence[ctranslate2.models.WhisperGenerationResult] = (),
        prompt_length: int = 0,
        decode_s: float = 0.0,
    ) -> JobResult:
        return JobResult(
            outputs=outputs,
            prompt_length=prompt_length,
            rankings=item.rankings,
            encoding=item.encoding if item.is_alone else None,
            queue_s=item.started_at - item.job.queued_at,
            encode_s=item.encode_s,
            decode_s=decode_s,
        )

    def _decode_joined(
        self, batch: list[_Item], prompts: list[list[int]], options: Mapping[str, Any]
    ) -> list[ctranslate2.models.WhisperGenerationResult]:
        """Put encodings from several calls together, and decode them."""
        parts = [np.asarray(encoding) for encoding in dict.fromkeys(i.encoding for i in batch)]
        shape = (len(prompts), *parts[0].shape[1:])
        with self._buffers.acquire(int(np.prod(shape))) as buffer:
            joined = buffer.array.reshape(shape)
            np.concatenate(parts, out=joined)
            view = ctranslate2.StorageView.from_array(joined)
            try:
                return self._model.generate(view, prompts, **options)
            finally:
                del joined, view

    def _recover(self, batch: list[_Item], error: Exception) -> None:
        """After a call failed: do its jobs one by one, so that only the guilty one fails."""
        if len(batch) == 1:
            self._answer(batch, [error])
            return
        logger.warning("a batch of %d failed and is done one by one: %s", len(batch), error)
        clear_frames(error.__traceback__)
        with self._changed:
            self._counts["isolated"] += 1
        for item in batch:
            try:
                self._encode([item])
                results: Sequence[JobResult | Exception] = self._finish([item])
            except Exception as alone_error:
                results = [alone_error]
            self._answer([item], results)

    def _answer(self, items: list[_Item], answers: Sequence[JobResult | Exception]) -> None:
        """Count jobs as done or failed, and tell their owners."""
        for item, answer in zip(items, answers, strict=True):
            has_failed = isinstance(answer, Exception)
            with self._changed:
                item.is_answered = True
                self._running -= 1
                self._counts["failed" if has_failed else "completed"] += 1
            if isinstance(answer, Exception):
                self._deliver(item.job, item.job.failed, self._checked_error(answer))
            else:
                self._deliver(item.job, item.job.done, answer)

    def _checked_error(self, error: Exception) -> Exception:
        """Return an exception of ours, which holds none of the buffers."""
        clear_frames(error.__traceback__)
        if isinstance(error, SpeechRNTError):
            return error
        wrapped = ModelError(f"{self._model.name}: CTranslate2 failed: {error}")
        wrapped.__cause__ = error
        return wrapped

    def _deliver(self, job: Job, callback: Callable[[Any], None], value: object) -> None:
        """Have the executor tell a job's owner."""
        try:
            self._executor.submit_nowait(callback, value, priority=job.priority)
        except Exception:  # which would end the worker
            logger.exception("the dispatcher could not deliver a result")


def _n_windows(items: Sequence[_Item]) -> int:
    return sum(item.job.n_windows for item in items)


def _parts(items: Sequence[_Item], of_windows: Any) -> Iterator[Any]:
    """Cut what there is for each window into what there is for each job."""
    start = 0
    for item in items:
        past = start + item.job.n_windows
        yield of_windows[start:past]
        start = past
