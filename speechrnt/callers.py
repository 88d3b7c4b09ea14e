"""A dispatcher without threads of its own, for threads that call and wait: they do its work.

Who waits for a job and finds a worker's place free takes it: picks the next job, whoever's it is,
lets those that fit join, and answers all of them (flat combining, SPAA 2010,
https://doi.org/10.1145/1810479.1810540). So a caller who is alone makes the model's calls itself,
one window each; and where several call at once, their windows share batches as in `Dispatcher`. As
many wait as there are threads that call: nobody is refused.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Hashable, Iterator
from concurrent.futures import CancelledError
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import ctranslate2
import numpy as np
from numpy.typing import NDArray

from .batch_sizes import BatchSizes
from .batching import Dispatcher, Job, JobResult, SearchOptions
from .executor import InlineExecutor
from .models import Model
from .sizing import COMPUTE_TYPES

__all__ = ["Caller", "CallerDispatcher"]

# What a core's share of the caches holds, roughly.
_CACHE_BYTES = 8 << 20

# On the CPU four windows share nearly all that company can share, and more wait for each other.
_MOST_WINDOWS = {"cpu": 4, "cuda": 16}


@dataclass
class _Array:
    array: NDArray[np.float32]


class _Arrays:
    """Buffers that are made when they are needed."""

    @contextmanager
    def acquire(self, size: int, /) -> Iterator[_Array]:
        """Return so many floats."""
        yield _Array(np.empty(size, np.float32))


class _Answer:
    """Where the answer to a job is put."""

    def __init__(self) -> None:
        self._value: JobResult | BaseException | None = None

    @property
    def is_there(self) -> bool:
        return self._value is not None

    def put(self, value: JobResult | BaseException) -> None:
        self._value = value

    def get(self) -> JobResult:
        value = self._value
        assert value is not None
        if isinstance(value, BaseException):
            raise value
        return value


class CallerDispatcher(Dispatcher):
    """A dispatcher whose workers are the threads that wait for jobs. Thread-safe.

    Parameters
    ----------
    model
        The model.
    """

    def __init__(self, model: Model) -> None:
        device = model.whisper.device
        super().__init__(
            model,
            model.whisper.num_workers,
            BatchSizes(_MOST_WINDOWS[device], partial(_most_windows, model), device),
            _Arrays(),
            InlineExecutor(),
            max_queued=sys.maxsize,
            has_threads=False,
        )
        self._leaders = 0

    @property
    def model(self) -> Model:
        """The model."""
        return self._model

    def check_process(self) -> None:
        """Raise `ModelError` in a forked child."""
        self._model.check_process()

    def work_until(self, is_over: Callable[[], bool]) -> None:
        """Do jobs while a worker's place is free, or wait, until a condition holds.

        The condition is looked at after each batch, and after `wake`.
        """
        while True:
            leads = False
            try:
                with self._changed:
                    self._changed.wait_for(lambda: is_over() or self._has_work)
                    if is_over():
                        return
                    # Nothing is called in between: an interrupt finds both or neither.
                    self._leaders += 1
                    leads = True
                self._work_once()
            finally:
                if leads:
                    with self._changed:
                        self._leaders -= 1
                        self._changed.notify_all()

    def wake(self) -> None:
        """Have all who wait look at their conditions."""
        with self._changed:
            self._changed.notify_all()

    @property
    def _has_work(self) -> bool:
        return len(self._queue) > 0 and self._leaders < self._n_workers


class Caller:
    """One transcription's way to the model.

    Used by one thread at a time, but for `cancel`, which may be called from any.

    Parameters
    ----------
    dispatcher
        The model's.
    """

    def __init__(self, dispatcher: CallerDispatcher) -> None:
        self._dispatcher = dispatcher
        self._job: tuple[Job, _Answer] | None = None
        self._is_cancelled = False

    @property
    def model(self) -> Model:
        """The model."""
        return self._dispatcher.model

    def encode(self, features: NDArray[np.float32]) -> JobResult:
        """Encode windows of shape (windows, n_mels, frames), and rank their languages."""
        return self.decode(features, None, lambda _: [], None, 0, None)

    def decode(
        self,
        features: NDArray[np.float32],
        language: str | None,
        prompt: Callable[[str], list[int]],
        prompt_shape: Hashable,
        max_length: int,
        search: SearchOptions | None,
        encoding: ctranslate2.StorageView | None = None,
    ) -> JobResult:
        """Decode windows, together with those of other callers that may share a batch.

        Parameters
        ----------
        features, language, prompt, prompt_shape, max_length, search, encoding
            See `Job`.

        Raises
        ------
        CancelledError
            If it was cancelled, and the model had not begun with this.
        ModelError
            If CTranslate2 fails, or this process is a forked child.
        """
        answer = _Answer()
        job = Job(
            features.shape[2],
            features,
            language,
            prompt,
            prompt_shape,
            max_length,
            search,
            answer.put,
            answer.put,
            client=self,
            encoding=encoding,
        )
        dispatcher = self._dispatcher
        self._job = job, answer
        try:
            dispatcher.submit(job)
            if self._is_cancelled:  # perhaps before there was anything to take back
                self.cancel()
            dispatcher.work_until(lambda: answer.is_there)
        finally:
            self._job = None
            if not answer.is_there:  # this thread is interrupted
                dispatcher.cancel(job)
        return answer.get()

    def cancel(self) -> None:
        """Take back what the model has not begun with, and let nothing more be begun."""
        self._is_cancelled = True
        asked = self._job
        if asked is None:
            return
        job, answer = asked
        if self._dispatcher.cancel(job):
            answer.put(CancelledError("the transcription was cancelled"))
            self._dispatcher.wake()


def _most_windows(model: Model, frames: int) -> int:
    """Return how many windows of so many mel frames to decode at once."""
    device = model.whisper.device
    if device == "cpu" and not _shares_much(model, frames):
        return 1
    return model.fitting_batch(_MOST_WINDOWS[device], frames)


def _shares_much(model: Model, frames: int) -> bool:
    """Whether decoding gets cheaper in company, on a CPU.

    A step of the decoder reads the weights once for all windows of a batch, and the keys and values
    of its audio for each. In cache is what costs nothing to read again. So company pays where all
    of a batch's keys and values stay there, or where the weights that do not are more than they: at
    30 s, four windows of base with Whisper's vocabulary take 0.63 of the time that they take alone,
    but those of the embedded model 1.2 times as long, whereas at 10 s they take 0.6.
    """
    shape = model.shape
    if shape is None:
        return True
    weight_bytes, value_bytes = COMPUTE_TYPES[model.compute_type]
    d_model = shape.d_model
    # Self-attention 4, cross-attention 2 (its keys and values are there), the two linear layers 8.
    shared = (14 * shape.decoder_layers * d_model + shape.n_vocabulary) * d_model * weight_bytes
    positions = (frames + 1) // 2
    own = 2 * shape.decoder_layers * positions * d_model * value_bytes
    return _MOST_WINDOWS["cpu"] * own <= _CACHE_BYTES or shared - _CACHE_BYTES > own
