"""Audio that arrives in pieces, brought to 16 kHz mono float32."""

from __future__ import annotations

import contextlib
from fractions import Fraction
from typing import Any, TypeAlias

import av
import numpy as np
from numpy.typing import NDArray

from .audio import PCM_ENCODINGS, SAMPLE_RATE, Audio, check_sample_rate
from .errors import InvalidAudioError

__all__ = ["AudioChunk", "PcmReader"]

AudioChunk: TypeAlias = NDArray[Any] | bytes | bytearray | memoryview
"""A piece of audio: samples, or bytes of the declared encoding."""


class PcmReader:
    """Reads one stream's pieces. Equal audio gives equal samples, however it is cut.

    Not thread-safe.

    Parameters
    ----------
    sample_rate
        Of what arrives, 1000 to 768000 Hz.
    encoding
        Of the bytes that arrive, little endian: ``"s16"``, ``"s32"``, ``"f32"``, ``"mulaw"`` or
        ``"alaw"``. Arrays say by their dtype what they hold.

    Raises
    ------
    InvalidAudioError
        If one of them is none of these.
    """

    def __init__(self, sample_rate: int = SAMPLE_RATE, encoding: str = "s16") -> None:
        self._rate = check_sample_rate(sample_rate)
        if encoding not in PCM_ENCODINGS:
            raise InvalidAudioError(
                f"encoding={encoding!r} is not known; use one of {', '.join(PCM_ENCODINGS)}"
            )
        self._encoding = encoding
        self._sample_bytes = PCM_ENCODINGS[encoding]
        self.warnings: tuple[str, ...] = ()
        """What was wrong with the first piece that anything was wrong with."""
        self._carry = b""  # bytes of a sample that has not come whole
        self._resampler: _Resampler | None = None

    def read(self, chunk: AudioChunk) -> NDArray[np.float32]:
        """Return the samples that a piece makes complete; they share no memory with it.

        Raises
        ------
        InvalidAudioError
            If it is no piece of audio. Nothing was taken.
        """
        if isinstance(chunk, np.ndarray):
            if self._carry:
                raise InvalidAudioError(
                    f"{len(self._carry)} bytes of a sample wait for the rest of it, and an array "
                    "has come instead"
                )
            audio = Audio.from_array(chunk)
            samples = audio.samples
            if np.may_share_memory(samples, chunk):
                samples = samples.copy()
        elif isinstance(chunk, bytes | bytearray | memoryview):
            if isinstance(chunk, memoryview) and chunk.itemsize != 1:
                raise InvalidAudioError(
                    f"the chunk is a memoryview of format {chunk.format!r}, not of bytes: cast it "
                    "with .cast('B') if its samples are in the declared encoding"
                )
            data = self._carry + bytes(chunk)
            whole = len(data) - len(data) % self._sample_bytes
            # The rate is seen to below, where the resampler lives on.
            audio = Audio.from_pcm(data[:whole], self._encoding)
            samples = audio.samples
            self._carry = data[whole:]
        else:
            raise InvalidAudioError(
                f"a chunk of audio must be bytes or a NumPy array, not {type(chunk).__name__}"
            )
        self.warnings = self.warnings or audio.warnings
        if self._rate == SAMPLE_RATE or not samples.size:
            return samples
        if self._resampler is None:
            self._resampler = _Resampler(self._rate)
        return self._resampler.push(samples)

    def finish(self) -> NDArray[np.float32]:
        """Return the last samples. The bytes of a sample that never came whole are dropped."""
        self._carry = b""
        if self._resampler is None:
            return np.empty(0, dtype=np.float32)
        return self._resampler.push(None)


class _Resampler:
    """libswresample, as in `av.AudioResampler`, but without that one's two threads a stream."""

    def __init__(self, rate: int) -> None:
        self._rate = rate
        self._graph = graph = av.filter.Graph()
        graph.threads = 1
        graph.link_nodes(
            graph.add_abuffer(
                sample_rate=rate, format="flt", layout="mono", time_base=Fraction(1, rate)
            ),
            graph.add(
                "aformat", f"sample_rates={SAMPLE_RATE}:sample_fmts=flt:channel_layouts=mono"
            ),
            graph.add("abuffersink"),
        ).configure()

    def push(self, samples: NDArray[np.float32] | None) -> NDArray[np.float32]:
        """Return what samples make complete; the rest for None."""
        frame = None
        if samples is not None:
            frame = av.AudioFrame.from_ndarray(samples[np.newaxis], format="flt", layout="mono")
            frame.sample_rate = self._rate
        self._graph.push(frame)
        blocks: list[NDArray[np.float32]] = [np.empty(0, dtype=np.float32)]
        with contextlib.suppress(av.BlockingIOError, av.EOFError):
            while True:
                blocks.append(self._graph.pull().to_ndarray().reshape(-1))
        return np.concatenate(blocks)
