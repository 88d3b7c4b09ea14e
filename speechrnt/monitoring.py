"""What an operator sees of an engine: statistics, a report, and whether all is well.

Everything here is made from snapshots; nothing of it is asked for while the engine works.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, is_dataclass
from enum import Enum
from typing import Any

from ._gpu_types import GpuMemoryHealth
from ._sched_types import SchedulerStatistics
from .batching import DispatcherStatistics
from .handover import HandoverStatistics
from .inference_memory import InferenceMemory
from .latency import HistogramSnapshot
from .mempool import GpuInferenceMemory
from .pools import PoolStatistics
from .stream_registry import StreamStatistics
from .utterance import UtteranceStatistics

__all__ = [
    "EngineHealth",
    "EngineStatistics",
    "GpuStatistics",
    "HealthFacts",
    "as_json",
    "judge",
    "report",
]

MIB = 1 << 20

_MEMORY_BOUND = 0.9
_QUEUE_BOUND = 0.8


@dataclass(frozen=True)
class GpuStatistics:
    """What an engine has on a GPU.

    Attributes
    ----------
    device : int
        Number of the GPU.
    handover
        The features' way there, with the pools that they go through; None if that is CTranslate2's.
    inference
        CTranslate2's memory there, which all engines on this GPU share; None if it cannot be told.
    """

    device: int
    handover: HandoverStatistics | None
    inference: GpuInferenceMemory | None


@dataclass(frozen=True)
class EngineStatistics:
    """Counts since the engine was made; each part is consistent in itself.

    Attributes
    ----------
    total_memory_usage_mb : float
        MiB of memory that the process has resident, the model and everything else in it included.
    active_threads : int
        Threads of the engine: workers of the scheduler that take tasks, and of the model;
        0 after `close`.
    average_transcription_latency_ms : float
        From the call to the result, of completed one-shot requests.
    requests : Mapping of str to int
        One-shot requests: ``"accepted"``, and of those ``"completed"``, ``"failed"`` and
        ``"cancelled"``; ``"rejected"`` because too many were waiting.
    live : int
        Requests that wait or run.
    audio_in_s, audio_out_s : float
        Seconds of audio that one-shot requests have read, and of those that are completed. Those of
        streams are in `streams`.
    errors : Mapping of str to int
        Requests and streams that failed, by the class of the exception.
    stages : Mapping of str to HistogramSnapshot
        Of completed one-shot requests; see `StageTimings`. Those of single windows, also of
        streams, are in `utterances`.
    streams
        Streaming utterances.
    utterances, dispatcher, scheduler
        Windows, the model, and the work around it; no scheduler if there is none.
    audio_buffers, results
        The pools.
    inference_memory
        CTranslate2's memory on the CPU, which all engines of the process share.
    gpu
        Memory on the GPU; None if the model is not on one.
    """

    total_memory_usage_mb: float
    active_threads: int
    average_transcription_latency_ms: float
    requests: Mapping[str, int]
    live: int
    audio_in_s: float
    audio_out_s: float
    errors: Mapping[str, int]
    stages: Mapping[str, HistogramSnapshot]
    streams: StreamStatistics
    utterances: UtteranceStatistics
    dispatcher: DispatcherStatistics
    scheduler: SchedulerStatistics | None
    audio_buffers: PoolStatistics
    results: PoolStatistics
    inference_memory: InferenceMemory
    gpu: GpuStatistics | None

    @property
    def mean_batch_size(self) -> float:
        """Windows per call of the decoder; 0 before the first."""
        calls = sum(self.dispatcher.batch_sizes.values())
        return self._decoded_windows / calls if calls else 0.0

    @property
    def batch_fill(self) -> float:
        """Windows in calls of the decoder, as a share of what would have paid; 0 before any."""
        room = self.dispatcher.batch_room
        return self._decoded_windows / room if room else 0.0

    @property
    def sheds(self) -> Mapping[str, int]:
        """What was not taken or was dropped under load, by what it is.

        ``"requests"``, ``"streams"``, ``"chunks"`` of audio and ``"jobs"`` were refused with
        `Overloaded`; ``"partials"`` came too late to be worth the model's time or the caller's.
        """
        counts = self.streams.counts
        return {
            "requests": self.requests["rejected"],
            "streams": self.streams.refused,
            "chunks": counts["refused_chunks"],
            "partials": counts["expired_partials"] + counts["stale_partials"],
            "jobs": self.dispatcher.rejected,
        }

    @property
    def _decoded_windows(self) -> int:
        return sum(size * count for size, count in self.dispatcher.batch_sizes.items())


@dataclass(frozen=True)
class HealthFacts:
    """What health is judged by.

    Attributes
    ----------
    memory_use : Mapping of str to float
        Memory and pools in use, each as a share of its limit.
    queue_use : Mapping of str to float
        What waits, as a share of the most that may.
    oldest_wait_s, longest_call_s : float
        For how long the oldest job has waited for the model, and the longest call has run.
    stalled_workers : Mapping of int to float
        Workers of the scheduler that are at one task for too long, and for how long.
    stalled_streams : int
        Streams whose audio nothing comes of.
    gpu_pool : GpuMemoryHealth or None
        Of the pool on the GPU, fragmentation included; None if there is none.
    closed : bool
        Whether the engine is closed.
    probe : str or None
        Why a decoding just now failed; None if it did not, or was not asked for.
    """

    memory_use: Mapping[str, float]
    queue_use: Mapping[str, float]
    oldest_wait_s: float
    longest_call_s: float
    stalled_workers: Mapping[int, float]
    stalled_streams: int
    gpu_pool: GpuMemoryHealth | None
    closed: bool
    probe: str | None


@dataclass(frozen=True)
class EngineHealth:
    """Whether an engine can be trusted with more work.

    Attributes
    ----------
    ok : bool
        Nothing is wrong.
    problems : tuple of str
        What is wrong, a sentence each.
    facts
        What that was judged by.
    """

    ok: bool
    problems: tuple[str, ...]
    facts: HealthFacts


def judge(facts: HealthFacts, latency_bound_s: float) -> EngineHealth:
    """Say what is wrong.

    Parameters
    ----------
    facts
        How things stand.
    latency_bound_s
        For how long a job may wait for the model, and a call of it run.
    """
    problems = []
    if facts.closed:
        problems.append("The engine is closed.")
    for name, share in facts.memory_use.items():
        if share >= _MEMORY_BOUND:
            problems.append(f"{name}: {share:.0%} of the limit is in use.")
    for name, share in facts.queue_use.items():
        if share >= _QUEUE_BOUND:
            problems.append(f"{name}: {share:.0%} of the most allowed.")
    if facts.oldest_wait_s > latency_bound_s:
        problems.append(f"A job has waited for the model for {facts.oldest_wait_s:.1f} s.")
    if facts.longest_call_s > latency_bound_s:
        problems.append(f"A call of the model has run for {facts.longest_call_s:.1f} s.")
    for worker, seconds in facts.stalled_workers.items():
        problems.append(f"Worker {worker} has been at one task for {seconds:.1f} s.")
    if facts.stalled_streams:
        problems.append(f"{facts.stalled_streams} streams get no text for their audio.")
    if facts.gpu_pool is not None:
        problems += [f"GPU pool: {problem}." for problem in facts.gpu_pool.problems]
    if facts.probe is not None:
        problems.append(f"A decoding failed: {facts.probe}")
    return EngineHealth(not problems, tuple(problems), facts)


def as_json(statistics: EngineStatistics) -> str:
    """Return statistics as JSON: objects of numbers, by the names of the attributes."""
    return json.dumps(_plain(statistics), indent=2)


def _plain(value: Any) -> Any:
    if is_dataclass(value):
        return {name: _plain(getattr(value, name)) for name in _public(value)}
    if isinstance(value, Mapping):
        return {_name(key): _plain(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(each) for each in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _public(value: Any) -> list[str]:
    """Return the names of a dataclass's fields, and of what it computes of them."""
    computed = [name for name, each in vars(type(value)).items() if isinstance(each, property)]
    names = [*(field.name for field in fields(value)), *computed]
    return [name for name in names if not name.startswith("_")]


