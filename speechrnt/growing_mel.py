"""The log-mel of a window that grows: each frame is computed once, when its samples are there."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from . import _mel, _mel_task
from .pools import AudioBuffer, AudioBufferPool

__all__ = ["GrowingLogMel", "complete"]

_LEAST_FRAMES = 512


class GrowingLogMel:
    """Frames of the samples from `start` to `end`, counted from the beginning of a stream.

    Not thread-safe. Holds no memory before the first sample and after `release`.

    Parameters
    ----------
    n_mels
        Mel channels, 80 or 128.
    pool
        Where the memory comes from.
    """

    def __init__(self, n_mels: int, pool: AudioBufferPool) -> None:
        self._n_mels = n_mels
        self._pool = pool
        self._mel: _mel.IncrementalLogMel | None = None
        self._buffer: AudioBuffer | None = None
        self._capacity = 0  # frames
        self.start = 0
        self.end = 0

    @property
    def frames(self) -> NDArray[np.float32] | None:
        """What is complete, unnormalised, of shape (n_mels, frames); valid until the next change.

        The last frames are not what they are at the end of a signal: see `complete`.
        """
        if self._mel is None or self._buffer is None:
            return None
        return self._rows(self._buffer)[:, : self._mel.frames]

    def begin(self, start: int) -> None:
        """Forget all, and go on with this sample."""
        self.release()
        self.start = self.end = start

    def push(self, samples: NDArray[np.float32]) -> None:
        """Take the next samples."""
        if self._mel is None:
            self._mel = _mel.IncrementalLogMel(self._n_mels)
        known = self._mel.frames
        wanted = known + self._mel.frames_from_push(len(samples))
        if self._buffer is None or wanted > self._capacity:
            self._grow(known, wanted)
        assert self._buffer is not None
        self._mel.push(samples, self._rows(self._buffer)[:, known:wanted])
        self.end += len(samples)

    def release(self) -> None:
        """Give the memory back, and forget all."""
        buffer, self._buffer, self._mel, self._capacity = self._buffer, None, None, 0
        self.end = self.start
        if buffer is not None:
            buffer.release()

    def _rows(self, buffer: AudioBuffer) -> NDArray[np.float32]:
        rows: NDArray[np.float32] = buffer.array.reshape(self._n_mels, -1)
        return rows

    def _grow(self, known: int, wanted: int) -> None:
        capacity = max(self._capacity, _LEAST_FRAMES)
        while capacity < wanted:
            capacity *= 2
        new = self._pool.acquire(self._n_mels * capacity)
        old, self._buffer, self._capacity = self._buffer, new, capacity
        if old is not None:
            self._rows(new)[:, :known] = self._rows(old)[:, :known]
            old.release()


def complete(
    samples: NDArray[np.float32],
    frames: NDArray[np.float32] | None,
    out: NDArray[np.float32],
) -> float:
    """Compute the first frames of a signal, given those of it or of a longer one.

    The bits are those of `_mel.log10_mel` of the signal.

    Parameters
    ----------
    samples
        The signal.
    frames
        Those of a `GrowingLogMel` that begins with the signal, and may have gone on; None if there
        are none.
    out
        Where to put the first frames, of shape (n_mels, n).

    Returns
    -------
    float
        The largest value.
    """
    n_mels, wanted = out.shape
    known = 0
    if frames is not None:
        # Later ones reach beyond the end, where the signal is silent.
        final = _mel.IncrementalLogMel(n_mels).frames_from_push(len(samples))
        known = min(frames.shape[1], final, wanted)
    largest = -np.inf
    if known:
        assert frames is not None
        out[:, :known] = frames[:, :known]
        largest = float(out[:, :known].max())
    if known < wanted:
        largest = max(largest, _mel_task.compute(samples, out, known))
    return largest
