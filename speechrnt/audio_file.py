"""Encoded files, decoded by FFmpeg through PyAV: block by block, past damage, and accounted for."""

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import chain, groupby
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, TypeAlias, cast

import av
import numpy as np
from av.container import InputContainer
from numpy.typing import NDArray

from .errors import AudioFileError, AudioNotFoundError, InvalidAudioError

__all__ = [
    "BLOCK_SAMPLES",
    "LENGTH_TOLERANCE_S",
    "MAX_SAMPLE_RATE",
    "MIN_SAMPLE_RATE",
    "SAMPLE_RATE",
    "AudioFile",
    "AudioReader",
    "resample",
    "type_name",
]

SAMPLE_RATE = 16_000
"""Samples per second of everything that leaves this module, unless asked otherwise."""

AudioFile: TypeAlias = str | os.PathLike[str] | BinaryIO
"""What can be decoded: a path, or a file object opened in binary mode."""

MIN_SAMPLE_RATE = 1_000
MAX_SAMPLE_RATE = 768_000

# A playlist (HLS, ffconcat, SDP) given as audio would make FFmpeg read other files, or fetch
# URLs, on behalf of whoever sent it. No protocol has this name, so nothing else is opened.
_OPEN_NOTHING_ELSE = {"protocol_whitelist": "none"}

# Frames are gathered to about this many samples before they are resampled: one call per frame
# (20 ms or so of audio) would cost more than the resampling.
BLOCK_SAMPLES = 65_536

# A header may claim any duration. Memory is set aside only for what the file could hold at
# 2 kbit/s, below which no codec for speech goes.
_MIN_BYTES_PER_S = 250

# FFmpeg's names of formats that state the length of their audio. For others it estimates one from
# the bit rate of the first frames, which may be far off.
_FORMATS_STATING_LENGTH = frozenset({"aiff", "flac", "mov,mp4,m4a,3gp,3g2,mj2", "ogg", "wav"})

# Encoder delay and padding make undamaged files differ from the length that they state; Opus in
# frames of 120 ms most.
LENGTH_TOLERANCE_S = 0.25

# Programs that write WAV to a pipe cannot know its size and put 0 or a value from here up.
_UNKNOWN_RIFF_SIZE = 0x7FFF_F000


