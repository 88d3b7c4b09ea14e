"""What a streaming utterance tells its user."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

from .results import Segment

__all__ = [
    "Closed",
    "Committed",
    "Error",
    "Event",
    "Final",
    "Overload",
    "Partial",
    "SpeechEnded",
    "SpeechStarted",
]


@dataclass(frozen=True)
class _Event:
    """What all events say.

    Attributes
    ----------
    utterance_id : str
        Whose event it is.
    audio_s : float
        Seconds of the stream's audio that the event takes into account, by the count of samples.
    """

    utterance_id: str
    audio_s: float


@dataclass(frozen=True)
class SpeechStarted(_Event):
    """Somebody speaks, since `start_s` seconds into the stream."""

    start_s: float


@dataclass(frozen=True)
class SpeechEnded(_Event):
    """Nobody has spoken since `end_s` seconds into the stream, for as long as ends a window."""

    end_s: float


@dataclass(frozen=True)
class Partial(_Event):
    """What the open window seems to say so far; each one replaces the one before.

    Attributes
    ----------
    stable_text : str
        What has been committed of the window.
    unstable_text : str
        What follows it, and may change.
    """

    stable_text: str
    unstable_text: str

    @property
    def text(self) -> str:
        """Both together."""
        return f"{self.stable_text} {self.unstable_text}".strip()


@dataclass(frozen=True)
class Committed(_Event):
    """More of the open window's text that will not be taken back by another partial.

    Attributes
    ----------
    delta : str
        What is new, with the space before it; the deltas of a window together are its committed
        text.
    """

    delta: str


@dataclass(frozen=True)
class Final(_Event):
    """What a window says, for good.

    Attributes
    ----------
    text : str
        Its text; empty if nothing was said.
    segment : Segment or None
        The text with its ids, scores and times; None if it is empty.
    language : str
        The language it was decoded in.
    revised : bool
        Whether text was committed that this does not begin with.
    from_flush : bool
        Whether a flush or the end of the stream asked for it, rather than a pause.
    ttfs_s : float or None
        Seconds from the arrival of the last sample of speech to this event; None without speech.
    """

    text: str
    segment: Segment | None
    language: str
    revised: bool
    from_flush: bool
    ttfs_s: float | None


@dataclass(frozen=True)
class Overload(_Event):
    """The engine has more to do than it can: partials come every `partial_interval_s` only."""

    partial_interval_s: float


@dataclass(frozen=True)
class Error(_Event):
    """Something went wrong.

    Attributes
    ----------
    code : str
        ``"stalled"``: audio was taken, and nothing decoded for long. ``"idle"``: no audio came for
        long, and the stream was finalized. ``"too_long"``: the same for its length.
        ``"failed"``: the model failed, and the stream is over.
    message : str
        What it was.
    recoverable : bool
        Whether the stream goes on.
    """

    code: Literal["stalled", "idle", "too_long", "failed"]
    message: str
    recoverable: bool


@dataclass(frozen=True)
class Closed(_Event):
    """The last event.

    Attributes
    ----------
    reason : str
        Why: it was finalized or cancelled, or failed.
    """

    reason: Literal["finalized", "cancelled", "failed"]


Event: TypeAlias = (
    SpeechStarted | SpeechEnded | Partial | Committed | Final | Overload | Error | Closed
)
