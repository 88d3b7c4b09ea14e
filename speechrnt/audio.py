"""Audio from files, arrays and raw PCM, as the 16 kHz mono float32 that the models take.

`load_audio` accepts all of them. FFmpeg does the decoding and the resampling, through PyAV.
Nothing here keeps state between calls: every function may be called from any thread.
"""

import logging
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, TypeAlias, TypeGuard, cast, overload

import av
import numpy as np
from numpy.typing import NDArray

from .audio_file import (
    BLOCK_SAMPLES,
    MAX_SAMPLE_RATE,
    MIN_SAMPLE_RATE,
    SAMPLE_RATE,
    AudioFile,
    AudioReader,
    resample,
    type_name,
)
from .errors import InvalidAudioError

__all__ = [
    "PCM_ENCODINGS",
    "SAMPLE_RATE",
    "Audio",
    "AudioFile",
    "AudioInput",
    "check_sample_rate",
    "decode_audio",
    "float_blocks",
    "load_audio",
    "open_audio",
]

_Samples: TypeAlias = NDArray[np.float32]

_logger = logging.getLogger(__name__)

# Divisors that bring each accepted dtype to [-1, 1).
_FULL_SCALE = {"int16": 2**15, "int32": 2**31, "float32": 1, "float64": 1}

_S16_SCALE = 1 / 32768

# Loud music stored as float may pass 1.0, but samples this large are integers in disguise.
_IMPLAUSIBLE_PEAK = 8.0

# Beyond, the power of the spectrum would overflow.
_LARGEST_PEAK = 1e15

_PCM_DTYPES = {"s16": "<i2", "s32": "<i4", "f32": "<f4", "mulaw": "u1", "alaw": "u1"}

PCM_ENCODINGS = {name: np.dtype(dtype).itemsize for name, dtype in _PCM_DTYPES.items()}
"""Names of sample formats of raw PCM, and the bytes that a sample takes."""

# How encoded files begin. PCM hardly ever does: as 16-bit samples, these are loud clicks. MPEG's
# frame sync is left out, since its bits (0xFFE) are those of small negative samples.
_CONTAINER_MAGICS = (
    *(b"RIFF", b"RF64", b"FORM", b"fLaC", b"OggS", b"\x1aE\xdf\xa3"),
    *(b"ID3\x02", b"ID3\x03", b"ID3\x04"),
)


