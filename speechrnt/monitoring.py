"""What an operator sees of an engine: statistics, a report, and whether all is well.

Everything here is made from snapshots; nothing of it is asked for while the engine works.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from enum import Enum
from typing import Any

from ._sched_types import SchedulerStatistics
from .batching import DispatcherStatistics
from .inference_memory import InferenceMemory
from .latency import HistogramSnapshot
from .pools import PoolStatistics
from .stream_registry import StreamStatistics
from .utterance import UtteranceStatistics

__all__ = ["EngineHealth", "EngineStatistics", "HealthFacts", "as_json", "judge", "report"]

MIB = 1 << 20

_MEMORY_BOUND = 0.9
_QUEUE_BOUND = 0.8
_FRAGMENTATION_BOUND = 0.25
# Fragmentation matters where so much of the reserved memory is free.
_FRAGMENTED_FREE_SHARE = 0.1


@dataclass(frozen=True)
class EngineStatistics:
    """Counts since the engine was made; each part is consistent in itself.

    Attributes
    ----------
    total_memory_usage_mb : float
        MiB of memory that the process has resident, the model and everything else in it included.
    active_threads : int
        Threads of the engine: workers of the scheduler that take tasks, and of the model.
    average_transcription_latency_ms : float
        From the call to the result, of completed one-shot requests.
    requests : Mapping of str to int
        One-shot requests: ``"accepted"``, and of those ``"completed"``, ``"failed"`` and
        ``"cancelled"``; ``"rejected"`` because too many were waiting.
    live : int
        Requests that wait or run.
    audio_s : float
        Seconds of audio in completed requests.
    errors : Mapping of str to int
        Requests and streams that failed, by the class of the exception.
    stages : Mapping of str to HistogramSnapshot
        Of completed requests; see `StageTimings`.
    streams
        Streaming utterances.
    utterances, dispatcher, scheduler
        Windows, the model, and the work around it; no scheduler if there is none.
    audio_buffers, results
        The pools.
    inference_memory
        CTranslate2's memory on the CPU, which all engines of the process share.
    """

    total_memory_usage_mb: float
    active_threads: int
    average_transcription_latency_ms: float
    requests: Mapping[str, int]
    live: int
    audio_s: float
    errors: Mapping[str, int]
    stages: Mapping[str, HistogramSnapshot]
    streams: StreamStatistics
    utterances: UtteranceStatistics
    dispatcher: DispatcherStatistics
    scheduler: SchedulerStatistics | None
    audio_buffers: PoolStatistics
    results: PoolStatistics
    inference_memory: InferenceMemory

    @property
    def mean_batch_size(self) -> float:
        """Windows per call of the decoder; 0 before the first."""
        calls = sum(self.dispatcher.batch_sizes.values())
        windows = sum(size * count for size, count in self.dispatcher.batch_sizes.items())
        return windows / calls if calls else 0.0


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
    fragmentation, free_share : float or None
        Of the GPU's pool: ``1 - largest_free / free``, and free memory as a share of the reserved.
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
    fragmentation: float | None
    free_share: float | None
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
    if (
        facts.fragmentation is not None
        and facts.fragmentation > _FRAGMENTATION_BOUND
        and (facts.free_share or 0) > _FRAGMENTED_FREE_SHARE
    ):
        problems.append(f"The GPU's memory is fragmented: {facts.fragmentation:.0%}.")
    if facts.probe is not None:
        problems.append(f"A decoding failed: {facts.probe}")
    return EngineHealth(not problems, tuple(problems), facts)


def as_json(statistics: EngineStatistics) -> str:
    """Return statistics as JSON: objects of numbers, by the names of the attributes."""
    return json.dumps(_plain(asdict(statistics)), indent=2)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {_name(key): _plain(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(each) for each in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


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
        ("Requests", ", ".join(f"{count} {name}" for name, count in s.requests.items())
         + f", {s.live} live; {s.audio_s:.1f} s of audio"),
        ("Latency", f"{_times(total)} (mean {s.average_transcription_latency_ms:.0f} ms)"),
        *((f"  {stage}", _times(times)) for stage, times in s.stages.items() if stage != "total"),
        ("Streams", f"{streams.open} open, {streams.started} started, {streams.refused} refused; "
         f"{streams.counts['finals']} finals, {streams.counts['partials']} partials, "
         f"{streams.counts['revised_finals']} revised"),
        ("  to final text", _times(streams.ttfs)),
        ("  partial lag", _times(streams.partial_lag)),
        ("Windows", f"{s.utterances.windows}, of these {s.utterances.silent} silent, "
         f"{s.utterances.retried} decoded twice, {s.utterances.cut_off} cut off"),
        ("Model", f"{dispatcher.encode_s:.2f} s encoding, {dispatcher.decode_s:.2f} s decoding, "
         f"{s.mean_batch_size:.2f} windows a batch; {sum(dispatcher.queued.values())} jobs queued, "
         f"{dispatcher.running} running, {dispatcher.expired} expired, "
         f"{dispatcher.cancelled} cancelled, {dispatcher.failed} failed"),
    ]  # fmt: skip
    if s.scheduler is not None:
        tasks = sum(s.scheduler.executed.values())
        busy = ", ".join(f"{worker.utilisation:.0%}" for worker in s.scheduler.workers)
        lines.append(("Scheduler", f"{tasks} tasks, {s.scheduler.stolen} stolen; awake {busy}"))
    if s.errors:
        lines.append(("Errors", ", ".join(f"{n} {name}" for name, n in s.errors.items())))
    width = max(len(name) for name, _ in lines) + 2
    return "\n".join(f"{name:{width}}{text}" for name, text in lines)


def _pool(pool: PoolStatistics) -> str:
    return (
        f"{pool.in_use} in use, {pool.idle} idle, {pool.reserved_bytes / MIB:.1f} MiB, "
        f"hit rate {pool.hit_rate:.0%}"
    )


def _inference(memory: InferenceMemory) -> str:
    if not memory.limit:
        return "not pooled"
    return f"{memory.in_use / MIB:.0f} of {memory.reserved / MIB:.0f} MiB in use"


def _times(times: HistogramSnapshot) -> str:
    if not times.count:
        return "-"
    percentiles = (times.p50_s, times.p90_s, times.p99_s)
    shown = ", ".join(
        f"p{share} {seconds * 1e3:.3g} ms"
        for share, seconds in zip((50, 90, 99), percentiles, strict=True)
    )
    return f"{shown} of {times.count}"
