"""The engine: many requests on one model, in one process."""

from __future__ import annotations

import asyncio
import atexit
import logging
import os
import threading
import time
import weakref
from collections import Counter
from collections.abc import Callable, Hashable, Mapping
from concurrent.futures import CancelledError, Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from dataclasses import fields
from functools import lru_cache, partial
from numbers import Real
from os import PathLike
from types import TracebackType
from typing import Any, Literal

import numpy as np
from typing_extensions import Self

from . import inference_memory, mempool
from ._sched import Priority, Scheduler
from .audio import SAMPLE_RATE, AudioInput
from .batch_sizes import BatchSizes, Costs
from .batching import Dispatcher
from .config import (
    HardwareProfile,
    OptimizationConfig,
    detect_hardware,
    free_gpu_bytes,
    recommend,
)
from .errors import ModelError, OptionError, Overloaded, SpeechRNTError
from .events import Event
from .executor import Executor, InlineExecutor, SchedulerExecutor
from .latency import STAGES, Histogram
from .maintenance import Maintainable, Maintenance, maintain_on
from .models import DEFAULT_MODEL, Model, load_model, resolve_device
from .monitoring import (
    MIB,
    EngineHealth,
    EngineStatistics,
    GpuStatistics,
    HealthFacts,
    as_json,
    judge,
    report,
)
from .oneshot import Request
from .pcm import AudioChunk
from .plan import Plan, UtteranceOptions, make_plan
from .pools import AudioBufferPool, PoolLimits, TranscriptionResultPool
from .stream_registry import StreamRegistry
from .stream_types import STREAM_OPTIONS, Pressure, StreamOptions
from .streaming import Stream
from .system import resident_memory, usable_cores, usable_memory
from .transcript import Transcription
from .utterance import UtterancePipeline
from .vad import VoiceActivityDetector

__all__ = ["EngineStatistics", "OptimizedSTTFactory", "PerformanceOptimizedSTT"]

logger = logging.getLogger("speechrnt")

# A window's model job is bounded; this many of them keep the model busy from one utterance alone.
_BATCHES_IN_FLIGHT = 2

# Buffers that an utterance holds beside the features of those: its audio, and windows that were cut
# with the last of them. And the most that a pool can have.
_OTHER_BUFFERS = 8
_MOST_BUFFERS = 1 << 19

_PLANS_CACHED = 256

_engines: weakref.WeakSet[PerformanceOptimizedSTT] = weakref.WeakSet()


def _close_all() -> None:
    for engine in list(_engines):
        engine.close()


atexit.register(_close_all)


def _abandon(
    process: int,
    dispatcher: Dispatcher,
    scheduler: Scheduler | None,
    maintenance: Maintenance | None,
) -> None:
    """Let the threads of an engine end that nobody refers to; called at any time, by any thread."""
    if os.getpid() != process:
        return
    dispatcher.close(wait=False)
    if maintenance is not None:
        maintenance.close()
    if scheduler is not None:
        scheduler.shutdown(wait=False)