@dataclass(frozen=True, slots=True, eq=False)
class Audio:
    """Mono audio at 16 kHz; build one with `load_audio` or a ``from_`` method.

    Attributes
    ----------
    samples : ndarray of float32, shape (n,)
        C-contiguous samples at 16 kHz; full scale is [-1, 1). May be empty, and may share the
        memory of the array that it was made from (see `from_array`).
    warnings : tuple of str
        What was wrong with the audio without making it unusable, such as a damaged file.
    source : str
        Where the audio came from, for messages: the path, the name of the file object,
        ``"array"`` or ``"pcm"``.
    """

    samples: _Samples
    warnings: tuple[str, ...] = ()
    source: str = "array"

    def __post_init__(self) -> None:
        if not isinstance(self.samples, np.ndarray) or self.samples.dtype != np.float32:
            raise InvalidAudioError(
                "samples must be a float32 array at 16 kHz; Audio.from_array makes one of others"
            )
        _check_shape(self.samples)
        if not self.samples.flags.c_contiguous:
            raise InvalidAudioError("samples must be contiguous; Audio.from_array makes them so")
        _check_peak(self.samples)

    @property
    def duration(self) -> float:
        """Length in seconds."""
        return len(self.samples) / SAMPLE_RATE

    @classmethod
    def from_array(cls, samples: NDArray[Any], sample_rate: float = SAMPLE_RATE) -> "Audio":
        """Make audio from the samples of one channel.

        Contiguous float32 samples at 16 kHz are not copied: the result is then a view of
        `samples`, which must not change while the audio is in use.

        Parameters
        ----------
        samples : ndarray of int16, int32, float32 or float64, shape (n,)
            Integers are divided by 2**15 or 2**31; floats are expected within [-1, 1]. Either
            byte order will do.
        sample_rate : int
            Samples per second, 1000 to 768000. Other rates than 16000 are resampled by
            libswresample in float32.

        Raises
        ------
        InvalidAudioError
            If the dtype, shape or rate is not one of the above, or a sample is NaN or infinite.
        """
        rate = check_sample_rate(sample_rate)
        floats, warnings = _to_float32(samples)
        return cls(_resample_array(floats, rate), warnings, "array")

    @classmethod
    def from_pcm(
        cls,
        data: bytes | bytearray | memoryview,
        encoding: str = "s16",
        sample_rate: float = SAMPLE_RATE,
        channels: int = 1,
    ) -> "Audio":
        """Make audio from raw PCM bytes, such as a telephone or a sound card delivers.

        The result never shares memory that can change: `data` may be reused at once.

        Parameters
        ----------
        data : bytes, bytearray or memoryview
            Whole frames, little endian, channels interleaved.
        encoding : {"s16", "s32", "f32", "mulaw", "alaw"}
            Sample format; the last two are the G.711 codes, which are usually at 8000 Hz.
        sample_rate : int
            Samples per second, 1000 to 768000.
        channels : {1, 2}
            Two channels are averaged, with equal weights as in libswresample's downmix, but in
            float32 where that would round to 16 bits.

        Raises
        ------
        InvalidAudioError
            If an argument is not one of the above, the bytes are not a whole number of frames,
            or an f32 sample is NaN or infinite.
        """
        rate = check_sample_rate(sample_rate)
        if encoding not in _PCM_DTYPES:
            raise InvalidAudioError(
                f"encoding={encoding!r} is not known; use one of {', '.join(_PCM_DTYPES)}"
            )
        if channels not in (1, 2):
            raise InvalidAudioError(f"channels={channels!r} is not supported; use 1 or 2")
        if not isinstance(data, bytes | bytearray | memoryview):
            raise InvalidAudioError(f"PCM data must be bytes, not {type_name(data)}")
        if isinstance(data, memoryview) and data.itemsize != 1:
            raise InvalidAudioError(
                f"PCM data is a memoryview of format {data.format!r}, not of bytes: "
                "cast it with .cast('B') if its samples are in the stated encoding"
            )
        data = bytes(data)  # copies what could change, and leaves bytes as they are
        dtype = np.dtype(_PCM_DTYPES[encoding])
        frame_bytes = dtype.itemsize * channels
        if len(data) % frame_bytes:
            raise InvalidAudioError(
                f"{len(data)} bytes of PCM are not a whole number of {frame_bytes}-byte frames "
                f"({encoding}, channels={channels}): check both, and keep what is left of a "
                "chunk for the next one"
            )
        coded: NDArray[Any] = np.frombuffer(data, dtype)
        if encoding in ("mulaw", "alaw"):
            coded = _g711_samples(encoding)[coded]
        floats, warnings = _to_float32(coded)
        if channels == 2:
            floats = np.float32(0.5) * floats[0::2] + np.float32(0.5) * floats[1::2]
        return cls(_resample_array(floats, rate), warnings, "pcm")

    @classmethod
    def from_file(cls, file: AudioFile) -> "Audio":
        """Decode the first audio stream of a file, downmixed to mono.

        Anything that FFmpeg can read will do: wav, flac, mp3, m4a, mp4, ogg, webm and others.
        What can be read of a truncated or damaged file is returned, and `warnings` says what
        is missing. Raw MPEG without a LAME tag, ADTS and Ogg do not state their length, so a
        clean cut at the end of those cannot be told.

        Parameters
        ----------
        file : str, PathLike or binary file object
            A string is always a path: URLs are not fetched, nor are files that a playlist
            names. A seekable file object is read from its beginning, wherever it stands, and
            others from where they are; it is left open, at no particular position, and must
            not be used by another thread meanwhile.

        Raises
        ------
        AudioNotFoundError
            If the path does not exist.
        AudioFileError
            If the file cannot be opened or read, or holds no audio that can be decoded.
        InvalidAudioError
            If `file` is neither a path nor a readable binary file object.
        """
        samples, warnings, source = _decode_file(file, SAMPLE_RATE, "mono")
        return cls(samples, warnings, source)


AudioInput: TypeAlias = Audio | AudioFile | NDArray[Any] | bytes | bytearray | memoryview
"""What `load_audio` accepts."""


def load_audio(audio: AudioInput) -> Audio:
    """Bring audio of any accepted kind to 16 kHz mono float32.

    Parameters
    ----------
    audio : Audio, str, PathLike, binary file object, ndarray, bytes, bytearray or memoryview
        An `Audio` is returned as it is, paths and file objects are decoded
        (`Audio.from_file`), an array is 16 kHz mono (`Audio.from_array`, which may share its
        memory), and bytes are 16 kHz mono PCM of 16 bits, little endian (`Audio.from_pcm`).

    Raises
    ------
    AudioNotFoundError
        If a path does not exist.
    AudioFileError
        If a file holds no audio that can be decoded.
    InvalidAudioError
        If `audio` is none of the above, or its samples are unusable, or bytes hold an encoded
        file, which belongs in an `io.BytesIO`.
    """
    if isinstance(audio, Audio):
        return audio
    if isinstance(audio, np.ndarray):
        return Audio.from_array(audio)
    if isinstance(audio, bytes | bytearray | memoryview):
        head = bytes(audio[:8])
        if head.startswith(_CONTAINER_MAGICS) or head[4:] == b"ftyp":
            raise InvalidAudioError(
                "these bytes are an encoded file, not raw PCM: wrap them in io.BytesIO "
                "(or use Audio.from_pcm if they are PCM after all)"
            )
        return Audio.from_pcm(audio)
    if _is_file(audio):
        return Audio.from_file(audio)
    raise InvalidAudioError(
        f"audio of type {type_name(audio)} is not accepted: pass a path, a binary file object, "
        "bytes of 16-bit PCM, an Audio, or a 1-D NumPy array at 16 kHz "
        "(numpy.asarray converts lists and CPU tensors)"
    )


