"""The log-mel frames of a recording that is read little by little, once each, in bounded memory."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray

from . import _mel
from .errors import AudioError, AudioFileError

__all__ = ["MelFrames"]

_HOP_LENGTH = 160
_LEAST_FRAMES = 512


class MelFrames:
    """Frames of a recording, computed as far as they are asked for.

    Whatever the blocks, the frames are bit for bit those of `_mel.log10_mel` of all samples.
    Samples are not kept; frames are until `forget`.

    Used by one thread at a time. With `ahead`, a thread of its own works between two calls: each
    call waits until it is done, so that never two of them read.

    Parameters
    ----------
    blocks
        The samples, 16 kHz mono. What goes wrong with reading them is raised by the method that
        needs them; those after it raise `AudioFileError`.
    n_mels
        Mel bands, 80 or 128.
    ahead
        Whether `prefetch` may use a thread.
    release
        Called once when no block is needed any more: after the last one, or by `close`.
    """

    def __init__(
        self,
        blocks: Iterator[NDArray[np.float32]],
        n_mels: int,
        ahead: bool = False,
        release: Callable[[], None] | None = None,
    ) -> None:
        self.n_mels = n_mels
        self._blocks: Iterator[NDArray[np.float32]] | None = blocks
        self._release = release
        self._mel = _mel.IncrementalLogMel(n_mels)
        self._rows = np.empty((n_mels, _LEAST_FRAMES), dtype=np.float32)
        self._first = 0  # the frame in the first column
        self._end = 0  # past the last frame that is there
        self._needed = 0  # those before are forgotten
        self._is_complete = False
        self._is_broken = False
        self._is_closed = False
        self._ahead = ahead
        self._executor: ThreadPoolExecutor | None = None
        self._pending: Future[None] | None = None
        self._worker: int | None = None
        self._process = os.getpid()
        self._is_working = False

    @property
    def is_complete(self) -> bool:
        """Whether the recording has been read to its end."""
        self._wait()
        return self._is_complete

    @property
    def n_samples(self) -> int:
        """Samples of the recording, as far as it has been read."""
        self._wait()
        return self._mel.samples

    def content_up_to(self, limit: int) -> int:
        """Return how many hops of audio the recording has, or `limit` if it has more.

        Reads no more of it than that takes. There is one frame more than whole hops.
        """
        self._advance_to(limit)
        # A frame that is there has had all of its hop, and more.
        return min(limit, self._mel.samples // _HOP_LENGTH)

    def between(self, first: int, past: int) -> NDArray[np.float32]:
        """Return frames, of shape (n_mels, past - first), unnormalised; not to be written to.

        Raises
        ------
        IndexError
            If they are forgotten, or the recording ends before.
        """
        self._advance_to(past)
        if not self._needed <= first <= past <= self._end:
            raise IndexError(f"frames {first} to {past} are not in {self._needed} to {self._end}")
        return self._rows[:, first - self._first : past - self._first]

    def forget(self, before: int) -> None:
        """Let go of the frames before a place, for ever."""
        self._wait()
        self._needed = max(self._needed, before)

    def prefetch(self, past: int) -> None:
        """Begin to compute the frames before a place on a thread, where any are missing."""
        self._wait()
        if not self._ahead or self._blocks is None or self._end >= past:
            return
        if self._executor is None:
            self._executor = ThreadPoolExecutor(1, "speechrnt-features")
        try:
            self._pending = self._executor.submit(self._work, past)
        except RuntimeError:
            # No thread can be started, as when the interpreter ends: who asks for frames computes
            # them. The executor may still have the task, and must not be used again.
            self._ahead = False
            self._executor = None

    def close(self) -> None:
        """Stop reading and free everything, as soon as the block that is being read is there."""
        self._is_closed = True
        executor, self._executor, self._pending = self._executor, None, None
        # The worker itself may be here, if it collects the garbage that the owner is part of: it
        # cannot wait for its own end, nor pull away what it is reading.
        is_worker = threading.get_ident() == self._worker
        if executor is not None and os.getpid() == self._process:
            executor.shutdown(wait=not is_worker)
        if not (is_worker and self._is_working):
            self._free()

    def _work(self, past: int) -> None:
        self._worker = threading.get_ident()
        self._is_working = True
        try:
            self._advance(past)
        finally:
            self._is_working = False
            if self._is_closed:
                self._free()

    def _wait(self) -> None:
        if os.getpid() != self._process:
            # The thread is not here, and the file's position is shared with the parent.
            raise AudioError(
                "the recording was begun before this process was forked; begin again in the child, "
                "with a model of its own"
            )
        if self._pending is not None:
            self._pending.result()
            self._pending = None

    def _advance_to(self, past: int) -> None:
        self._wait()
        self._advance(past)

    def _advance(self, past: int) -> None:
        if self._is_broken:
            raise AudioFileError("the recording cannot be read any further")
        while self._end < past and self._blocks is not None and not self._is_closed:
            try:
                block = next(self._blocks, None)
            except BaseException:
                self._is_broken = True
                self._end_reading()
                raise
            if block is not None:
                columns = self._columns(self._mel.frames_from_push(len(block)))
                self._mel.push(block, columns)
            else:
                columns = self._columns(_mel.frame_count(self._mel.samples) - self._mel.frames)
                self._mel.finish(columns)
                self._is_complete = True
                self._end_reading()
            self._end = self._mel.frames

    def _columns(self, count: int) -> NDArray[np.float32]:
        """Return room for the next frames."""
        past = self._end + count - self._first
        if past > self._rows.shape[1]:
            # What was handed out keeps its memory: others may still read it.
            first = min(max(self._first, self._needed), self._end)
            kept = self._rows[:, first - self._first : self._end - self._first]
            used = kept.shape[1] + count
            self._rows = np.empty((self.n_mels, 2 * used), dtype=np.float32)
            self._rows[:, : kept.shape[1]] = kept
            self._first = first
            past = used
        return self._rows[:, past - count : past]

    def _end_reading(self) -> None:
        blocks, self._blocks = self._blocks, None
        if blocks is not None:
            del blocks
            if self._release is not None:
                self._release()

    def _free(self) -> None:
        self._end_reading()
        self._needed = sys.maxsize
        self._rows = self._rows[:, :0].copy()
