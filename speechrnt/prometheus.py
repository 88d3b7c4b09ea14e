"""Engines' statistics for Prometheus; needs the extra ``prometheus``.

>>> from prometheus_client import REGISTRY, start_http_server
>>> REGISTRY.register(EngineCollector(stt))
>>> start_http_server(9090)
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping
from typing import Protocol

from prometheus_client.core import Metric
from prometheus_client.registry import Collector

from .errors import ModelError, OptionError
from .latency import HistogramSnapshot
from .monitoring import MIB, EngineStatistics, GpuStatistics

__all__ = ["EngineCollector"]


# Always the same, as queries need. Doublings of a microsecond, from half a millisecond to two
# minutes, are limits of the statistics' own buckets, too, so that every count is exact.
_BOUNDS_S = tuple(1e-6 * 2**octave for octave in range(9, 28))

# Name without its prefix, type, and what it is.
_FAMILIES = (
    ("memory_resident_bytes", "gauge", "Memory of the process."),
    ("threads", "gauge", "Workers of the scheduler and the model."),
    ("requests", "counter", "One-shot requests."),
    ("requests_live", "gauge", "One-shot requests that wait or run."),
    ("audio_seconds", "counter", "Audio that was taken, and that was transcribed."),
    ("sheds", "counter", "What was not taken, or was dropped, under load."),
    ("errors", "counter", "Failures."),
    ("stage_seconds", "histogram", "Time of the stages of requests."),
    ("window_seconds", "histogram", "Time of the stages of windows."),
    ("streams_open", "gauge", "Streams that are not closed."),
    ("streams_started", "counter", "Streams that were started."),
    ("streams_refused", "counter", "Streams that were refused."),
    ("stream_events", "counter", "What happened to streams."),
    ("ttfs_seconds", "histogram", "From the end of speech to its final text."),
    ("partial_lag_seconds", "histogram", "From audio to the partial with it."),
    ("queue_jobs", "gauge", "Windows that wait for the model."),
    ("jobs", "counter", "Windows for the model."),
    ("batches", "counter", "Calls of the decoder."),
    ("batch_room", "counter", "Windows that would have paid in those."),
    ("model_seconds", "counter", "Time in calls of the model."),
    ("windows_retried", "counter", "Windows decoded twice."),
    ("pool_in_use", "gauge", "Objects in use."),
    ("pool_reserved_bytes", "gauge", "Memory of the pool."),
    ("pool_acquires", "counter", "What was acquired."),
    ("gpu_memory_bytes", "gauge", "Memory on the GPU."),
    ("gpu_fragmentation_ratio", "gauge", "Free memory outside the largest hole."),
    ("gpu_utilisation_ratio", "gauge", "Memory in use of the reserved."),
    ("gpu_ooms", "counter", "Requests for GPU memory that failed."),
    ("gpu_defragmentations", "counter", "Times that free memory was moved together."),
    ("gpu_batches", "counter", "Batches that went through the pool."),
    ("gpu_fallbacks", "counter", "Batches that went CTranslate2's way."),
    ("tasks", "counter", "Tasks."),
    ("tasks_stolen", "counter", "Tasks taken from other workers."),
    ("queue_tasks", "gauge", "Tasks that wait for a worker."),
)

_Labels = dict[str, str]
_Row = tuple[str, _Labels, float | HistogramSnapshot]  # name, labels and value of a family's metric


class _Engine(Protocol):
    def get_performance_statistics(self) -> EngineStatistics: ...


class EngineCollector(Collector):
    """Collects engines' statistics when they are scraped, and does nothing in between.

    A registry takes one of these, as each has the same metrics; it can have several engines. They
    are referred to weakly: one that nothing else refers to ends, and its metrics with it. A closed
    one shows what it has counted. In a forked child there is nothing of the parent's engines.
    Thread-safe.

    Parameters
    ----------
    engines
        A `PerformanceOptimizedSTT`, whose metrics get no label; or a mapping from names to several,
        whose metrics get their name as label ``engine``.

    Raises
    ------
    OptionError
        If something else was given.

    Examples
    --------
    >>> REGISTRY.register(EngineCollector({"live": small, "files": large}))
    """

    def __init__(self, engines: _Engine | Mapping[str, _Engine]) -> None:
        self._engines: list[tuple[_Labels, weakref.ref[_Engine]]] = []
        if not isinstance(engines, Mapping):
            self._engines.append(({}, _reference("engines", engines)))
            return
        for name, engine in engines.items():
            if not isinstance(name, str) or not name:
                raise OptionError(f"engines: names must be texts that are not empty, not {name!r}")
            self._engines.append(({"engine": name}, _reference(f"engines[{name!r}]", engine)))

    def describe(self) -> Iterator[Metric]:
        """Yield the metrics without values, by which a registry knows what would come twice."""
        for name, kind, text in _FAMILIES:
            yield Metric(f"speechrnt_{name}", text, kind)

    def collect(self) -> Iterator[Metric]:
        """Yield the metrics that have values."""
        families = {family.name: family for family in self.describe()}

        def add(rows: Iterator[_Row], engine: _Labels) -> None:
            for name, labels, value in rows:
                _add(families[f"speechrnt_{name}"], engine | labels, value)

        last = None
        on_gpus: dict[int, GpuStatistics] = {}
        for labels, reference in self._engines:
            engine = reference()
            if engine is None:
                continue
            try:
                last = engine.get_performance_statistics()
            except ModelError:  # it belongs to the parent process
                continue
            add(_of_engine(last), labels)
            if last.gpu is not None:
                on_gpus[last.gpu.device] = last.gpu
        # What all engines share is told once, lest a sum over engines counts it several times.
        if last is not None:
            add(_of_process(last), {})
        for gpu in on_gpus.values():
            add(_of_device(gpu), {})
        yield from (family for family in families.values() if family.samples)


def _reference(name: str, engine: _Engine) -> weakref.ref[_Engine]:
    if not hasattr(engine, "get_performance_statistics"):
        raise OptionError(f"{name}: must be a PerformanceOptimizedSTT, not {engine!r}")
    return weakref.ref(engine)


def _of_process(s: EngineStatistics) -> Iterator[_Row]:
    yield "memory_resident_bytes", {}, s.total_memory_usage_mb * MIB
    yield "pool_reserved_bytes", {"pool": "inference"}, s.inference_memory.reserved


def _of_device(gpu: GpuStatistics) -> Iterator[_Row]:
    if gpu.inference is None:
        return
    for state in ("in_use", "reserved"):
        labels = {"gpu": str(gpu.device), "owner": "inference", "state": state}
        yield "gpu_memory_bytes", labels, getattr(gpu.inference, state)


def _of_engine(s: EngineStatistics) -> Iterator[_Row]:
    streams, dispatcher = s.streams, s.dispatcher
    yield "threads", {}, s.active_threads
    yield from _each("requests", "outcome", s.requests)
    yield "requests_live", {}, s.live
    for kind, each in (("request", s), ("stream", streams)):
        yield "audio_seconds", {"kind": kind, "direction": "in"}, each.audio_in_s
        yield "audio_seconds", {"kind": kind, "direction": "out"}, each.audio_out_s
    yield from _each("sheds", "what", s.sheds)
    yield from _each("errors", "code", s.errors)
    yield from _each("stage_seconds", "stage", s.stages)
    yield from _each("window_seconds", "stage", s.utterances.stages)

    yield "streams_open", {}, streams.open
    yield "streams_started", {}, streams.started
    yield "streams_refused", {}, streams.refused
    yield from _each("stream_events", "event", streams.counts)
    yield "ttfs_seconds", {}, streams.ttfs
    yield "partial_lag_seconds", {}, streams.partial_lag

    for priority, count in dispatcher.queued.items():
        yield "queue_jobs", {"priority": priority.name.lower()}, count
    for outcome in ("completed", "failed", "cancelled", "expired", "rejected"):
        yield "jobs", {"outcome": outcome}, getattr(dispatcher, outcome)
    for size, count in dispatcher.batch_sizes.items():
        yield "batches", {"windows": str(size)}, count
    yield "batch_room", {}, dispatcher.batch_room
    yield "model_seconds", {"part": "encode"}, dispatcher.encode_s
    yield "model_seconds", {"part": "decode"}, dispatcher.decode_s
    yield "windows_retried", {}, s.utterances.retried

    pools = [("audio_buffers", s.audio_buffers), ("results", s.results)]
    if s.gpu is not None and s.gpu.handover is not None:
        pools.append(("page_locked", s.gpu.handover.staging))
    for name, pool in pools:
        yield "pool_in_use", {"pool": name}, pool.in_use
        yield "pool_reserved_bytes", {"pool": name}, pool.reserved_bytes
        for outcome in ("hits", "misses", "overflows"):
            yield "pool_acquires", {"pool": name, "outcome": outcome}, getattr(pool, outcome)
    if s.gpu is not None:
        yield from _of_handover(s.gpu)
    if s.scheduler is not None:
        for priority, count in s.scheduler.executed.items():
            yield "tasks", {"priority": priority.name.lower()}, count
        yield "tasks_stolen", {}, s.scheduler.stolen
        for priority, count in s.scheduler.queued.items():
            yield "queue_tasks", {"priority": priority.name.lower()}, count


def _of_handover(gpu: GpuStatistics) -> Iterator[_Row]:
    if gpu.handover is None:
        return
    labels, pool = {"gpu": str(gpu.device)}, gpu.handover.pool
    for state in ("in_use", "reserved", "free", "largest_free"):
        yield "gpu_memory_bytes", labels | {"owner": "pool", "state": state}, getattr(pool, state)
    yield "gpu_fragmentation_ratio", labels, pool.fragmentation
    yield "gpu_utilisation_ratio", labels, pool.utilisation
    yield "gpu_ooms", labels, pool.ooms
    yield "gpu_defragmentations", labels, pool.defragmentations
    yield "gpu_batches", labels, gpu.handover.handed_over
    yield "gpu_fallbacks", labels, gpu.handover.fallbacks


def _each(name: str, label: str, values: Mapping[str, float | HistogramSnapshot]) -> Iterator[_Row]:
    for key, value in values.items():
        yield name, {label: key}, value


def _add(family: Metric, labels: _Labels, value: float | HistogramSnapshot) -> None:
    if isinstance(value, HistogramSnapshot):
        for limit, count in _buckets(value):
            family.add_sample(f"{family.name}_bucket", labels | {"le": limit}, count)
        family.add_sample(f"{family.name}_count", labels, value.count)
        family.add_sample(f"{family.name}_sum", labels, value.sum_s)
        return
    suffix = "_total" if family.type == "counter" else ""
    family.add_sample(family.name + suffix, labels, value)


def _buckets(times: HistogramSnapshot) -> list[tuple[str, float]]:
    """Return upper limits and how many times are not longer."""
    rows = [
        (str(bound), float(sum(n for limit, n in times.buckets.items() if limit <= bound)))
        for bound in _BOUNDS_S
    ]
    return [*rows, ("+Inf", float(times.count))]
