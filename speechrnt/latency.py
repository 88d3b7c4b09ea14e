"""How long the stages of a request take: one request's timings, and histograms of many."""

from __future__ import annotations

import math
import threading
from collections.abc import Mapping
from dataclasses import dataclass, fields

from .errors import OptionError

__all__ = ["Histogram", "HistogramSnapshot", "StageTimings"]

# Four buckets an octave, from a microsecond to over an hour, and one for what is longer.
_PER_OCTAVE = 4
_LEAST_S = 1e-6
_OVERFLOW = 32 * _PER_OCTAVE
_LIMITS_S = [_LEAST_S * 2 ** (bucket / _PER_OCTAVE) for bucket in range(_OVERFLOW)] + [math.inf]
_MOST_S = _LIMITS_S[_OVERFLOW - 1]


@dataclass(frozen=True)
class StageTimings:
    """Where the time of a request went, in seconds.

    A request of several windows is the sum of them, and they overlap each other: only `total` is
    what a clock on the wall shows.

    Attributes
    ----------
    ingest
        Reading, checking and resampling the audio, and finding speech in it.
    mel
        Features.
    queue
        Waiting for the model.
    encode, decode
        The model. All of a batch's time counts for each of its windows.
    text
        From ids to text.
    delivery
        From the last text to the result.
    total
        From the call to the result.
    """

    ingest: float = 0.0
    mel: float = 0.0
    queue: float = 0.0
    encode: float = 0.0
    decode: float = 0.0
    text: float = 0.0
    delivery: float = 0.0
    total: float = 0.0


STAGES = tuple(field.name for field in fields(StageTimings))


@dataclass(frozen=True)
class HistogramSnapshot:
    """Times counted so far.

    Attributes
    ----------
    count, sum_s
        How many, and all of them together.
    p50_s, p90_s, p99_s
        Percentiles, at most a fifth too high; infinite beyond 3611 s, and 0 if there are none.
    buckets
        Upper limit in seconds of each bucket that is not empty, and how many times it counts. The
        limit of times beyond 3611 s is infinite.
    """

    count: int
    sum_s: float
    p50_s: float
    p90_s: float
    p99_s: float
    buckets: Mapping[float, int]


class Histogram:
    """Counts times in buckets whose limits grow by a fifth. Thread-safe; reading takes no lock."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts = [0] * len(_LIMITS_S)
        self._sum_s = 0.0

    def add(self, seconds: float) -> None:
        """Count one time; an infinite one makes the sum infinite, too.

        Raises
        ------
        OptionError
            If it is not a number.
        """
        if seconds > _MOST_S:
            bucket = _OVERFLOW
        elif seconds > _LEAST_S:
            # What is just below the longest limit may round up.
            bucket = min(math.ceil(math.log2(seconds / _LEAST_S) * _PER_OCTAVE), _OVERFLOW - 1)
        elif seconds <= _LEAST_S:
            bucket = 0
        else:
            raise OptionError(f"seconds: must be a number, not {seconds}")
        with self._lock:
            self._counts[bucket] += 1
            self._sum_s += seconds

    def snapshot(self) -> HistogramSnapshot:
        """Return what was counted so far; the sum may be a moment ahead."""
        counts, sum_s = self._counts.copy(), self._sum_s
        total = sum(counts)
        percentiles = []
        for share in (0.5, 0.9, 0.99):
            seen = 0
            limit = 0.0
            for bucket, count in enumerate(counts):
                seen += count
                if count and seen >= share * total:
                    limit = _LIMITS_S[bucket]
                    break
            percentiles.append(limit)
        buckets = {_LIMITS_S[index]: count for index, count in enumerate(counts) if count}
        p50_s, p90_s, p99_s = percentiles
        return HistogramSnapshot(total, sum_s, p50_s, p90_s, p99_s, buckets)
