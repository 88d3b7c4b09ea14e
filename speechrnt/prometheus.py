"""An engine's statistics for Prometheus; needs the extra ``prometheus``.

>>> from prometheus_client import REGISTRY, start_http_server
>>> REGISTRY.register(EngineCollector(stt))
>>> start_http_server(9090)
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from .latency import HistogramSnapshot
from .monitoring import EngineStatistics, GpuStatistics

__all__ = ["EngineCollector"]


# Always the same, as queries need. Doublings of a microsecond, from half a millisecond to two
# minutes, are limits of the statistics' own buckets, too, so that every count is exact.
_BOUNDS_S = tuple(1e-6 * 2**octave for octave in range(9, 28))


class _Engine(Protocol):
    def get_performance_statistics(self) -> EngineStatistics: ...


class EngineCollector(Collector):
    """Collects an engine's statistics when they are scraped, and does nothing in between.

    Parameters
    ----------
    engine
        A `PerformanceOptimizedSTT`.
    """

    def __init__(self, engine: _Engine) -> None:
        self._engine = engine

    def collect(self) -> Iterator[Metric]:
        """Yield the metrics."""
        s = self._engine.get_performance_statistics()
        streams, dispatcher = s.streams, s.dispatcher
        yield _gauge(
            "memory_resident_bytes", "Memory of the process.", s.total_memory_usage_mb * 2**20
        )
        yield _gauge("threads", "Workers of the scheduler and the model.", s.active_threads)

        requests = CounterMetricFamily(
            "speechrnt_requests", "One-shot requests.", labels=["outcome"]
        )
        for outcome, count in s.requests.items():
            requests.add_metric([outcome], count)
        yield requests
        yield _gauge("requests_live", "One-shot requests that wait or run.", s.live)
        audio = CounterMetricFamily(
            "speechrnt_audio_seconds",
            "Audio that was taken, and that was transcribed.",
            labels=["kind", "direction"],
        )
        for kind, each in (("request", s), ("stream", streams)):
            audio.add_metric([kind, "in"], each.audio_in_s)
            audio.add_metric([kind, "out"], each.audio_out_s)
        yield audio
        sheds = CounterMetricFamily(
            "speechrnt_sheds", "What was not taken, or was dropped, under load.", labels=["what"]
        )
        for what, count in s.sheds.items():
            sheds.add_metric([what], count)
        yield sheds
        errors = CounterMetricFamily("speechrnt_errors", "Failures.", labels=["code"])
        for code, count in s.errors.items():
            errors.add_metric([code], count)
        yield errors
        for name, text, by_stage in (
            ("stage_seconds", "Time of the stages of requests.", s.stages),
            ("window_seconds", "Time of the stages of windows.", s.utterances.stages),
        ):
            stages = HistogramMetricFamily(f"speechrnt_{name}", text, labels=["stage"])
            for stage, times in by_stage.items():
                stages.add_metric([stage], _buckets(times), times.sum_s)
            yield stages

        yield _gauge("streams_open", "Streams that are not closed.", streams.open)
        yield _counter("streams_started", "Streams that were started.", streams.started)
        yield _counter("streams_refused", "Streams that were refused.", streams.refused)
        events = CounterMetricFamily(
            "speechrnt_stream_events", "What happened to streams.", labels=["event"]
        )
        for event, count in streams.counts.items():
            events.add_metric([event], count)
        yield events
        for name, text, times in (
            ("ttfs_seconds", "From the end of speech to its final text.", streams.ttfs),
            ("partial_lag_seconds", "From audio to the partial with it.", streams.partial_lag),
        ):
            family = HistogramMetricFamily(f"speechrnt_{name}", text)
            family.add_metric([], _buckets(times), times.sum_s)
            yield family

        queued = GaugeMetricFamily(
            "speechrnt_queue_jobs", "Windows that wait for the model.", labels=["priority"]
        )
        for priority, count in dispatcher.queued.items():
            queued.add_metric([priority.name.lower()], count)
        yield queued
        jobs = CounterMetricFamily("speechrnt_jobs", "Windows for the model.", labels=["outcome"])
        for outcome in ("completed", "failed", "cancelled", "expired", "rejected"):
            jobs.add_metric([outcome], getattr(dispatcher, outcome))
        yield jobs
        batches = CounterMetricFamily(
            "speechrnt_batches", "Calls of the decoder.", labels=["windows"]
        )
        for size, count in dispatcher.batch_sizes.items():
            batches.add_metric([str(size)], count)
        yield batches
        yield _counter(
            "batch_room", "Windows that would have paid in those.", dispatcher.batch_room
        )
        model = CounterMetricFamily(
            "speechrnt_model_seconds", "Time in calls of the model.", labels=["part"]
        )
        model.add_metric(["encode"], dispatcher.encode_s)
        model.add_metric(["decode"], dispatcher.decode_s)
        yield model
        yield _counter("windows_retried", "Windows decoded twice.", s.utterances.retried)

        in_use = GaugeMetricFamily("speechrnt_pool_in_use", "Objects in use.", labels=["pool"])
        reserved = GaugeMetricFamily(
            "speechrnt_pool_reserved_bytes", "Memory of the pool.", labels=["pool"]
        )
        lookups = CounterMetricFamily(
            "speechrnt_pool_acquires", "What was acquired.", labels=["pool", "outcome"]
        )
        pools = [("audio_buffers", s.audio_buffers), ("results", s.results)]
        if s.gpu is not None and s.gpu.handover is not None:
            pools.append(("page_locked", s.gpu.handover.staging))
        for name, pool in pools:
            in_use.add_metric([name], pool.in_use)
            reserved.add_metric([name], pool.reserved_bytes)
            for outcome in ("hits", "misses", "overflows"):
                lookups.add_metric([name, outcome], getattr(pool, outcome))
        reserved.add_metric(["inference"], s.inference_memory.reserved)
        yield in_use
        yield reserved
        yield lookups
        if s.gpu is not None:
            yield from _gpu(s.gpu)
        if s.scheduler is not None:
            tasks = CounterMetricFamily("speechrnt_tasks", "Tasks.", labels=["priority"])
            for priority, count in s.scheduler.executed.items():
                tasks.add_metric([priority.name.lower()], count)
            yield tasks
            yield _counter("tasks_stolen", "Tasks taken from other workers.", s.scheduler.stolen)
            waiting = GaugeMetricFamily(
                "speechrnt_queue_tasks", "Tasks that wait for a worker.", labels=["priority"]
            )
            for priority, count in s.scheduler.queued.items():
                waiting.add_metric([priority.name.lower()], count)
            yield waiting


def _gpu(gpu: GpuStatistics) -> Iterator[Metric]:
    sizes = GaugeMetricFamily(
        "speechrnt_gpu_memory_bytes", "Memory on the GPU.", labels=["gpu", "owner", "state"]
    )
    number = str(gpu.device)
    if gpu.inference is not None:
        for state in ("in_use", "reserved"):
            sizes.add_metric([number, "inference", state], getattr(gpu.inference, state))
    if gpu.handover is None:
        yield sizes
        return
    pool = gpu.handover.pool
    for state in ("in_use", "reserved", "free", "largest_free"):
        sizes.add_metric([number, "pool", state], getattr(pool, state))
    yield sizes
    for name, text, value in (
        ("fragmentation_ratio", "Free memory outside the largest hole.", pool.fragmentation),
        ("utilisation_ratio", "Memory in use of the reserved.", pool.utilisation),
    ):
        gauge = GaugeMetricFamily(f"speechrnt_gpu_{name}", text, labels=["gpu"])
        gauge.add_metric([number], value)
        yield gauge
    for name, text, value in (
        ("ooms", "Requests for GPU memory that failed.", pool.ooms),
        ("defragmentations", "Times that free memory was moved together.", pool.defragmentations),
        ("batches", "Batches that went through the pool.", gpu.handover.handed_over),
        ("fallbacks", "Batches that went CTranslate2's way.", gpu.handover.fallbacks),
    ):
        counter = CounterMetricFamily(f"speechrnt_gpu_{name}", text, labels=["gpu"])
        counter.add_metric([number], value)
        yield counter


def _gauge(name: str, text: str, value: float) -> GaugeMetricFamily:
    return GaugeMetricFamily(f"speechrnt_{name}", text, value=value)


def _counter(name: str, text: str, value: float) -> CounterMetricFamily:
    return CounterMetricFamily(f"speechrnt_{name}", text, value=value)


def _buckets(times: HistogramSnapshot) -> list[tuple[str, float]]:
    """Return upper limits and how many times are not longer."""
    rows = [
        (str(bound), float(sum(n for limit, n in times.buckets.items() if limit <= bound)))
        for bound in _BOUNDS_S
    ]
    return [*rows, ("+Inf", float(times.count))]