def _name(key: Any) -> str:
    return key.name.lower() if isinstance(key, Enum) else str(key)


def report(statistics: EngineStatistics) -> str:
    """Return statistics for reading, a line per subject."""
    s, streams, dispatcher = statistics, statistics.streams, statistics.dispatcher
    total = s.stages["total"]
    lines = [
        ("Memory", f"{s.total_memory_usage_mb:.0f} MiB resident; audio buffers "
         f"{_pool(s.audio_buffers)}; inference {_inference(s.inference_memory)}"),
        ("Threads", f"{s.active_threads}"),
        ("Requests", f"{_counts(s.requests)}, {s.live} live; "
         f"{_audio(s.audio_in_s, s.audio_out_s)}"),
        ("Latency", f"{_times(total)} (mean {s.average_transcription_latency_ms:.0f} ms)"),
        *((f"  {stage}", _times(times)) for stage, times in s.stages.items() if stage != "total"),
        ("Streams", f"{streams.open} open, {streams.started} started, {streams.refused} refused; "
         f"{streams.counts['finals']} finals, {streams.counts['partials']} partials, "
         f"{streams.counts['revised_finals']} revised; "
         f"{_audio(streams.audio_in_s, streams.audio_out_s)}"),
         ("  ended", _counts({name: streams.counts[name] for name in
                              ("finalized", "cancelled", "failed", "idle", "too_long")})),
        ("  to final text", _times(streams.ttfs)),
        ("  partial lag", _times(streams.partial_lag)),
        ("Windows", f"{s.utterances.windows}, of these {s.utterances.silent} silent, "
         f"{s.utterances.retried} decoded twice, {s.utterances.cut_off} cut off"),
        *((f"  {stage}", _times(times)) for stage, times in s.utterances.stages.items()),
        ("Model", f"{dispatcher.encode_s:.2f} s encoding, {dispatcher.decode_s:.2f} s decoding, "
         f"{s.mean_batch_size:.2f} windows a batch ({s.batch_fill:.0%} of what pays); "
         f"{sum(dispatcher.queued.values())} jobs queued, {dispatcher.running} running, "
         f"{dispatcher.expired} expired, {dispatcher.cancelled} cancelled, "
         f"{dispatcher.failed} failed"),
        ("Shed", _counts(s.sheds)),
    ]  # fmt: skip
    if s.gpu is not None:
        lines += _gpu_lines(s.gpu)
    if s.scheduler is not None:
        tasks = sum(s.scheduler.executed.values())
        busy = ", ".join(f"{worker.utilisation:.0%}" for worker in s.scheduler.workers)
        queued = sum(s.scheduler.queued.values())
        lines.append(
            ("Scheduler", f"{tasks} tasks, {s.scheduler.stolen} stolen, {queued} queued; "
             f"awake {busy}")
        )  # fmt: skip
    if s.errors:
        lines.append(("Errors", _counts(s.errors)))
    width = max(len(name) for name, _ in lines) + 2
    return "\n".join(f"{name:{width}}{text}" for name, text in lines)