def open_audio(audio: AudioInput) -> Audio | AudioReader:
    """Open a file to be decoded piece by piece; bring all other audio to samples at once.

    So is a file decoded whose header does not say how long it is: nothing less would tell.

    Returns
    -------
    Audio or AudioReader
        The reader is of 16 kHz mono and knows its length; see `float_blocks`.

    Raises
    ------
    AudioNotFoundError, AudioFileError, InvalidAudioError
        As `load_audio`.
    """
    if not _is_file(audio):
        return load_audio(audio)
    reader = AudioReader(audio)
    if reader.states_length and reader.is_plausible:
        return reader
    with reader:
        return Audio(*_read_all(reader))


def float_blocks(audio: Audio | AudioReader) -> Iterator[_Samples]:
    """Yield the samples in blocks of a few seconds, as `load_audio` would return them."""
    if isinstance(audio, Audio):
        for start in range(0, len(audio.samples), BLOCK_SAMPLES):
            yield audio.samples[start : start + BLOCK_SAMPLES]
        return
    for block in audio:
        yield np.multiply(block, _S16_SCALE, dtype=np.float32)


@overload
def decode_audio(
    input_file: AudioFile, sampling_rate: int = ..., split_stereo: Literal[False] = ...
) -> _Samples: ...


@overload
def decode_audio(
    input_file: AudioFile, sampling_rate: int = ..., *, split_stereo: Literal[True]
) -> tuple[_Samples, _Samples]: ...


@overload
def decode_audio(
    input_file: AudioFile, sampling_rate: int, split_stereo: Literal[True]
) -> tuple[_Samples, _Samples]: ...


def decode_audio(
    input_file: AudioFile, sampling_rate: int = SAMPLE_RATE, split_stereo: bool = False
) -> _Samples | tuple[_Samples, _Samples]:
    """Decode a file as `faster_whisper.decode_audio` does, sample for sample.

    What `Audio.warnings` would hold is logged, at level WARNING.

    Parameters
    ----------
    input_file : str, PathLike or binary file object
        See `Audio.from_file`.
    sampling_rate : int
        Samples per second of the result, 1000 to 768000.
    split_stereo : bool
        Return both channels (twice the same for mono files) instead of their mix.

    Returns
    -------
    ndarray of float32, shape (n,), or a tuple (left, right) of two such
        Samples in [-1, 1).

    Raises
    ------
    AudioError
        As `Audio.from_file`; InvalidAudioError also if the rate is out of range.
    """
    layout = "stereo" if split_stereo else "mono"
    samples, warnings, _ = _decode_file(input_file, check_sample_rate(sampling_rate), layout)
    for warning in warnings:
        _logger.warning(warning)
    if split_stereo:
        return samples[0::2].copy(), samples[1::2].copy()
    return samples


def _is_file(audio: object) -> TypeGuard[AudioFile]:
    return isinstance(audio, str | os.PathLike) or hasattr(audio, "read")


def check_sample_rate(rate: float) -> int:
    """Return a sample rate as an integer.

    Raises
    ------
    InvalidAudioError
        If it is not a whole number of Hz from 1000 to 768000.
    """
    if (
        isinstance(rate, bool)
        or not isinstance(rate, int | float | np.integer)
        or not float(rate).is_integer()
        or not MIN_SAMPLE_RATE <= rate <= MAX_SAMPLE_RATE
    ):
        raise InvalidAudioError(
            f"the sample rate {rate!r} is not a whole number of Hz from {MIN_SAMPLE_RATE} to "
            f"{MAX_SAMPLE_RATE}"
        )
    return int(rate)