class AudioReader:
    """The first audio stream of a file, decoded as it is iterated over, once.

    Yields 1-D arrays of int16, channels interleaved. What can be read of a damaged file is. Not
    thread-safe; close it, or use it in a ``with`` statement.

    Parameters
    ----------
    file : str, PathLike or binary file object
        See `Audio.from_file`.
    rate : int
        Samples per second of what is yielded.
    layout : {"mono", "stereo"}
        Channels of what is yielded.

    Attributes
    ----------
    name : str
        The path, or what the file object calls itself.
    expected_s : float
        Seconds of audio that FFmpeg expects before decoding any; 0.0 if it has no idea.
    states_length : bool
        Whether `expected_s` is what the header says. Otherwise it is a guess, which may be far off.
    duration : float or None
        Seconds of audio, once all has been decoded.
    warnings : tuple of str
        What turned out to be wrong, once all has been decoded.

    Raises
    ------
    AudioNotFoundError
        If the path does not exist.
    AudioFileError
        If the file cannot be opened or holds no audio; on iteration, if it cannot be read or none
        of it can be decoded.
    InvalidAudioError
        If `file` is neither a path nor a readable binary file object.
    """

    def __init__(self, file: AudioFile, rate: int = SAMPLE_RATE, layout: str = "mono") -> None:
        self._rate = rate
        self._layout = layout
        self.duration: float | None = None
        self.warnings: tuple[str, ...] = ()
        self._own_file: BinaryIO | None = None
        self._container: InputContainer | None = None
        if isinstance(file, str | os.PathLike):
            self.name = os.fsdecode(file)
            file = self._own_file = _open(self.name)
        else:
            self.name = _check_file_object(file)
        self._file = file
        try:
            with self._errors():
                self._open_stream(file)
        except BaseException:
            self.close()
            raise

    def _open_stream(self, file: BinaryIO) -> None:
        name = self.name
        self._size, self._missing = _measure(file)
        if self._size == 0:
            raise AudioFileError(f"{name!r}: the file is empty (0 bytes); give an audio file")
        container = self._container = av.open(
            file, mode="r", options=_OPEN_NOTHING_ELSE, metadata_errors="ignore"
        )
        if not container.streams.audio:
            kinds = ", ".join(sorted({stream.type for stream in container.streams})) or "nothing"
            raise AudioFileError(
                f"{name!r}: no audio stream, only {kinds}; give a file with sound in it"
            )
        stream = container.streams.audio[0]
        if stream.codec_context is None:
            raise AudioFileError(
                f"{name!r}: FFmpeg has no decoder for this audio; convert the file to wav or flac"
            )
        if not MIN_SAMPLE_RATE <= stream.codec_context.sample_rate <= MAX_SAMPLE_RATE:
            raise AudioFileError(
                f"{name!r}: the header claims a sample rate of {stream.codec_context.sample_rate} "
                f"Hz; audio from {MIN_SAMPLE_RATE} to {MAX_SAMPLE_RATE} Hz can be decoded"
            )
        self.expected_s = _duration(container, stream)
        self.states_length = self.expected_s > 0 and _states_length(container, stream)
        self._stream = stream

    @property
    def capacity(self) -> int:
        """About how many samples there will be, channels added; no more than the file can hold."""
        seconds = min(self.expected_s, self._most_s)
        return int(seconds * self._rate * (2 if self._layout == "stereo" else 1)) + BLOCK_SAMPLES

    @property
    def is_plausible(self) -> bool:
        """Whether a file of this size can last as long as expected, if the size is known."""
        return self._size is None or self.expected_s <= self._most_s

    @property
    def _most_s(self) -> float:
        return (self._size or 0) / _MIN_BYTES_PER_S

    def __iter__(self) -> Iterator[NDArray[np.int16]]:
        assert self._container is not None, "the reader is closed"
        with self._errors():
            frames = _FrameReader(self._container, self._stream)
            n_samples = 0
            for block in resample(frames, "s16", self._layout, self._rate):
                n_samples += len(block)
                yield block
            self._judge(frames)
            self.duration = n_samples / self._rate / (2 if self._layout == "stereo" else 1)

    def _judge(self, frames: "_FrameReader") -> None:
        """Say what was wrong with the file, from what came out of it."""
        name = self.name
        stated = self.expected_s if self.states_length else 0.0
        if self._missing and self._stream.codec_context.bit_rate:
            stated += 8 * self._missing / self._stream.codec_context.bit_rate
        is_short = frames.seconds < stated - LENGTH_TOLERANCE_S
        if not frames.seconds and (is_short or frames.first_error):
            raise AudioFileError(
                f"{name!r}: none of the audio can be decoded "
                f"({frames.first_error or 'no data after the header'}); the file is damaged"
            ) from frames.first_error

        warnings = []
        if frames.first_error:
            warnings.append(
                f"{name!r}: {frames.errors} damaged packet(s) skipped, the first at "
                f"{frames.first_error_at:.2f} s ({frames.first_error.strerror})"
            )
        if is_short:
            warnings.append(
                f"{name!r}: only {frames.seconds:.2f} s of audio could be decoded, of "
                f"{stated:.2f} s that the header states: the file is cut short or damaged"
            )
        self.warnings = tuple(warnings)

    def close(self) -> None:
        """Free the decoder, and close the file if it was given by its path."""
        container, self._container = self._container, None
        if container is not None:
            container.close()
        if self._own_file is not None:
            self._own_file.close()

    @contextmanager
    def _errors(self) -> Iterator[None]:
        """Raise what goes wrong with the file or its contents as an `AudioFileError`."""
        try:
            yield
        except (av.FFmpegError, OSError) as error:
            raise AudioFileError(
                f"{self.name!r}: cannot be decoded ({error.strerror or error}); give an audio or "
                "video file of a format that FFmpeg reads, such as wav, flac, mp3, m4a or ogg, "
                "and check that it is complete"
            ) from error
        except ValueError as error:
            if not getattr(self._file, "closed", False):
                raise
            raise AudioFileError(
                f"{self.name!r}: closed while it was being decoded; keep the file open until the "
                "last segment has been decoded"
            ) from error

    def __enter__(self) -> "AudioReader":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def type_name(value: object) -> str:
    """Return the name of a value's type, for messages."""
    cls = type(value)
    return cls.__name__ if cls.__module__ == "builtins" else f"{cls.__module__}.{cls.__name__}"


def resample(
    frames: Iterable[av.AudioFrame], sample_format: str, layout: str, rate: int
) -> Iterator[NDArray[Any]]:
    """Yield the resampled samples block by block, channels interleaved."""
    # Streams that were joined together may change their format on the way; a resampler cannot.
    for _, run in groupby(frames, lambda f: (f.format.name, f.layout.name, f.sample_rate)):
        resampler = av.AudioResampler(format=sample_format, layout=layout, rate=rate)
        for block in chain(_merge(run), [None]):  # None flushes the resampler
            for resampled in resampler.resample(block):
                yield resampled.to_ndarray().reshape(-1)


def _merge(frames: Iterable[av.AudioFrame]) -> Iterator[av.AudioFrame]:
    """Join frames of one format to frames of about `BLOCK_SAMPLES`."""
    fifo = av.AudioFifo()
    for frame in frames:
        fifo.write(frame)
        if fifo.samples >= BLOCK_SAMPLES:
            yield cast("av.AudioFrame", fifo.read())
    if fifo.samples:
        yield cast("av.AudioFrame", fifo.read())


