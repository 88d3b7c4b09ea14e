"""How many windows to encode, and to decode, in one call: measured, not guessed.

Larger calls are worth while only where they make an item cheaper. On a CPU the encoder gains next
to nothing from company; the decoder gains the more, the larger its vocabulary and the shorter the
context. On a GPU both gain. perf/bench_dispatcher.py shows the costs.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

__all__ = ["BatchSizes", "Costs"]

logger = logging.getLogger("speechrnt")

# A larger size must make an item this much cheaper.
_WORTH_WHILE = 0.95
# Where it is this much dearer, no larger one is tried. What is measured may be off by a tenth.
_HOPELESS = 1.15
_REPEATS = 2

# After this, a call is made once only, and no larger one if it brought nothing.
_BUDGET_S = 0.25


@dataclass(frozen=True)
class Costs:
    """Seconds a call of each batch size takes, per item, for one length of context.

    On a CPU these are seconds of the processor: cores are what is scarce there, and what else the
    machine does must not look like a cost.

    Attributes
    ----------
    encode, decode
        By batch size.
    """

    encode: Mapping[int, float]
    decode: Mapping[int, float]


class BatchSizes:
    """Sizes to use for each context. Thread-safe.

    Parameters
    ----------
    largest
        Never more than this.
    fits
        How many windows of so many mel frames the memory holds while they are decoded.
    device
        ``"cpu"`` or ``"cuda"``: what to assume before anything is measured.
    """

    def __init__(self, largest: int, fits: Callable[[int], int], device: str) -> None:
        self._largest = largest
        self._fits = fits
        self._device = device
        self._clock = time.perf_counter if device == "cuda" else time.process_time
        self._lock = threading.Lock()
        self._costs: dict[int, Costs] = {}
        self._sizes: dict[int, tuple[int, int]] = {}
        self._seconds: dict[int, float] = {}

    @property
    def costs(self) -> Mapping[int, Costs]:
        """What was measured, by mel frames of context."""
        with self._lock:
            return dict(self._costs)

    def of(self, frames: int) -> tuple[int, int]:
        """Return how many windows to encode and to decode at once."""
        with self._lock:
            if frames not in self._sizes:
                self._sizes[frames] = self._assume(frames)
            return self._sizes[frames]

    def measure(
        self,
        frames: int,
        encode: Callable[[int], object],
        decode: Callable[[int], object],
    ) -> Costs:
        """Time calls of growing size, and use what is best from now on.

        Parameters
        ----------
        frames
            The context.
        encode, decode
            Calls the model with so many windows.
        """
        bound = self.largest(frames)
        costs = Costs(_growing(encode, bound, self._clock), _growing(decode, bound, self._clock))
        encode_size, decode_size = _best(costs.encode), _best(costs.decode)
        with self._lock:
            self._costs[frames] = costs
            self._sizes[frames] = encode_size, max(encode_size, decode_size)
            self._seconds[frames] = costs.encode[encode_size] + costs.decode[decode_size]
        logger.debug("%d frames: encode %d, decode %d at once", frames, encode_size, decode_size)
        return costs

    def observe(self, frames: int, n_items: int, seconds: float) -> None:
        """Learn from a batch how long a window of this context takes."""
        seconds /= n_items
        with self._lock:
            known = self._seconds.get(frames)
            # Half a dozen batches outweigh what was known before.
            self._seconds[frames] = seconds if known is None else known + (seconds - known) / 4

    def expected_s(self, frames: int) -> float:
        """Return the model time that a window of this context takes, 0 if that is not known."""
        with self._lock:
            known = self._seconds.get(frames)
            if known is None and self._seconds:
                nearest = min(self._seconds, key=lambda other: abs(other - frames))
                known = self._seconds[nearest] * frames / nearest
            return known or 0.0

    def largest(self, frames: int) -> int:
        """Return the most windows of a context that one call may have."""
        return max(1, min(self._largest, self._fits(frames)))

    def _assume(self, frames: int) -> tuple[int, int]:
        bound = self.largest(frames)
        # Even where the decoder gains nothing, as with a small vocabulary on full context, company
        # costs it no more than a hundredth of what the encoder takes.
        return bound if self._device == "cuda" else 1, bound


def _growing(
    call: Callable[[int], object], largest: int, clock: Callable[[], float]
) -> dict[int, float]:
    """Time sizes 1, 2, 4, ... for as long as there is hope that an item gets cheaper."""
    costs: dict[int, float] = {}
    call(1)  # which pays for what the other calls find ready
    started = clock()
    size = 1
    while True:
        seconds = _time(call, size, clock)
        for _ in range(_REPEATS - 1):
            if clock() - started < _BUDGET_S:
                # The least, as everything that disturbs makes a call longer.
                seconds = min(seconds, _time(call, size, clock))
        costs[size] = seconds / size
        hopeless = costs[size] > min(costs.values()) * _HOPELESS
        over = clock() - started >= _BUDGET_S and size > 1 and _best(costs) != size
        if size == largest or hopeless or over:
            return costs
        size = min(2 * size, largest)


def _best(costs: Mapping[int, float]) -> int:
    """Return the smallest size that is nearly as good as the best."""
    least = min(costs.values())
    return next(size for size in sorted(costs) if costs[size] * _WORTH_WHILE <= least)


def _time(call: Callable[[int], object], size: int, clock: Callable[[], float]) -> float:
    started = clock()
    call(size)
    return clock() - started