def _gpu_lines(gpu: GpuStatistics) -> Iterable[tuple[str, str]]:
    name = f"GPU {gpu.device}"
    if gpu.inference is not None:
        memory = gpu.inference
        yield (
            name,
            f"inference {memory.in_use / MIB:.0f} of {memory.reserved / MIB:.0f} MiB in use",
        )
    if gpu.handover is not None:
        pool = gpu.handover.pool
        yield (
            f"{name} pool",
            f"{pool.describe()}; fragmentation {pool.fragmentation:.0%}, "
            f"utilisation {pool.utilisation:.0%}; {gpu.handover.handed_over} batches, "
            f"{gpu.handover.fallbacks} past it; page-locked {_pool(gpu.handover.staging)}",
        )


def _counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {name.replace('_', ' ')}" for name, count in counts.items())


def _audio(in_s: float, out_s: float) -> str:
    return f"{in_s:.1f} s of audio in, {out_s:.1f} s out"


def _pool(pool: PoolStatistics) -> str:
    return (
        f"{pool.in_use} in use, {pool.idle} idle, {pool.reserved_bytes / MIB:.1f} MiB, "
        f"hit rate {pool.hit_rate:.0%}"
    )


def _inference(memory: InferenceMemory) -> str:
    if not memory.limit:
        return "not pooled"
    return f"{memory.in_use / MIB:.0f} of {memory.reserved / MIB:.0f} MiB in use"


def _milliseconds(seconds: float) -> str:
    value = seconds * 1e3
    if math.isinf(value):
        return "over an hour"
    return f"{value:.0f} ms" if value >= 100 else f"{value:.3g} ms"  # which would be 1.2e+03


def _times(times: HistogramSnapshot) -> str:
    if not times.count:
        return "-"
    percentiles = (times.p50_s, times.p90_s, times.p99_s)
    shown = ", ".join(
        f"p{share} {_milliseconds(seconds)}"
        for share, seconds in zip((50, 90, 99), percentiles, strict=True)
    )
    return f"{shown} of {times.count}"