class PerformanceOptimizedSTT:
    """An engine: one model, and all that serves many requests on it at the same time.

    All methods may be called from any thread. The engine belongs to its process: in a forked child
    it raises `ModelError`. An engine that is not closed is when the interpreter exits, after the
    requests that are under way; one that nothing refers to ends by itself.

    Parameters
    ----------
    config
        Sizes and switches; by default what suits most machines. `OptimizedSTTFactory` fits them to
        this one.
    model
        See `load_model`.
    device, compute_type, device_index, **load_options
        See `load_model`. How many calls run at the same time, and with how many threads, is
        for `config` to say.

    Raises
    ------
    ModelError, OptionError
        See `load_model`.

    Examples
    --------
    >>> with PerformanceOptimizedSTT() as stt:
    ...     future = stt.transcribe_async("recording.wav", "en")
    ...     print(future.result().text)
    """

    def __init__(
        self,
        config: OptimizationConfig | None = None,
        model: str | PathLike[str] = DEFAULT_MODEL,
        *,
        device: str = "auto",
        compute_type: str = "default",
        device_index: int = 0,
        **load_options: Any,
    ) -> None:
        if config is None:
            config = OptimizationConfig()
        if not isinstance(config, OptimizationConfig):
            raise OptionError(f"config: must be an OptimizationConfig, not {config!r}")
        for option in ("num_workers", "cpu_threads"):
            if option in load_options:
                raise OptionError(
                    f"{option}: give the config's model_workers and cpu_threads instead"
                )
        self.config = config
        device = resolve_device(device)
        cores = usable_cores()
        workers, threads = config.model_threads(device, cores)
        place = "cpu" if device == "cpu" else f"cuda:{device_index}"
        if not config.retain_inference_memory:
            inference_memory.configure("off", device=place)
        if device == "cuda":
            load_options["gpu_pool_bytes"] = config.gpu_pool_bytes(free_gpu_bytes(device_index))
        self.model: Model = load_model(
            model,
            device,
            compute_type,
            device_index=device_index,
            num_workers=workers,
            cpu_threads=threads,
            **load_options,
        )
        self._process = os.getpid()
        self._changed = threading.Condition()
        # Guarded by _changed.
        self._live: set[Request] = set()
        self._n_live = 0  # with those that are being made
        self._counts: Counter[str] = Counter()
        self._audio_in_s = self._audio_out_s = 0.0
        self._errors: Counter[str] = Counter()
        self._is_closed = False
        self._is_cancelled = False  # when it was closed
        self._has_ended = False  # after that, with all its threads

        self._stages = {stage: Histogram() for stage in STAGES}
        windows_in_flight = _BATCHES_IN_FLIGHT * config.max_batch_size
        utterances = config.max_queued_requests + config.max_concurrent_utterances
        most_buffers = utterances * (windows_in_flight + _OTHER_BUFFERS) + 2 * workers
        self._buffers = AudioBufferPool(
            PoolLimits(
                soft_size=config.audio_buffer_pool_size,
                max_size=min(max(most_buffers, config.audio_buffer_pool_size), _MOST_BUFFERS),
            )
        )
        self._results = TranscriptionResultPool(
            PoolLimits(
                soft_size=config.result_records,
                max_size=max(utterances, config.result_records),
                overflow="allocate",  # where threads have idle ones in their caches
            )
        )
        self._scheduler: Scheduler | None = None
        executor: Executor = InlineExecutor()
        if config.enable_async_processing:
            self._scheduler = Scheduler(
                config.thread_pool_size or cores,
                stealing=config.enable_work_stealing,
                stall_after=config.stall_after_s,
            )
            executor = SchedulerExecutor(self._scheduler)
        # Nothing below refers to the engine, which would never be collected.
        fitting_batch = partial(self.model.fitting_batch, config.max_batch_size)
        self._sizes = BatchSizes(config.max_batch_size, fitting_batch, device)
        self._dispatcher = Dispatcher(
            self.model,
            workers,
            self._sizes,
            self._buffers,
            executor,
            max_queued=windows_in_flight * utterances,
        )
        self._pipeline = UtterancePipeline(
            self.model,
            self._dispatcher,
            executor,
            self._scheduler,
            self._buffers,
            self._results,
            windows_in_flight,
        )
        self._plan = lru_cache(_PLANS_CACHED)(partial(make_plan, self.model))
        self._streams = StreamRegistry(
            config.max_concurrent_utterances, self._dispatcher, config.stall_after_s
        )
        self._maintenance: Maintenance | None = None
        if self._scheduler is not None:
            maintained: list[Maintainable] = [
                self._buffers,
                self._results,
                self._streams,
                inference_memory,
            ]
            if self.model.handover is not None:
                maintained.append(self.model.handover)
            self._maintenance = maintain_on(self._scheduler, maintained, config.cleanup_interval_s)
        self._finalizer = weakref.finalize(
            self, _abandon, self._process, self._dispatcher, self._scheduler, self._maintenance
        )
        self._finalizer.atexit = False  # `_close_all` comes then
        _engines.add(self)

    def transcribe_async(
        self,
        audio: AudioInput,
        language: str | None = None,
        *,
        priority: Priority = Priority.NORMAL,
        deadline: float | None = None,
        client: Hashable | None = None,
        **options: Any,
    ) -> Future[Transcription]:
        """Transcribe a recording of any length.

        Parameters
        ----------
        audio
            See `load_audio`. Files are read later, arrays and bytes before this returns.
        language
            Code such as ``"en"``; None detects it.
        priority
            Before or after what else is waiting.
        deadline
            Seconds within which the model must have come to each part; later is an error.
        client
            On whose behalf: clients share the model evenly, however much each one asks for.
            Requests without one are clients of their own.
        **options
            See `UtteranceOptions`.

        Returns
        -------
        Future of Transcription
            Its callbacks run on a worker and must not block. Cancelling it takes back what the
            model has not begun with. It fails with `AudioError` for files that cannot be read,
            `DeadlineExceeded`, or `ModelError`.

        Raises
        ------
        AudioError
            If what was given is no audio.
        OptionError
            If an option is unknown or out of range.
        Overloaded
            If as many requests are under way as may; it says when to try again.
        ModelError
            If the engine is closed, or belongs to the parent process.
        """
        self._check_process()
        plan = self._checked_plan(language, options)
        priority = self._checked_priority(priority)
        if deadline is not None:
            deadline = time.monotonic() + _checked_seconds("deadline", deadline)
        try:
            hash(client)
        except TypeError as error:
            raise OptionError(f"client: must be hashable, which {client!r} is not") from error
        with self._changed:
            self._check_open()
            if self._n_live >= self.config.max_queued_requests:
                self._counts["rejected"] += 1
                raise Overloaded(
                    f"{self._n_live} requests are under way, the most allowed",
                    self._dispatcher.retry_after_s(),
                )
            self._n_live += 1
        try:
            request = Request(
                self._pipeline,
                plan,
                audio,
                on_over=self._note_over,
                on_read=self._note_read,
                priority=priority,
                deadline=deadline,
                client=client,
            )
        except BaseException:
            with self._changed:
                self._n_live -= 1
                self._changed.notify_all()
            raise
        with self._changed:
            self._live.add(request)
            self._counts["accepted"] += 1
            is_cancelled = self._is_cancelled
        request.read()
        if is_cancelled:  # by who closes the engine, and did not see this request yet
            request.future.cancel()
        return request.future

    async def transcribe(
        self, audio: AudioInput, language: str | None = None, **options: Any
    ) -> Transcription:
        """Transcribe a recording of any length, from a coroutine.

        Parameters, results and errors are those of `transcribe_async`. Cancelling the coroutine
        cancels the request.
        """
        return await asyncio.wrap_future(self.transcribe_async(audio, language, **options))

    def stream(
        self,
        utterance_id: str | None = None,
        *,
        callback: Callable[[Event], object] | None = None,
        language: str | None = None,
        sample_rate: int = SAMPLE_RATE,
        encoding: str = "s16",
        priority: Priority = Priority.NORMAL,
        **options: Any,
    ) -> Stream:
        """Start a streaming utterance.

        Parameters
        ----------
        utterance_id
            Its name, which no other open stream has; None makes one up.
        callback
            Called with each event (see `speechrnt.events`), one at a time, by a thread that is
            neither the model's nor the scheduler's. Without it, the events come from ``async for``.
        language
            Code such as ``"en"``; None detects it.
        sample_rate, encoding
            Of what will be pushed. See `PcmReader`.
        priority
            Of its finals; partials are a level below.
        **options
            See `UtteranceOptions` and `StreamOptions`.

        Raises
        ------
        OptionError
            If an option is unknown or out of range.
        InvalidAudioError
            If the rate or the encoding is none.
        UtteranceError
            If a stream of this name is open.
        Overloaded
            If as many streams are open as may, or the model is too far behind.
        ModelError
            If the engine is closed, or belongs to the parent process.
        """
        self._check_process()
        if callback is not None and not callable(callback):
            raise OptionError(f"callback: must be callable, which {callback!r} is not")
        stream_options = {name: options.pop(name) for name in options.keys() & STREAM_OPTIONS}
        plan = self._checked_plan(language, options)
        return self._streams.start(
            utterance_id,
            lambda name: Stream(
                name,
                self._pipeline,
                plan,
                StreamOptions(**stream_options),
                counters=self._streams.counters,
                threads=self._streams.threads,
                on_over=self._streams.forget,
                make_plan=self._remake_plan,
                callback=callback,
                sample_rate=sample_rate,
                encoding=encoding,
                priority=self._checked_priority(priority),
            ),
        )

    def start_streaming_transcription(
        self,
        utterance_id: str,
        callback: Callable[[Event], object],
        language: str | None = None,
        **options: Any,
    ) -> Stream:
        """Start a streaming utterance whose events go to a callback; see `stream`."""
        if not callable(callback):
            raise OptionError(f"callback: must be callable, which {callback!r} is not")
        return self.stream(utterance_id, callback=callback, language=language, **options)

    def add_audio_chunk(self, utterance_id: str, chunk: AudioChunk) -> Pressure:
        """Push audio to an open stream; see `Stream.push`.

        Raises
        ------
        UtteranceError
            If there is no such stream.
        """
        self._check_process()
        return self._streams.get(utterance_id).push(chunk)

    def finalize_streaming_transcription(self, utterance_id: str) -> Future[Transcription]:
        """Finalize an open stream; see `Stream.finalize`.

        Raises
        ------
        UtteranceError
            If there is no such stream.
        """
        self._check_process()
        return self._streams.get(utterance_id).finalize()

    def warm_up(self, **options: Any) -> None:
        """Measure which batch sizes pay, and touch what the first request would wait for.

        Takes a few seconds with small models, and as long as two dozen calls with others. Without
        it the engine assumes what holds on most machines. Requests may come meanwhile, but disturb
        what is measured.

        Parameters
        ----------
        **options
            What most requests will ask for; see `UtteranceOptions`.

        Raises
        ------
        OptionError
            If an option is unknown or out of range.
        ModelError
            If the engine is closed, or belongs to the parent process.
        """
        self._check_process()
        with self._changed:
            self._check_open()
        plan = self._checked_plan(options.pop("language", None), options)
        for frames in plan.contexts:
            self._dispatcher.measure(frames, plan.search)
        VoiceActivityDetector()

    def get_performance_statistics(self) -> EngineStatistics:
        """Return what was counted so far.

        Raises
        ------
        ModelError
            If the engine belongs to the parent process.
        """
        self._check_process()
        with self._changed:
            counts = {name: self._counts[name] for name in _COUNTS}
            live, errors = self._n_live, self._errors.copy()
            audio_in_s, audio_out_s = self._audio_in_s, self._audio_out_s
        streams = self._streams.statistics()
        errors.update(streams.errors)
        stages = {stage: histogram.snapshot() for stage, histogram in self._stages.items()}
        total = stages["total"]
        scheduler = None if self._scheduler is None else self._scheduler.statistics()
        threads = 0
        if not self._has_ended:
            threads = self.model.whisper.num_workers + (0 if scheduler is None else scheduler.size)
        return EngineStatistics(
            total_memory_usage_mb=resident_memory() / MIB,
            active_threads=threads,
            average_transcription_latency_ms=1e3 * total.sum_s / max(total.count, 1),
            requests=counts,
            live=live,
            audio_in_s=audio_in_s,
            audio_out_s=audio_out_s,
            errors=dict(errors),
            stages=stages,
            streams=streams,
            utterances=self._pipeline.statistics(),
            dispatcher=self._dispatcher.statistics(),
            scheduler=scheduler,
            audio_buffers=self._buffers.statistics(),
            results=self._results.statistics(),
            inference_memory=inference_memory.statistics(),
            gpu=self._gpu_statistics(),
        )

    statistics = get_performance_statistics

    def get_performance_report(self, form: Literal["text", "json"] = "text") -> str:
        """Return the statistics for reading, or as JSON.

        Raises
        ------
        OptionError
            If the form is neither.
        """
        if form == "text":
            return report(self.get_performance_statistics())
        if form == "json":
            return as_json(self.get_performance_statistics())
        raise OptionError(f"form: must be 'text' or 'json', not {form!r}")

    def health(self, latency_bound_s: float = 10.0, probe_s: float | None = None) -> EngineHealth:
        """Judge whether the engine can be trusted with more work.

        Parameters
        ----------
        latency_bound_s
            For how long a job may wait for the model, and a call of it run.
        probe_s
            Decode a second of noise now, and give it so many seconds. None: do not.

        Raises
        ------
        OptionError
            If a number of seconds is none.
        ModelError
            If the engine belongs to the parent process.
        RuntimeError
            The caller is a callback of a future, whose thread the decoding may need.
        """
        self._check_process()
        bound_s = _checked_seconds("latency_bound_s", latency_bound_s)
        if probe_s is not None:
            probe_s = _checked_seconds("probe_s", probe_s)
            if self._is_needed_thread():
                raise RuntimeError(
                    "a callback cannot wait for a decoding, which may need its thread"
                )
        oldest_wait_s, longest_call_s = self._dispatcher.delays()
        inference = inference_memory.statistics()
        memory = {
            "memory of the process": resident_memory() / usable_memory(),
            "inference memory": inference.in_use / inference.limit if inference.limit else 0.0,
            "audio buffers": self._buffers.health().utilisation,
            "results": self._results.health().utilisation,
        }
        on_gpu, handover = self._gpu_statistics(), self.model.handover
        if on_gpu is not None and on_gpu.inference is not None and on_gpu.inference.limit:
            memory["inference memory on the GPU"] = on_gpu.inference.in_use / on_gpu.inference.limit
        if handover is not None:
            memory["page-locked memory"] = handover.staging_use
        queues = {
            "requests under way": self._n_live / self.config.max_queued_requests,
            "open streams": self._streams.use,
            "jobs waiting for the model": self._dispatcher.queue_use,
        }
        stalled_workers: Mapping[int, float] = {}
        if self._scheduler is not None:
            scheduler = self._scheduler.health()
            queues["tasks waiting for a worker"] = scheduler.queue_use
            stalled_workers = scheduler.stalled
        probe = None
        if probe_s is not None and not self._is_closed:
            probe = self._probe(probe_s)
        facts = HealthFacts(
            memory_use=memory,
            queue_use=queues,
            oldest_wait_s=oldest_wait_s,
            longest_call_s=longest_call_s,
            stalled_workers=stalled_workers,
            stalled_streams=self._streams.stalled,
            gpu_pool=None if handover is None else handover.health(),
            closed=self._is_closed,
            probe=probe,
        )
        return judge(facts, bound_s)

    def _gpu_statistics(self) -> GpuStatistics | None:
        whisper, handover = self.model.whisper, self.model.handover
        if handover is None and whisper.device != "cuda":
            return None
        device = whisper.device_index[0] if handover is None else handover.device
        inference = None
        try:
            inference = mempool.inference_memory(device)
        except SpeechRNTError as error:
            logger.debug("GPU %d: nothing is known of CTranslate2's memory: %s", device, error)
        return GpuStatistics(device, None if handover is None else handover.statistics(), inference)

    def is_system_healthy(self) -> bool:
        """Whether nothing is wrong; `health` says what is."""
        return self.health().ok

    def _probe(self, timeout_s: float) -> str | None:
        """Decode something, and return why it failed."""
        noise = np.random.default_rng(0).uniform(-0.01, 0.01, SAMPLE_RATE).astype(np.float32)
        language = self.model.tokenizer.languages[0]
        try:
            future = self.transcribe_async(
                noise, language, priority=Priority.CRITICAL, vad=False, beam_size=1
            )
        except SpeechRNTError as error:
            return str(error)
        try:
            future.result(timeout_s)
        except FutureTimeoutError:  # not the built-in one before Python 3.11
            future.cancel()
            return f"it was not done within {timeout_s} s"
        except CancelledError:
            return "it was cancelled, as the engine is being closed"
        except SpeechRNTError as error:
            return str(error)
        return None

    @property
    def costs(self) -> Mapping[int, Costs]:
        """What `warm_up` measured, by mel frames of context."""
        return self._sizes.costs

    def close(self, cancel: bool = False) -> None:
        """Accept nothing more, wait for what is under way, and end all threads.

        May be called again, and by several threads. In a forked child it does nothing.

        Parameters
        ----------
        cancel
            Cancel what is under way; calls of the model that have begun are waited for.

        Raises
        ------
        RuntimeError
            The caller is a callback of a future, which the engine would wait for. Nothing changed.
        """
        if os.getpid() != self._process:
            return
        if self._is_own_thread():
            raise RuntimeError("a callback cannot close the engine, which waits for it to end")
        with self._changed:
            self._is_closed = True
            self._is_cancelled |= cancel
            live = list(self._live)
        if cancel:
            for request in live:
                request.future.cancel()
        self._streams.close(cancel)
        with self._changed:
            self._changed.wait_for(lambda: not self._n_live)
        self._dispatcher.close()
        if self._maintenance is not None:
            self._maintenance.close()
        if self._scheduler is not None:
            self._scheduler.shutdown()
        self._buffers.close()
        self._results.close()
        self._has_ended = True

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc_value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        # Whoever leaves by an exception does not wait for results.
        self.close(cancel=exc_type is not None)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc_value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await asyncio.to_thread(self.close, exc_type is not None)

    def _is_own_thread(self) -> bool:
        return self._is_needed_thread() or self._streams.is_callback()

    def _is_needed_thread(self) -> bool:
        """Whether requests may need the calling thread to come to their end."""
        return self._dispatcher.is_worker() or (
            self._scheduler is not None and self._scheduler.is_worker()
        )

    def _remake_plan(self, options: Mapping[str, Any]) -> Plan:
        options = dict(options)
        return self._checked_plan(options.pop("language"), options)

    def _check_process(self) -> None:
        # Before any lock, which another thread may have held at the fork.
        if os.getpid() != self._process:
            raise ModelError(
                f"{self.model.name}: this engine belongs to the parent process and does not work "
                "in a forked child; start processes with the 'spawn' method, an engine in each"
            )

    def _check_open(self) -> None:
        if self._is_closed:
            raise ModelError(f"{self.model.name}: the engine is closed")

    def _checked_plan(self, language: str | None, options: Mapping[str, Any]) -> Plan:
        unknown = options.keys() - _OPTIONS
        if unknown:
            raise OptionError(
                f"{', '.join(sorted(unknown))}: no such option; there are "
                f"{', '.join(sorted(_OPTIONS))}"
            )
        return self._plan(UtteranceOptions(language=language, **options))

    def _checked_priority(self, priority: Priority) -> Priority:
        try:
            priority = Priority(priority)
        except ValueError:
            raise OptionError(f"priority: must be a Priority, not {priority!r}") from None
        return priority if self.config.enable_priority_scheduling else Priority.NORMAL

    def _note_read(self, duration_s: float) -> None:
        with self._changed:
            self._audio_in_s += duration_s

    def _note_over(self, request: Request) -> None:
        """Count a request that holds nothing any more, before its future tells."""
        if request.outcome == "completed":
            for stage, histogram in self._stages.items():
                histogram.add(getattr(request.timings, stage))
        with self._changed:
            self._live.discard(request)
            self._n_live -= 1
            self._counts[request.outcome] += 1
            if request.error is not None:
                self._errors[type(request.error).__name__] += 1
            if request.outcome == "completed":
                self._audio_out_s += request.duration
            self._changed.notify_all()