def _to_float32(samples: NDArray[Any]) -> tuple[_Samples, tuple[str, ...]]:
    """Check samples and bring them to [-1, 1); return them and what looks wrong with them."""
    if not isinstance(samples, np.ndarray):
        raise InvalidAudioError(
            f"samples must be a NumPy array, not {type_name(samples)}: use numpy.asarray"
        )
    if isinstance(samples, np.ma.MaskedArray):
        raise InvalidAudioError("array with a mask: say what is there instead, with .filled(0)")
    dtype = samples.dtype.name
    if dtype not in _FULL_SCALE:
        raise InvalidAudioError(
            f"array of dtype {dtype}: samples must be one of {', '.join(_FULL_SCALE)}"
        )
    _check_shape(samples)
    if dtype.startswith("int"):
        return np.multiply(samples, 1 / _FULL_SCALE[dtype], dtype=np.float32, order="C"), ()

    with np.errstate(over="ignore"):  # float64 beyond float32: reported below
        floats = np.ascontiguousarray(samples, dtype=np.float32)
    peak = _check_peak(floats, samples)
    if peak > _IMPLAUSIBLE_PEAK:
        return floats, (
            f"the samples reach {peak:.6g} where full scale is 1.0: if they are 16-bit integers "
            "stored as floats, divide them by 32768",
        )
    return floats, ()


def _check_shape(samples: NDArray[Any]) -> None:
    if samples.ndim != 1:
        raise InvalidAudioError(
            f"array of shape {samples.shape}: pass the samples of one channel as a 1-D array; "
            "of an array of shape (n, channels), audio[:, 0] picks the first channel and "
            "audio.mean(axis=1, dtype='float32') averages floats"
        )


def _check_peak(samples: _Samples, original: NDArray[Any] | None = None) -> float:
    """Return the largest magnitude, after a check that all samples can be computed with.

    The message of the error quotes the sample of `original`, if given.
    """
    if not samples.size:
        return 0.0
    # Two reductions instead of isfinite() and abs(), which would each make a whole array.
    peak = max(-float(samples.min()), float(samples.max()))
    if not peak <= _LARGEST_PEAK:  # NaN compares false
        index = int(np.flatnonzero(~(np.abs(samples) <= _LARGEST_PEAK))[0])
        quoted = samples if original is None else original
        raise InvalidAudioError(
            f"sample {index} of the array is {quoted[index]}: samples must be finite numbers, "
            "and full scale is 1.0; find out where it comes from, or replace it with "
            "numpy.nan_to_num"
        )
    return peak


@cache
def _g711_samples(encoding: str) -> NDArray[np.int16]:
    """Return the samples that the 256 bytes of a G.711 code stand for."""
    decoder = cast("av.AudioCodecContext", av.CodecContext.create(f"pcm_{encoding}", "r"))
    decoder.sample_rate = 8000
    decoder.layout = "mono"
    [frame] = decoder.decode(av.Packet(bytes(range(256))))
    return cast("NDArray[np.int16]", frame.to_ndarray()[0])


def _resample_array(samples: _Samples, rate: int) -> _Samples:
    if rate == SAMPLE_RATE or not samples.size:
        return samples
    blocks = resample(_array_frames(samples, rate), "flt", "mono", SAMPLE_RATE)
    return _concatenate(blocks, 1.0, capacity=len(samples) * SAMPLE_RATE // rate + 1)


def _array_frames(samples: _Samples, rate: int) -> Iterator[av.AudioFrame]:
    for start in range(0, len(samples), BLOCK_SAMPLES):
        block = samples[np.newaxis, start : start + BLOCK_SAMPLES]
        frame = av.AudioFrame.from_ndarray(block, format="flt", layout="mono")
        frame.sample_rate = rate
        yield frame


def _concatenate(blocks: Iterable[NDArray[Any]], scale: float, capacity: int) -> _Samples:
    """Join blocks into one float32 array, multiplied by `scale`; `capacity` is a guess."""
    samples = np.empty(capacity, np.float32)
    end = 0
    for block in blocks:
        start, end = end, end + len(block)
        if end > len(samples):
            samples.resize(max(end, len(samples) * 3 // 2), refcheck=False)
        np.multiply(block, scale, out=samples[start:end], dtype=np.float32)
    # A view wastes little where the guess was good; resizing copies in some versions of NumPy.
    return samples[:end] if end >= len(samples) * 3 // 4 else samples[:end].copy()


def _decode_file(file: AudioFile, rate: int, layout: str) -> tuple[_Samples, tuple[str, ...], str]:
    """Return the samples (channels interleaved), the warnings, and the name of the file."""
    with AudioReader(file, rate, layout) as reader:
        return _read_all(reader)


def _read_all(reader: AudioReader) -> tuple[_Samples, tuple[str, ...], str]:
    samples = _concatenate(reader, _S16_SCALE, reader.capacity)
    return samples, reader.warnings, reader.name
