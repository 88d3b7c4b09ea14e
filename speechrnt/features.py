"""Log-mel features cut into the windows that the encoder takes.

Three ways, one interface (`Windows`): `FullContextWindows` is faster-whisper's, every window 30 s
long whatever the audio; `OwnMaximumWindows` are as long and need nothing but their own audio;
`ReducedContextWindows` give the encoder only the audio and a margin.
"""

from __future__ import annotations

import functools
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from . import _filter_bank, _mel
from .audio import SAMPLE_RATE
from .mel_frames import MelFrames

__all__ = [
    "FRAMES_PER_SECOND",
    "WINDOW_FRAMES",
    "FeatureExtractor",
    "FullContextWindows",
    "OwnMaximumWindows",
    "ReducedContextWindows",
    "Window",
    "Windows",
]

N_FFT = 400
HOP_LENGTH = 160
FRAMES_PER_SECOND = SAMPLE_RATE // HOP_LENGTH
WINDOW_SECONDS = 30
WINDOW_FRAMES = WINDOW_SECONDS * FRAMES_PER_SECOND
"""Mel frames that Whisper's encoder was made for."""

# Reduced contexts come in steps of half a second, so that few distinct shapes occur.
_CONTEXT_STEP_FRAMES = 50

# A window that has to end before the audio does ends at the quietest place of this many of its
# last frames, judged over the neighbourhood of a short pause.
_CUT_SEARCH_FRAMES = 3 * FRAMES_PER_SECOND
_CUT_SMOOTHING_FRAMES = 15

_LOG10_SILENCE = np.float32(-10.0)

# BLAS sums products of fewer frames in other ways.
_LEAST_FRAMES = 32


