"""All streams of an engine: their names, their limit, and the end of those nobody looks after."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from .audio import SAMPLE_RATE
from .batching import Dispatcher
from .errors import ModelError, Overloaded, UtteranceError
from .latency import HistogramSnapshot
from .stream_types import StreamCounters
from .streaming import Stream

__all__ = ["StreamRegistry", "StreamStatistics"]

# Callbacks may block, though they should not; more than this many hold up those of other streams.
_CALLBACK_THREADS = 16

# With so much model time waiting, another stream would only make all of them late.
_MOST_BACKLOG_S = 5.0


@dataclass(frozen=True)
class StreamStatistics:
    """Counts of all streams since the engine was made.

    Attributes
    ----------
    open : int
        Streams that are not closed.
    started, refused, closed : int
        Streams that were started; refused, because there were too many or the model was too far
        behind; and closed.
    counts : Mapping of str to int
        ``finals`` and ``partials``; ``expired_partials``, which the model had no time for, and
        ``stale_partials``, which nobody had taken when the next came; ``revised_finals``, which do
        not begin with what was committed, and the ``contradicted_words`` of that;
        ``committed_words``, ``committed_at_final_words`` of windows that were final, and
        ``final_words``; streams that ``stalled``, were ``idle`` or ``too_long``;
        ``callback_errors``; ``unread_events``, dropped because nobody read any;
        ``refused_chunks`` of audio, because too much was waiting; and of the closed streams those
        ``finalized``, ``cancelled`` and ``failed``.
    errors : Mapping of str to int
        Streams that failed, by the class of the exception.
    audio_in_s, audio_out_s : float
        Seconds of audio that were pushed, and that finals have come to. The difference waits, is in
        windows that are open, or went with streams that were cancelled or failed.
    ttfs, partial_lag : HistogramSnapshot
        Seconds from the end of speech to its final; from the arrival of audio to the partial that
        reflects it.
    """

    open: int
    started: int
    refused: int
    closed: int
    counts: Mapping[str, int]
    errors: Mapping[str, int]
    audio_in_s: float
    audio_out_s: float
    ttfs: HistogramSnapshot
    partial_lag: HistogramSnapshot


class StreamRegistry:
    """The streams that are not closed. Thread-safe; looking a stream up takes no lock.

    Parameters
    ----------
    most
        How many there may be.
    dispatcher
        Tells how many seconds of work wait for the model.
    stalled_after_s
        A stream of whose audio nothing came for so long is stalled.
    """

    def __init__(self, most: int, dispatcher: Dispatcher, stalled_after_s: float = 30.0) -> None:
        self.counters = StreamCounters()
        self._here = here = threading.local()
        self.threads = ThreadPoolExecutor(
            _CALLBACK_THREADS,
            "speechrnt-callback",
            # The threads keep this function, which must not keep the registry.
            initializer=lambda: setattr(here, "is_callback", True),
        )
        self.closed = False
        self._most = most
        self._dispatcher = dispatcher
        self._stalled_after_s = stalled_after_s
        self._changed = threading.Condition()
        self._streams: dict[str, Stream] = {}
        self._reserved: set[str] = set()
        self._names = itertools.count(1)
        self._ending = 0  # streams whose users are being told
        self._started = self._refused = self._closed_streams = 0

    def start(self, utterance_id: str | None, make: Callable[[str], Stream]) -> Stream:
        """Add a stream.

        Parameters
        ----------
        utterance_id
            Its name; None makes one up.
        make
            Makes it, given its name.

        Raises
        ------
        UtteranceError
            If there is a stream of this name, or it is none.
        Overloaded
            If there are too many, or the model is too far behind.
        ModelError
            If the engine is closed.
        """
        if utterance_id is not None and (not isinstance(utterance_id, str) or not utterance_id):
            raise UtteranceError(f"utterance_id: must be a text, not {utterance_id!r}")
        backlog_s = self._dispatcher.backlog_s
        with self._changed:
            if self.closed:
                raise ModelError("the engine is closed")
            n_open = len(self._streams) + len(self._reserved)
            if n_open >= self._most or backlog_s > _MOST_BACKLOG_S:
                self._refused += 1
                if n_open >= self._most:
                    raise Overloaded(f"{n_open} streams are open, the most allowed", 1.0)
                raise Overloaded(
                    f"the model is {backlog_s:.1f} s behind, too far for another stream",
                    backlog_s,
                )
            if utterance_id is None:
                utterance_id = f"utterance-{next(self._names)}"
                while utterance_id in self._streams or utterance_id in self._reserved:
                    utterance_id = f"utterance-{next(self._names)}"
            elif utterance_id in self._streams or utterance_id in self._reserved:
                raise UtteranceError(
                    f"utterance {utterance_id!r} is open already; finalize it, or take another name"
                )
            self._reserved.add(utterance_id)
        try:
            stream = make(utterance_id)
        except BaseException:
            with self._changed:
                self._reserved.discard(utterance_id)
                self._changed.notify_all()
            raise
        with self._changed:
            self._reserved.discard(utterance_id)
            self._streams[utterance_id] = stream
            self._started += 1
            self._changed.notify_all()
        return stream

    def get(self, utterance_id: str) -> Stream:
        """Return an open stream.

        Raises
        ------
        UtteranceError
            If there is none of this name.
        """
        stream = self._streams.get(utterance_id)
        if stream is None:
            raise UtteranceError(
                f"utterance {utterance_id!r} is not open: it was never started, or is closed"
            )
        return stream

    def is_callback(self) -> bool:
        """Whether the caller is a callback of a stream."""
        return getattr(self._here, "is_callback", False)

    def forget(self, stream: Stream, tell: Callable[[], None]) -> None:
        """Drop a stream that is closed, and have its user told, whom its name is free for then."""
        with self._changed:
            del self._streams[stream.utterance_id]
            self._ending += 1
            self._closed_streams += 1
        try:
            tell()
        finally:
            with self._changed:
                self._ending -= 1
                self._changed.notify_all()

    @property
    def stalled(self) -> int:
        """Open streams that get no text for their audio."""
        return sum(stream.is_stalled for stream in list(self._streams.values()))

    @property
    def use(self) -> float:
        """Open streams, as a share of the most allowed."""
        return len(self._streams) / self._most

    def maintain(self) -> None:
        """Look after the streams; for `maintain_on`."""
        now = time.monotonic()
        for stream in list(self._streams.values()):
            stream.check(now, self._stalled_after_s)

    def close(self, cancel: bool) -> None:
        """Start no more, and wait until all are closed: finalized, or with `cancel` cancelled."""
        with self._changed:
            self.closed = True
            self._changed.wait_for(lambda: not self._reserved)
            streams = list(self._streams.values())
        for stream in streams:
            if cancel:
                stream.cancel()
            else:
                stream.end()
        with self._changed:
            self._changed.wait_for(lambda: not self._streams and not self._ending)
        self.threads.shutdown()

    def statistics(self) -> StreamStatistics:
        """Return what was counted so far. Takes no lock."""
        taken, told = self.counters.samples
        return StreamStatistics(
            open=len(self._streams),
            started=self._started,
            refused=self._refused,
            closed=self._closed_streams,
            counts=self.counters.snapshot(),
            errors=self.counters.errors,
            audio_in_s=taken / SAMPLE_RATE,
            audio_out_s=told / SAMPLE_RATE,
            ttfs=self.counters.ttfs.snapshot(),
            partial_lag=self.counters.partial_lag.snapshot(),
        )