def _open(path: str) -> BinaryIO:
    # Opened here and not by FFmpeg, which would take "a:b.wav" for a protocol.
    try:
        return Path(path).open("rb", buffering=0)
    except (FileNotFoundError, NotADirectoryError) as error:
        if "://" in path:
            raise AudioNotFoundError(
                f"{path!r}: URLs are not fetched; download the file and pass its path"
            ) from error
        raise AudioNotFoundError(
            f"{path!r}: no such file (the full path would be {str(Path(path).absolute())!r})"
        ) from error
    except IsADirectoryError as error:
        raise AudioFileError(f"{path!r}: this is a directory; pass one audio file") from error
    except (OSError, ValueError) as error:  # ValueError: a null character in the path
        raise AudioFileError(
            f"{path!r}: cannot be opened ({error}); pass a file that this user may read"
        ) from error


def _check_file_object(file: BinaryIO) -> str:
    """Return the name of a binary file object, or raise if it cannot be read."""
    if not hasattr(file, "read"):
        raise InvalidAudioError(
            f"an audio file must be a path or a binary file object, not {type_name(file)}"
        )
    name = getattr(file, "name", None)
    if not isinstance(name, str):
        name = type(file).__name__
    try:
        nothing: object = file.read(0)
    except (OSError, ValueError) as error:
        raise InvalidAudioError(
            f"{name!r}: the file object cannot be read ({error}); pass one that is open, in "
            "mode 'rb'"
        ) from error
    if not isinstance(nothing, bytes):
        raise InvalidAudioError(
            f"{name!r}: the file object reads {type_name(nothing)} instead of bytes; open the "
            "file in mode 'rb'"
        )
    return name


def _measure(file: BinaryIO) -> tuple[int | None, int]:
    """Rewind a seekable file; return its size and how many bytes its RIFF header misses.

    FFmpeg takes the length of a WAV file from its size, so only the header tells that the end
    is missing. The size of a file that cannot seek is None.
    """
    seekable = getattr(file, "seekable", None)
    if not hasattr(file, "seek") or (seekable is not None and not seekable()):
        return None, 0
    file.seek(0, os.SEEK_END)
    size = file.tell()
    file.seek(0)
    head = file.read(8)
    file.seek(0)
    riff_size = int.from_bytes(head[4:], "little")
    if head[:4] != b"RIFF" or riff_size >= _UNKNOWN_RIFF_SIZE:
        return size, 0
    return size, max(0, riff_size + len(head) - size)


def _duration(container: InputContainer, stream: av.AudioStream) -> float:
    """Return the seconds of audio that FFmpeg expects, or 0.0 if it has no idea."""
    if stream.duration is not None and stream.time_base is not None:
        seconds = float(stream.duration * stream.time_base)
    else:
        seconds = (container.duration or 0) / av.time_base
    return max(seconds, 0.0)  # a damaged header may say anything


def _states_length(container: InputContainer, stream: av.AudioStream) -> bool:
    """Tell whether `_duration` is what the header of the file says of this stream."""
    if container.format.name == "mp3":
        # The LAME tag, which counts the frames, also holds the delay of the encoder. FFmpeg
        # shows that as the start time, and gives no other sign of the tag.
        return bool(stream.start_time)
    if container.format.name == "matroska,webm":
        # It states one duration for the whole file, and video may last longer.
        return len(container.streams) == 1
    return container.format.name in _FORMATS_STATING_LENGTH


class _FrameReader:
    """Iterate over the frames of a stream, past damaged packets, and keep account of those.

    Attributes
    ----------
    seconds : float
        Decoded so far.
    errors : int
        Packets skipped so far.
    first_error : av.FFmpegError or None
    first_error_at : float
        Position in the decoded audio, in seconds.
    """

    def __init__(self, container: InputContainer, stream: av.AudioStream) -> None:
        self._packets = container.demux(stream)
        self.seconds = 0.0
        self.errors = 0
        self.first_error: av.FFmpegError | None = None
        self.first_error_at = 0.0

    def __iter__(self) -> Iterator[av.AudioFrame]:
        try:
            for packet in self._packets:
                try:
                    frames = packet.decode()
                except av.FFmpegError as error:
                    self._note(error)
                    continue
                for frame in frames:
                    self.seconds += frame.samples / frame.sample_rate
                    frame.pts = None  # the FIFO would insist on timestamps without gaps
                    yield frame
        except av.FFmpegError as error:  # the container itself breaks off here
            self._note(error)

    def _note(self, error: av.FFmpegError) -> None:
        self.errors += 1
        if self.first_error is None:
            # The traceback refers to this object: keeping it would make a reference cycle, and
            # the decoder's memory would wait for the garbage collector.
            self.first_error = error.with_traceback(None)
            self.first_error_at = self.seconds
