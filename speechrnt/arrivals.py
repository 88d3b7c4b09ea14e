"""When the samples of a stream arrived."""

from __future__ import annotations

from array import array
from bisect import bisect_left

__all__ = ["Arrivals"]

# Arrivals closer together than this count as one.
_STEP_S = 0.01


class Arrivals:
    """Times of arrival, as long as somebody may ask for them. Not thread-safe."""

    __slots__ = ("_ends", "_times")

    def __init__(self) -> None:
        self._ends = array("q")  # samples received, after the arrivals of a step
        self._times = array("d")  # of the first of them

    def __len__(self) -> int:
        return len(self._ends)

    def add(self, received: int, now: float) -> None:
        """Note that there are so many samples now."""
        if self._times and now - self._times[-1] < _STEP_S:
            self._ends[-1] = received
        else:
            self._ends.append(received)
            self._times.append(now)

    def of(self, sample: int) -> float | None:
        """Return when there were so many samples, `_STEP_S` early at most; None if not known."""
        index = bisect_left(self._ends, sample)
        return self._times[index] if index < len(self._times) else None

    def forget(self, before: int) -> None:
        """Drop what is needed for earlier samples only."""
        index = bisect_left(self._ends, before)
        del self._ends[:index]
        del self._times[:index]
