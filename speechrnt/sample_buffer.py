"""The latest samples of a stream, in pooled memory that grows and shrinks with them."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from .pools import AudioBuffer, AudioBufferPool

__all__ = ["SampleBuffer"]

# Up to half a second is not worth a buffer of a pool, the smallest of which hold one.
_SMALL_SAMPLES = 8192


class SampleBuffer:
    """Consecutive samples from `start` to `end`, counted from the beginning of the stream.

    Not thread-safe. Holds no memory until samples come, and never more than four times what they
    take, beyond half a second.

    Parameters
    ----------
    pool
        Where the memory comes from, but for the smallest.
    """

    def __init__(self, pool: AudioBufferPool) -> None:
        self._pool = pool
        self._buffer: AudioBuffer | None = None  # which `_array` is part of, if it is of the pool
        self._array = _NOTHING
        self._offset = 0  # of `start` in it
        self.start = 0
        self.end = 0

    @property
    def nbytes(self) -> int:
        """Bytes of memory held."""
        return self._array.nbytes

    def append(self, samples: NDArray[np.float32]) -> None:
        """Add samples at the end; views may become invalid."""
        wanted = self.end - self.start + len(samples)
        if self._offset + wanted > len(self._array):
            capacity = _SMALL_SAMPLES
            while capacity < wanted:
                capacity *= 2
            self._move(capacity)
        at = self._offset + self.end - self.start
        self._array[at : at + len(samples)] = samples
        self.end += len(samples)

    def view(self, start: int, end: int) -> NDArray[np.float32]:
        """Return samples, valid until the next change."""
        if not self.start <= start <= end <= self.end:
            raise IndexError(f"samples {start} to {end} are not in {self.start} to {self.end}")
        offset = self._offset - self.start
        return self._array[offset + start : offset + end]

    def discard(self, before: int) -> None:
        """Drop the samples before one; views become invalid."""
        before = min(max(before, self.start), self.end)
        self._offset += before - self.start
        self.start = before
        kept = self.end - self.start
        if not kept:
            self.release()
        elif len(self._array) > 4 * max(kept, _SMALL_SAMPLES):
            self._move(max(kept, _SMALL_SAMPLES))

    def compact(self) -> None:
        """Hold no more memory than the samples take; views become invalid."""
        kept = self.end - self.start
        if len(self._array) > kept:
            self._move(kept)

    def release(self) -> None:
        """Give the memory back, and drop what is in it."""
        self.start = self.end
        self._move(0)

    def _move(self, capacity: int) -> None:
        """Move the samples to the beginning of memory of another size, or of the same."""
        kept = self.view(self.start, self.end)
        if capacity == len(self._array) and self._offset >= len(kept):
            self._array[: len(kept)] = kept
            self._offset = 0
            return
        buffer = None
        array = _NOTHING
        if capacity > _SMALL_SAMPLES:
            buffer = self._pool.acquire(capacity)
            array = buffer.array
        elif capacity:
            array = np.empty(capacity, dtype=np.float32)
        array[: len(kept)] = kept
        del kept
        old, self._buffer, self._array, self._offset = self._buffer, buffer, array, 0
        if old is not None:
            old.release()


_NOTHING: NDArray[np.float32] = np.empty(0, dtype=np.float32)