_COUNTS = ("accepted", "completed", "failed", "cancelled", "rejected")
_OPTIONS = frozenset(field.name for field in fields(UtteranceOptions)) - {"language"}


def _checked_seconds(name: str, value: object) -> float:
    most = threading.TIMEOUT_MAX  # beyond which nothing can be waited for
    if (
        isinstance(value, Real)
        and not isinstance(value, bool)
        and value <= most  # as it is: an integer may be too large for a float
        and not value <= 0
    ):
        return float(value)
    raise OptionError(
        f"{name}: must be a positive number of seconds, at most {most:.0f}, not {value!r}"
    )


class OptimizedSTTFactory:
    """Makes engines that suit the machine."""

    @staticmethod
    def detect_hardware() -> HardwareProfile:
        """Return what this process can use of the machine."""
        return detect_hardware()

    @staticmethod
    def recommended_config(hardware: HardwareProfile | None = None) -> OptimizationConfig:
        """Return the configuration for some hardware, by default for this machine's."""
        return recommend(detect_hardware() if hardware is None else hardware)

    @staticmethod
    def create_optimized(
        config: OptimizationConfig | None = None,
        model: str | PathLike[str] = DEFAULT_MODEL,
        **options: Any,
    ) -> PerformanceOptimizedSTT:
        """Make an engine, configured for this machine unless a configuration is given.

        Parameters and errors are those of `PerformanceOptimizedSTT`.
        """
        if config is None:
            config = OptimizedSTTFactory.recommended_config()
        return PerformanceOptimizedSTT(config, model, **options)
