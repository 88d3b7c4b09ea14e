"""Where an utterance is cut into windows: at pauses, and where a window would get too long.

The cuts depend on nothing but the samples and the options: frames stand at fixed places, and each
decision is made from the frames up to a fixed distance behind the cut. So the windows are the same
however the samples arrive, which is what makes a stream's text equal to that of the recording.

The rules for speech and silence are those of Silero's reference implementation
(https://github.com/snakers4/silero-vad, `get_speech_timestamps`).
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from .audio import SAMPLE_RATE
from .vad import FRAME_SAMPLES, VoiceActivityDetector

__all__ = [
    "Cutter",
    "Event",
    "Pause",
    "SegmentationOptions",
    "Segmenter",
    "SpeechEnd",
    "SpeechStart",
    "WindowCut",
    "loudness",
]

# Below the threshold by this much, a frame in speech counts as silence.
_HYSTERESIS = 0.15

# A window that gets too long is cut at the quietest place of its last seconds, but so that what
# follows is never a sliver: Whisper makes up text for those.
_CUT_SEARCH_S = 3.0
_LEAST_REST_S = 1.0
_SMOOTHING_FRAMES = 5


@dataclass(frozen=True)
class SegmentationOptions:
    """What counts as speech, as a pause, and as too long.

    Attributes
    ----------
    threshold
        Probability from which a frame is speech.
    endpoint_s
        Silence that ends a window. None: only the length and the end of the audio do.
    min_speech_s
        Speech shorter than this is taken for a noise.
    padding_s
        How much of the silence before and after speech belongs to the window.
    max_window_s
        Longest window.
    """

    threshold: float = 0.5
    endpoint_s: float | None = 0.5
    min_speech_s: float = 0.25
    padding_s: float = 0.3
    max_window_s: float = 28.0


@dataclass(frozen=True)
class SpeechStart:
    """Somebody speaks, and has since this sample."""

    sample: int


@dataclass(frozen=True)
class SpeechEnd:
    """Nobody has spoken since this sample, for as long as it takes to be sure."""

    sample: int


@dataclass(frozen=True)
class WindowCut:
    """Samples `start` to `end` are the next window.

    Attributes
    ----------
    speech_start, speech_end
        Where speech begins and ends in it.
    reason
        What ends it: a pause, its length, or the end of the audio.
    continues
        Whether it begins where a window was cut for its length, amid speech perhaps.
    """

    start: int
    end: int
    speech_start: int
    speech_end: int
    reason: Literal["endpoint", "limit", "end"]
    continues: bool


@dataclass(frozen=True)
class Pause:
    """If nobody goes on speaking, `cut` will be the next window."""

    cut: WindowCut


Event: TypeAlias = SpeechStart | SpeechEnd | Pause | WindowCut


def loudness(samples: NDArray[np.float32]) -> list[float]:
    """Return how far the samples of each frame reach apart; the last frame may be shorter.

    Unlike their energy this is exact, and so the same however the samples are cut into calls.
    """
    whole = len(samples) - len(samples) % FRAME_SAMPLES
    frames = samples[:whole].reshape(-1, FRAME_SAMPLES)
    values: list[float] = (frames.max(axis=1) - frames.min(axis=1)).tolist()
    if whole < len(samples):
        values.append(float(samples[whole:].max() - samples[whole:].min()))
    return values


class Segmenter:
    """Cuts audio from sample `origin` on, known by its frames' probability of speech and loudness.

    Not thread-safe. Of constant size, whatever the length of the audio.
    """

    def __init__(self, options: SegmentationOptions, origin: int = 0) -> None:
        self._origin = origin
        self._threshold = options.threshold
        self._quiet_below = options.threshold - _HYSTERESIS
        self._endpoint = _frames(options.endpoint_s) if options.endpoint_s is not None else None
        self._min_speech = _frames(options.min_speech_s)
        self._padding = _frames(options.padding_s)
        if self._endpoint is not None:
            # The audio behind the cut must be there when the cut is made.
            self._padding = min(self._padding, self._endpoint)
        self._longest = max(int(options.max_window_s * SAMPLE_RATE) // FRAME_SAMPLES, 8)
        self._rest = min(_frames(_LEAST_REST_S), self._longest // 4)
        self._search = min(_frames(_CUT_SEARCH_S), self._longest // 2)
        # Of the last frames, in a ring: loudness, and whether there may be speech.
        self._n_recent = self._rest + self._search + _SMOOTHING_FRAMES
        self._loudness = array("f", bytes(4 * self._n_recent))
        self._is_active = bytearray(self._n_recent)
        self._frame = 0  # frames seen
        self._floor = 0  # no window begins before this frame
        self._start: int | None = None  # first frame of the window that is open
        self._first_speech = 0
        self._quiet_since: int | None = None
        self._is_sure = False  # the speech is long enough to be some
        self._continues = False
        self._heard = False  # in this window

    @property
    def window_start(self) -> int | None:
        """First sample of the window that is open, of which a part may still turn out silent."""
        return None if self._start is None else self._sample(self._start)

    @property
    def is_speech(self) -> bool:
        """Whether the open window holds speech for certain, which goes on."""
        return self._start is not None and self._is_sure and self._quiet_since is None

    @property
    def continues(self) -> bool:
        """Whether the open window begins where one was cut for its length."""
        return self._continues

    @property
    def needed_from(self) -> int:
        """First sample that a window may still hold."""
        if self._start is not None:
            return self._sample(self._start)
        return self._sample(max(self._floor, self._frame - self._padding))

    def push(self, probability: float, loudness: float) -> list[Event]:
        """Take the next frame, and return what follows from it."""
        index = self._frame
        self._frame += 1
        is_loud = probability >= self._threshold
        self._loudness[index % self._n_recent] = loudness
        self._is_active[index % self._n_recent] = probability >= self._quiet_below
        if self._start is None:
            if not is_loud:
                return []
            self._start = max(self._floor, index - self._padding)
            self._first_speech = index
            self._quiet_since = None
            self._is_sure = self._continues = False
        events: list[Event] = []
        if is_loud:
            self._quiet_since = None
            self._heard = True
        elif probability < self._quiet_below and self._quiet_since is None:
            self._quiet_since = index
        if (
            not self._is_sure
            and self._quiet_since is None
            and self._frame - self._first_speech >= self._min_speech
        ):
            self._is_sure = True
            events.append(SpeechStart(self._sample(self._first_speech)))
        if self._quiet_since is not None and self._endpoint is not None:
            quiet = self._frame - self._quiet_since
            if quiet == max(self._padding, 1) and self._is_sure and self._heard:
                end, speech_end = self._window_end(), self._speech_end()
                cut = self._cut(self._sample(end), self._sample(speech_end), "endpoint")
                events.append(Pause(cut))
            if quiet >= self._endpoint:
                return events + self._end_window("endpoint", self._sample(self._frame))
        if self._frame - self._start >= self._longest:
            events += self._cut_window()
        return events

    def finish(self, n_samples: int) -> list[Event]:
        """End the audio after `n_samples`, which may lie inside the last frame."""
        if self._start is None or not self._is_sure:
            self._close()
            return []
        return self._end_window("end", self._origin + n_samples)

    def _sample(self, frame: int) -> int:
        return self._origin + frame * FRAME_SAMPLES

    def _speech_end(self) -> int:
        return self._frame if self._quiet_since is None else self._quiet_since

    def _window_end(self) -> int:
        """Return the frame at which the open window ends if nothing more is said."""
        end = min(self._speech_end() + self._padding, self._frame)
        if self._continues:
            assert self._start is not None
            end = max(end, min(self._start + self._rest, self._frame))
        return end

    def _end_window(self, reason: Literal["endpoint", "end"], last: int) -> list[Event]:
        """End the open window, `last` being the last sample there is."""
        end = self._window_end()
        events: list[Event] = []
        if self._is_sure:
            speech_end = min(self._sample(self._speech_end()), last)
            if self._heard:
                events.append(self._cut(min(self._sample(end), last), speech_end, reason))
            events.append(SpeechEnd(speech_end))
        self._floor = end
        self._close()
        return events

    def _cut(
        self, end: int, speech_end: int, reason: Literal["endpoint", "limit", "end"]
    ) -> WindowCut:
        assert self._start is not None
        start = self._sample(self._start)
        speech_start = max(self._sample(self._first_speech), start)
        return WindowCut(start, end, speech_start, speech_end, reason, self._continues)

    def _close(self) -> None:
        self._start = None
        self._heard = False

    def _cut_window(self) -> list[Event]:
        """Cut the open window, which gets too long, at a quiet place."""
        # Newest first, so that of equally quiet places the latest is taken.
        recent = [
            (self._loudness[index % self._n_recent], self._is_active[index % self._n_recent])
            for index in range(self._frame - 1, max(self._frame - self._n_recent, 0) - 1, -1)
        ]
        reach = _SMOOTHING_FRAMES // 2

        def loudness_around(back: int) -> float:
            return sum(value for value, _ in recent[max(back - reach, 0) : back + reach + 1])

        back = min(range(self._rest, self._rest + self._search), key=loudness_around)
        cut = self._frame - back
        events: list[Event] = []
        if not self._is_sure:
            # Speech on and off for so long is no noise.
            self._is_sure = True
            events.append(SpeechStart(self._sample(self._first_speech)))
        if self._heard:
            speech_end = min(self._speech_end(), cut)
            events.append(self._cut(self._sample(cut), self._sample(speech_end), "limit"))
        self._start = self._floor = cut
        self._continues = True
        self._heard = any(active for _, active in recent[:back])
        if self._quiet_since is not None:
            self._quiet_since = max(self._quiet_since, cut)
        return events


class Cutter:
    """Finds the windows of one stream of samples.

    Not thread-safe.

    Parameters
    ----------
    options
        What counts as what.
    detects_speech
        False takes everything for speech.
    """

    def __init__(self, options: SegmentationOptions, detects_speech: bool) -> None:
        self._options = options
        self._detects_speech = detects_speech
        self._restart(0)

    def _restart(self, origin: int) -> None:
        self.position = origin
        """Samples seen."""
        self._origin = origin
        self.segmenter = Segmenter(self._options, origin)
        self._detector = VoiceActivityDetector() if self._detects_speech else None

    def push(self, samples: NDArray[np.float32]) -> list[Event]:
        """Take the next samples, whole frames of `FRAME_SAMPLES`."""
        n_frames = -(-len(samples) // FRAME_SAMPLES)
        if self._detector is None:
            probabilities = [1.0] * n_frames
        else:
            probabilities = self._detector.probabilities(samples)
        events: list[Event] = []
        for probability, reach in zip(probabilities, loudness(samples), strict=True):
            events += self.segmenter.push(probability, reach)
        self.position += len(samples)
        return events

    def flush(self, rest: NDArray[np.float32]) -> list[Event]:
        """Take the last samples, less than a frame; what follows is cut without regard to them."""
        events = self.push(rest) if len(rest) else []
        events += self.segmenter.finish(self.position - self._origin)
        self._restart(self.position)
        # The last frame was filled up, but windows hold what there is; and there is no guessing.
        return [
            replace(event, end=min(event.end, self.position))
            if isinstance(event, WindowCut)
            else event
            for event in events
            if not isinstance(event, Pause)
        ]


def _frames(seconds: float) -> int:
    return round(seconds * SAMPLE_RATE / FRAME_SAMPLES)
