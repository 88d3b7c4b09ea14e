"""What a stream is asked for and what it tells of itself, beside its events."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, fields
from numbers import Real
from typing import Literal, TypeAlias

from .errors import OptionError
from .latency import Histogram

__all__ = [
    "STREAM_OPTIONS",
    "Pressure",
    "StreamCounters",
    "StreamOptions",
    "StreamSnapshot",
    "StreamState",
]

StreamState: TypeAlias = Literal["open", "finalizing", "closed"]


@dataclass(frozen=True)
class StreamOptions:
    """How a stream is to be handled, beside `UtteranceOptions`.

    Attributes
    ----------
    partials
        Whether open windows are transcribed, too.
    partial_interval_s
        Seconds of audio between two partials, at least; more where the model has not the time.
    idle_timeout_s
        Seconds without audio after which the stream is finalized. None: never.
    max_duration_s
        Seconds of audio after which it is finalized.
    max_buffered_s
        Seconds of audio that may wait to be looked at. A chunk is taken whole or not at all, and
        taken as long as no more than this waits before it.

    Raises
    ------
    OptionError
        If a value is out of range.
    """

    partials: bool = True
    partial_interval_s: float = 0.5
    idle_timeout_s: float | None = 60.0
    max_duration_s: float = 4 * 3600.0
    max_buffered_s: float = 60.0

    def __post_init__(self) -> None:
        if not isinstance(self.partials, bool):
            raise OptionError(f"partials: must be True or False, not {self.partials!r}")
        for name, (least, most) in _RANGES.items():
            value = getattr(self, name)
            if value is None and name == "idle_timeout_s":
                continue
            # NaN compares false.
            good = isinstance(value, Real) and not isinstance(value, bool)
            if not good or not least <= value <= most:
                raise OptionError(f"{name}: must be a number from {least} to {most}, not {value!r}")


_RANGES: dict[str, tuple[float, float]] = {
    "partial_interval_s": (0.05, 60),
    "idle_timeout_s": (0.1, 86_400),
    "max_duration_s": (1, 10 * 86_400),
    "max_buffered_s": (1, 600),
}

STREAM_OPTIONS = frozenset(field.name for field in fields(StreamOptions))


@dataclass(frozen=True)
class Pressure:
    """How far a stream is behind.

    Attributes
    ----------
    buffered_s
        Seconds of audio that wait to be looked at.
    lag_s
        Seconds of audio that no partial or final reflects yet, silence not counted.
    """

    buffered_s: float
    lag_s: float


@dataclass(frozen=True)
class StreamSnapshot:
    """Where a stream stands.

    Attributes
    ----------
    state : str
        ``"open"``, ``"finalizing"`` or ``"closed"``.
    received_s, processed_s : float
        Seconds of audio pushed, and looked at.
    text : str
        The finals so far.
    stable_text, unstable_text : str
        The open window so far; see `Partial`. Of the same moment as `text`.
    """

    state: StreamState
    received_s: float
    processed_s: float
    text: str
    stable_text: str
    unstable_text: str


class StreamCounters:
    """What happens to all streams of an engine. Thread-safe; reading takes no lock."""

    NAMES = (
        "finals",
        "partials",
        "expired_partials",
        "stale_partials",
        "revised_finals",
        "committed_words",
        "committed_at_final_words",
        "contradicted_words",
        "final_words",
        "stalled",
        "idle",
        "too_long",
        "callback_errors",
        "unread_events",
        "refused_chunks",
        "finalized",
        "cancelled",
        "failed",
    )

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts = dict.fromkeys(self.NAMES, 0)
        self._errors: Counter[str] = Counter()
        self._samples = 0, 0
        self.ttfs = Histogram()
        self.partial_lag = Histogram()

    def add(self, name: str, count: int = 1) -> None:
        """Count."""
        with self._lock:
            self._counts[name] += count

    def add_error(self, error: Exception) -> None:
        """Count why a stream failed."""
        with self._lock:
            self._errors[type(error).__name__] += 1

    def add_audio(self, taken: int = 0, told: int = 0) -> None:
        """Count samples that were pushed, and samples that finals have come to."""
        with self._lock:
            before = self._samples
            self._samples = before[0] + taken, before[1] + told

    def snapshot(self) -> Mapping[str, int]:
        """Return the counts of one moment."""
        return self._counts.copy()

    @property
    def errors(self) -> Mapping[str, int]:
        """Streams that failed, by the class of the exception."""
        return self._errors.copy()

    @property
    def samples(self) -> tuple[int, int]:
        """Samples that were pushed, and that finals have come to."""
        return self._samples