class FeatureExtractor:
    """Whisper's log-mel spectrogram with faster-whisper's arithmetic.

    The same NumPy operations in the same order, so that the features are equal to the last bit
    wherever both run. `_mel.log_mel` differs in the last bits and is many times as fast; but a
    quantised model that is unsure of the audio turns such differences into other tokens, and the
    drop-in path promises the same ones.

    Parameters
    ----------
    feature_size
        Number of mel bands: 80 or 128.

    Attributes
    ----------
    sampling_rate, n_fft, hop_length : int
        Samples per second; samples per transform; samples from one frame to the next.
    chunk_length, n_samples, nb_max_frames : int
        Length of the encoder's window in seconds, samples and frames.
    time_per_frame : float
        Seconds from one frame to the next.
    mel_filters : (feature_size, n_fft // 2 + 1) ndarray of float32
        The weights of the bands.
    """

    sampling_rate = SAMPLE_RATE
    n_fft = N_FFT
    hop_length = HOP_LENGTH
    chunk_length = WINDOW_SECONDS
    n_samples = WINDOW_SECONDS * SAMPLE_RATE
    nb_max_frames = WINDOW_FRAMES
    time_per_frame = HOP_LENGTH / SAMPLE_RATE

    def __init__(self, feature_size: int = 80) -> None:
        self.feature_size = feature_size
        self.mel_filters = _mel.mel_filters(feature_size)
        self._has_own_product = _blas_sums_in_order(feature_size)

    def __call__(self, waveform: ArrayLike) -> NDArray[np.float32]:
        """Return the normalised log-mel spectrogram of a whole signal.

        Parameters
        ----------
        waveform : (n,) array
            Mono samples at `sampling_rate`.

        Returns
        -------
        (feature_size, n // hop_length + 1) ndarray of float32
        """
        return self.log_mel(self.mel_power(waveform))

    def mel_power(self, waveform: ArrayLike) -> NDArray[np.float32]:
        """Return the power of a whole signal in each mel band, the first half of the work.

        The signal is continued with a hop of silence, and mirrored at both ends of that.

        Returns
        -------
        (feature_size, n // hop_length + 1) ndarray of float32
        """
        samples = np.asarray(waveform, dtype=np.float32)
        n_frames = len(samples) // HOP_LENGTH + 1
        if self._has_own_product and n_frames >= _LEAST_FRAMES:
            bands = np.empty((self.feature_size, n_frames), dtype=np.float32)
            for start, power in _power_spectrum(samples, n_frames):
                if not np.isfinite(power).all():
                    break  # where BLAS makes zero times infinity of it
                past = start + len(power)
                bands[:, start:past] = _filter_bank.filter_power(self.mel_filters, power)
            else:
                return bands
        # In one product, as the order in which BLAS sums depends on the size of the matrices.
        whole = np.empty((n_frames, N_FFT // 2 + 1), dtype=np.float32)
        for start, power in _power_spectrum(samples, n_frames):
            whole[start : start + len(power)] = power
        return self.mel_filters @ whole.T

    def log_mel(self, mel_power: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return the normalised log-mel spectrogram, the second half; the powers are used up."""
        log_mel = np.maximum(mel_power, 1e-10, out=mel_power)
        np.log10(log_mel, out=log_mel)
        np.maximum(log_mel, log_mel.max() - np.float32(8), out=log_mel)
        log_mel += np.float32(4)
        log_mel /= np.float32(4)
        return log_mel


def _power_spectrum(
    samples: NDArray[np.float32], n_frames: int
) -> Iterator[tuple[int, NDArray[np.float32]]]:
    """Yield the power spectrum of a signal in blocks of frames, and where they start.

    All at once, what lies between samples and power would take gigabytes for an hour.
    """
    window = np.hanning(N_FFT + 1)[:-1].astype(np.float32)
    for start in range(0, n_frames, WINDOW_FRAMES):
        padded = _mirrored(samples, start, min(start + WINDOW_FRAMES, n_frames))
        frames = np.lib.stride_tricks.sliding_window_view(padded, N_FFT)[::HOP_LENGTH]
        # NumPy before 2.0 transforms in double precision.
        spectrum = np.fft.rfft(frames * window).astype(np.complex64, copy=False)
        yield start, np.square(np.abs(spectrum))


@functools.cache
def _blas_sums_in_order(n_mels: int) -> bool:
    """Whether NumPy's matrix product gives the bits of `_filter_bank.filter_power` here."""
    if not _filter_bank.is_available():
        return False
    filters = _mel.mel_filters(n_mels)
    rng = np.random.default_rng(0)
    return all(
        np.array_equal(filters @ power.T, _filter_bank.filter_power(filters, power))
        for n_frames in (_LEAST_FRAMES, 101, 1007, WINDOW_FRAMES + 1)
        for power in [rng.random((n_frames, N_FFT // 2 + 1), dtype=np.float32)]
    )


def _mirrored(samples: NDArray[np.float32], first: int, past: int) -> NDArray[np.float32]:
    """Return the samples that the frames from `first` to `past` need."""
    reach = N_FFT // 2
    begin, end = first * HOP_LENGTH - reach, (past - 1) * HOP_LENGTH + reach
    n_samples = len(samples) + HOP_LENGTH
    piece = samples[max(begin, 0) : end]
    if begin >= 0 and end <= len(samples):
        return piece
    if n_samples <= reach:
        # Mirrored more than once.
        padded = np.pad(np.pad(samples, (0, HOP_LENGTH)), reach, mode="reflect")
        return padded[begin + reach : end + reach]
    # Whether or not the mirror images are needed, what they are made from is in reach.
    silence = np.zeros(min(max(end - len(samples), 0), HOP_LENGTH), dtype=np.float32)
    piece = np.concatenate([piece, silence])
    left, right = max(-begin, 0), max(end - n_samples, 0)
    return np.pad(piece, (left, right), mode="reflect")


@dataclass(frozen=True, eq=False)
class Window:
    """A stretch of audio, as the encoder will see it.

    Attributes
    ----------
    seek, frames
        Where its audio starts and how long it is, in mel frames.
    features : (1, n_mels, context) ndarray of float32
        What the encoder is given; ``context >= frames``, the rest is padding.
    """

    seek: int
    frames: int
    features: NDArray[np.float32]

    @property
    def start(self) -> float:
        """Seconds from the start of the audio."""
        return self.seek * FeatureExtractor.time_per_frame

    @property
    def duration(self) -> float:
        """Seconds of audio in the window."""
        return self.frames * FeatureExtractor.time_per_frame


class Windows(ABC):
    """The windows of one recording; each starts where the caller says.

    Used by one thread at a time.

    Attributes
    ----------
    window_frames
        Mel frames of the longest window.
    """

    window_frames: int = WINDOW_FRAMES

    @abstractmethod
    def content_up_to(self, limit: int) -> int:
        """Return how many mel frames the recording has, or `limit` if it has more.

        A recording that is read little by little is read no further than it takes to tell.
        """

    @abstractmethod
    def at(self, seek: int, clip_end: int = sys.maxsize) -> Window:
        """Return the window that starts at frame `seek`, with no audio from `clip_end` on."""

    def full_context(self, window: Window) -> Window:
        """Return the same audio with the encoder's full context."""
        return window

    @abstractmethod
    def forget(self, before: int) -> None:
        """Let go of the audio before a frame, for ever."""

    @abstractmethod
    def prefetch(self, past: int) -> None:
        """Begin with the features before a frame, of windows yet to come.

        Returns at once; a thread computes what is missing, if anything is.
        """

    @abstractmethod
    def close(self) -> None:
        """Stop reading, and free what is held."""


class FullContextWindows(Windows):
    """Windows of 30 s, normalised by the maximum of the whole signal and padded with zeros.

    This is faster-whisper's way, to the last bit.

    Parameters
    ----------
    features : (n_mels, n // 160 + 1) ndarray of float32
        The recording, from `FeatureExtractor`.
    window_frames
        Most mel frames of audio in one window.
    """

    def __init__(self, features: NDArray[np.float32], window_frames: int = WINDOW_FRAMES) -> None:
        self._features = features
        self.window_frames = window_frames
        # The last frame stands for less than a hop of audio and is never decoded.
        self._content_frames: int = self._features.shape[1] - 1

    def content_up_to(self, limit: int) -> int:
        """Return how many mel frames the recording has, or `limit` if it has more."""
        return min(self._content_frames, limit)

    def at(self, seek: int, clip_end: int = sys.maxsize) -> Window:
        """Return the window that starts at frame `seek`, `WINDOW_FRAMES` long with its padding."""
        frames = min(self.window_frames, min(self._content_frames, clip_end) - seek)
        features = np.zeros((1, len(self._features), WINDOW_FRAMES), dtype=np.float32)
        features[0, :, :frames] = self._features[:, seek : seek + frames]
        return Window(seek, frames, features)

    def forget(self, before: int) -> None:
        """Do nothing: the features are one array."""

    def prefetch(self, past: int) -> None:
        """Do nothing: all features are there."""

    def close(self) -> None:
        """Free the features."""
        self._features = self._features[:, :0].copy()
        self._content_frames = 0


class _GradualWindows(Windows):
    """Windows that need no audio but their own: their features are computed as the time comes."""

    def __init__(self, mel: MelFrames, window_frames: int) -> None:
        self._mel = mel
        self.window_frames = window_frames

    def content_up_to(self, limit: int) -> int:
        """Return how many mel frames the recording has, or `limit` if it has more."""
        return self._mel.content_up_to(limit)

    def forget(self, before: int) -> None:
        """Let go of the audio before a frame, for ever."""
        self._mel.forget(before)

    def prefetch(self, past: int) -> None:
        """Begin with the features before a frame, of windows yet to come."""
        self._mel.prefetch(past)

    def close(self) -> None:
        """Stop reading, and free what is held."""
        self._mel.close()

    def _window(self, seek: int, frames: int, context: int) -> Window:
        features = np.full((1, self._mel.n_mels, context), _LOG10_SILENCE, dtype=np.float32)
        features[0, :, :frames] = self._mel.between(seek, seek + frames)
        _mel.normalize(features[0], out=features[0])
        return Window(seek, frames, features)


class OwnMaximumWindows(_GradualWindows):
    """Windows of 30 s as Whisper was trained: each by itself, followed by silence.

    Parameters
    ----------
    mel
        The recording.
    window_frames
        Most mel frames of audio in one window.
    """

    def __init__(self, mel: MelFrames, window_frames: int = WINDOW_FRAMES) -> None:
        super().__init__(mel, window_frames)

    def at(self, seek: int, clip_end: int = sys.maxsize) -> Window:
        """Return the window that starts at frame `seek`, with no audio from `clip_end` on."""
        end = self.content_up_to(min(clip_end, seek + self.window_frames))
        return self._window(seek, max(0, end - seek), WINDOW_FRAMES)


class ReducedContextWindows(_GradualWindows):
    """Windows as long as their audio, normalised by their own maximum and padded with silence.

    Parameters
    ----------
    mel
        The recording.
    longest_s
        Most seconds of audio in one window. Where the audio goes on, the window ends at its
        quietest place near that length.
    margin_s
        Least silence after the audio, in seconds, as far as the encoder has room for it.
    floor_s
        Least context, in seconds.
    """

    def __init__(
        self, mel: MelFrames, *, longest_s: float, margin_s: float, floor_s: float = 0.0
    ) -> None:
        super().__init__(mel, round(longest_s * FRAMES_PER_SECOND))
        self._margin = round(margin_s * FRAMES_PER_SECOND)
        self._floor = round(floor_s * FRAMES_PER_SECOND)

    def at(self, seek: int, clip_end: int = sys.maxsize) -> Window:
        """Return the window that starts at frame `seek`, with no audio from `clip_end` on."""
        longest = self.window_frames
        frames = self.content_up_to(min(clip_end, seek + longest + 1)) - seek
        if frames > longest:
            frames = self._quietest_cut(seek)
        return self._window(seek, frames, self._context(frames))

    def full_context(self, window: Window) -> Window:
        """Return the same audio followed by silence up to `WINDOW_FRAMES`."""
        return self._window(window.seek, window.frames, WINDOW_FRAMES)

    def _context(self, frames: int) -> int:
        wanted = max(frames + self._margin, self._floor, 1)
        context = -(-wanted // _CONTEXT_STEP_FRAMES) * _CONTEXT_STEP_FRAMES
        # CTranslate2 takes an input whose second dimension is not n_mels for an encoder output, and
        # so would take an encoder output of n_mels frames for an input.
        if -(-context // 2) == self._mel.n_mels:
            context += _CONTEXT_STEP_FRAMES
        return min(context, WINDOW_FRAMES)

    def _quietest_cut(self, seek: int) -> int:
        search = min(_CUT_SEARCH_FRAMES, self.window_frames // 2)
        end = seek + self.window_frames
        loudness = self._mel.between(end - search, end).mean(axis=0)
        kernel = np.full(_CUT_SMOOTHING_FRAMES, 1 / _CUT_SMOOTHING_FRAMES, dtype=np.float32)
        smooth = np.convolve(loudness, kernel, mode="valid")
        # The latest of equally quiet places: longer windows are fewer windows.
        quietest = len(smooth) - 1 - int(np.argmin(smooth[::-1]))
        return self.window_frames - search + quietest + _CUT_SMOOTHING_FRAMES // 2
