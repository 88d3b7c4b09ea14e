"""The latest samples of a stream, in pooled memory that grows and shrinks with them."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from .pools import AudioBuffer, AudioBufferPool

__all__ = ["SampleBuffer"]

_LEAST_SAMPLES = 8192


class SampleBuffer:
    """Consecutive samples from `start` to `end`, counted from the beginning of the stream.

    Not thread-safe. Holds no memory until samples come, and never more than four times what they
    take, beyond half a second.

    Parameters
    ----------
    pool
        Where the memory comes from.
    """

    def __init__(self, pool: AudioBufferPool) -> None:
        self._pool = pool
        self._buffer: AudioBuffer | None = None
        self._offset = 0  # of `start` in the buffer
        self.start = 0
        self.end = 0

    def append(self, samples: NDArray[np.float32]) -> None:
        """Add samples at the end; views may become invalid."""
        wanted = self.end - self.start + len(samples)
        if self._buffer is None or self._offset + wanted > len(self._buffer.array):
            self._move(wanted)
        assert self._buffer is not None
        at = self._offset + self.end - self.start
        self._buffer.array[at : at + len(samples)] = samples
        self.end += len(samples)

    def view(self, start: int, end: int) -> NDArray[np.float32]:
        """Return samples, valid until the next change."""
        if self._buffer is None or not self.start <= start <= end <= self.end:
            if start == end:
                return np.empty(0, dtype=np.float32)
            raise IndexError(f"samples {start} to {end} are not in {self.start} to {self.end}")
        offset = self._offset - self.start
        samples: NDArray[np.float32] = self._buffer.array[offset + start : offset + end]
        return samples

    def discard(self, before: int) -> None:
        """Drop the samples before one; views become invalid."""
        before = min(max(before, self.start), self.end)
        self._offset += before - self.start
        self.start = before
        kept = self.end - self.start
        if self._buffer is None:
            return
        if not kept:
            self.release()
        elif len(self._buffer.array) > 4 * max(kept, _LEAST_SAMPLES):
            self._move(kept)

    def release(self) -> None:
        """Give the memory back, and drop what is in it."""
        buffer, self._buffer = self._buffer, None
        self._offset = 0
        self.start = self.end
        if buffer is not None:
            buffer.release()

    def _move(self, wanted: int) -> None:
        """Move the samples to the beginning of a buffer with room for twice what is wanted."""
        capacity = _LEAST_SAMPLES
        while capacity < wanted:
            capacity *= 2
        kept = self.end - self.start
        old = self._buffer
        if old is not None and len(old.array) == capacity and self._offset >= kept:
            old.array[:kept] = old.array[self._offset : self._offset + kept]
        else:
            new = self._pool.acquire(capacity)
            if old is not None:
                new.array[:kept] = old.array[self._offset : self._offset + kept]
                old.release()
            self._buffer = new
        self._offset = 0
