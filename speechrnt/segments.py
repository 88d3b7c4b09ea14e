"""The segments of a transcription under way: a generator that can be cancelled and watched."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import CancelledError
from types import TracebackType

from tqdm import tqdm

from .results import Segment

__all__ = ["Progress", "Segments"]


class Progress:
    """How far a transcription has come and whether it shall go on."""

    def __init__(self, duration: float, is_shown: bool) -> None:
        self.duration = duration
        self.seconds_done = 0.0
        self.is_cancelled = False
        self._bar = tqdm(total=duration, unit="s", disable=not is_shown)

    def __call__(self, seconds: float) -> None:
        """Note how many seconds are done; raise if the transcription is cancelled."""
        self._bar.update(seconds - self.seconds_done)
        self.seconds_done = seconds
        self.check()

    def check(self) -> None:
        """Raise if the transcription is cancelled."""
        if self.is_cancelled:
            raise CancelledError("the transcription was cancelled")

    def close(self) -> None:
        """Let the bar be as it is."""
        self._bar.close()


class Segments(Generator[Segment, None, None]):
    """The segments of one recording, decoded as they are asked for.

    Iterated by one thread at a time; `cancel` and the progress may be used from any. What a
    transcription holds, such as an open file, is let go of after the last segment, where iterating
    ends in an exception, by `close`, and with the last reference to this object.
    """

    def __init__(
        self,
        decode: Callable[[Progress], Iterator[Segment]],
        duration: float,
        log_progress: bool = False,
        release: Callable[[], None] = lambda: None,
        on_cancel: Callable[[], None] = lambda: None,
    ) -> None:
        # Nothing that is held here refers back: there is no cycle for the collector to find.
        self._progress = Progress(duration, log_progress)
        self._segments = decode(self._progress)
        self._on_cancel = on_cancel
        self._release = weakref.finalize(self, _release, self._progress, release)
        self._release.atexit = False

    @property
    def duration(self) -> float:
        """Seconds of audio to go through."""
        return self._progress.duration

    @property
    def seconds_done(self) -> float:
        """Seconds that have been gone through."""
        return self._progress.seconds_done

    def send(self, _value: None, /) -> Segment:
        """Return the next segment, as `next` does; the value is of no use."""
        try:
            self._progress.check()
            segment = next(self._segments)
            self._progress.check()
        except BaseException:
            self.close()
            raise
        return segment

    def throw(
        self,
        kind: BaseException | type[BaseException],
        value: object = None,
        traceback: TracebackType | None = None,
        /,
    ) -> Segment:
        """End the iteration, free what it holds, and raise an exception."""
        self.close()
        return super().throw(kind, value, traceback)  # type: ignore[arg-type]

    def cancel(self) -> None:
        """Let no further window be decoded.

        One that is under way is finished, as CTranslate2 cannot be interrupted, and then dropped.
        Whoever asks for a segment afterwards gets a `concurrent.futures.CancelledError`.
        """
        self._progress.is_cancelled = True
        self._on_cancel()

    def close(self) -> None:
        """End the iteration and free what it holds, as generators do."""
        close = getattr(self._segments, "close", None)
        if close is not None:
            close()
        self._release()


def _release(progress: Progress, release: Callable[[], None]) -> None:
    progress.close()
    release()
