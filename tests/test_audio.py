"""Audio input: every way in, every way it can be wrong, and the same samples as faster-whisper."""

import gc
import io
import logging
import os
import re
import socket
import struct
import sys
import tracemalloc
import wave
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import av
import numpy as np
import pytest
from audio_helpers import FORMATS, encode, encode_all, wav_bytes, with_noise_in_the_middle
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from memory_helpers import allocated_bytes

from speechrnt.audio import SAMPLE_RATE, Audio, decode_audio, load_audio
from speechrnt.errors import (
    AudioError,
    AudioFileError,
    AudioNotFoundError,
    InvalidAudioError,
    SpeechRNTError,
)

# One frame of AAC at 44.1 kHz, in samples at 16 kHz: what a codec may leave at the end.
CODEC_FRAME = 372


def with_field(data, offset, field_format, value):
    """Return a copy of `data` with one number overwritten."""
    patched = bytearray(data)
    struct.pack_into(field_format, patched, offset, value)
    return bytes(patched)


def sine(rate, frequency=440.0):
    """Return two seconds of a tone at half of full scale."""
    return np.sin(2 * np.pi * frequency / rate * np.arange(2 * rate)) / 2


def assert_is_sine(samples, rate, frequency):
    """Check that a `sine` at `rate` kept its pitch, level and time at 16 kHz."""
    expected = sine(SAMPLE_RATE, frequency)
    assert abs(len(samples) - len(expected)) <= SAMPLE_RATE // rate + 1
    # Away from the edges, where the filter sees silence.
    assert np.abs(samples[:31000] - expected[:31000])[1000:].max() < 5e-3


@pytest.fixture(scope="module")
def speech(samples):
    """Speech of 7 s at 16 kHz, int16."""
    parts = []
    for name in ("s00_es.wav", "s10_es.wav"):
        with wave.open(str(samples / name)) as file:
            parts.append(np.frombuffer(file.readframes(file.getnframes()), "<i2"))
    return np.concatenate(parts)


@pytest.fixture(scope="module")
def encoded(tmp_path_factory, speech):
    """`speech` in one file for each of `FORMATS`."""
    return encode_all(tmp_path_factory.mktemp("encoded"), speech)


class TestArrays:
    @pytest.mark.parametrize(
        ("dtype", "full_scale"),
        [
            ("int16", 2**15),
            ("int32", 2**31),
            ("float32", 1),
            ("float64", 1),
            (">i2", 2**15),
            (">f4", 1),
        ],
    )
    def test_every_dtype_comes_to_the_same_scale(self, dtype, full_scale):
        samples = (np.array([-1.0, -0.5, 0.0, 0.25]) * full_scale).astype(dtype)
        audio = load_audio(samples)
        assert audio.samples.dtype == np.float32
        assert audio.samples.flags.c_contiguous
        assert audio.samples.dtype.isnative
        assert audio.samples.tolist() == [-1.0, -0.5, 0.0, 0.25]
        assert audio.warnings == ()

    def test_float32_is_not_copied(self):
        samples = np.zeros(100, np.float32)
        assert np.shares_memory(load_audio(samples).samples, samples)

    @pytest.mark.parametrize("step", [2, -1])
    @pytest.mark.parametrize("dtype", ["int16", "float32"])
    def test_strided_arrays_become_contiguous(self, step, dtype):
        samples = np.arange(10).astype(dtype)[::step]
        audio = load_audio(samples)
        assert audio.samples.flags.c_contiguous
        assert np.array_equal(audio.samples, samples / (32768 if dtype == "int16" else 1))

    @pytest.mark.parametrize("dtype", ["int16", "int32", "float32", "float64"])
    @pytest.mark.parametrize("rate", [8000, 16000])
    def test_empty_is_empty(self, dtype, rate):
        audio = Audio.from_array(np.empty(0, dtype), rate)
        assert audio.samples.shape == (0,)
        assert audio.samples.dtype == np.float32
        assert audio.duration == 0.0

    def test_integers_stored_as_floats_are_warned_about(self):
        [warning] = Audio.from_array(np.array([0.0, -20000.0])).warnings
        assert "20000" in warning
        assert "divide them by 32768" in warning

    @pytest.mark.parametrize("rate", [1000, 8000, 22050, 44100, 48000, 768000])
    def test_resampling_keeps_pitch_level_and_time(self, rate):
        frequency = min(440, rate // 8)
        assert_is_sine(Audio.from_array(sine(rate, frequency), rate).samples, rate, frequency)

    @pytest.mark.parametrize("rate", [np.int32(8000), np.float64(8000.0), 8000.0])
    def test_whole_rates_of_any_type_are_accepted(self, rate):
        assert len(Audio.from_array(sine(8000), rate).samples) == pytest.approx(32000, abs=2)

    @given(arrays(np.int16, st.integers(0, 200)))
    def test_int16_is_exact(self, samples):
        assert np.array_equal(Audio.from_array(samples).samples * 32768, samples)


class TestPcm:
    @pytest.mark.parametrize("wrap", [bytes, bytearray, memoryview])
    def test_bytes_are_16_bit_samples(self, wrap, speech):
        audio = load_audio(wrap(speech.tobytes()))
        assert np.array_equal(audio.samples, speech / np.float32(32768))
        assert audio.source == "pcm"

    @pytest.mark.parametrize(
        ("encoding", "data"),
        [
            ("s16", np.array([-16384, 8192], "<i2")),
            ("s32", np.array([-(2**30), 2**29], "<i4")),
            ("f32", np.array([-0.5, 0.25], "<f4")),
        ],
    )
    def test_linear_encodings(self, encoding, data):
        assert Audio.from_pcm(data.tobytes(), encoding).samples.tolist() == [-0.5, 0.25]

    @pytest.mark.parametrize(
        ("encoding", "code", "expected"),
        [  # the ends of the ranges in ITU-T G.711
            ("mulaw", [0x00, 0x80, 0x7F, 0xFF], [-32124, 32124, 0, 0]),
            ("alaw", [0x2A, 0xAA, 0x55, 0xD5], [-32256, 32256, -8, 8]),
        ],
    )
    def test_telephone_encodings(self, encoding, code, expected):
        audio = Audio.from_pcm(bytes(code), encoding)
        assert (audio.samples * 32768).tolist() == expected

    def test_telephone_rate_is_resampled(self):
        audio = Audio.from_pcm(bytes([0xFF]) * 8000, "mulaw", sample_rate=8000)
        assert audio.duration == pytest.approx(1.0, abs=0.001)

    def test_two_channels_are_averaged_as_in_files(self, speech):
        stereo = np.stack([speech, np.roll(speech, 500)], axis=1)
        audio = Audio.from_pcm(stereo.tobytes(), channels=2)
        decoded = load_audio(io.BytesIO(wav_bytes(stereo, channels=2)))
        assert len(audio.samples) == len(speech)
        assert np.abs(audio.samples - decoded.samples).max() <= 1 / 32768

    @pytest.mark.parametrize("encoding", ["s16", "f32"])
    def test_the_buffer_may_be_reused(self, encoding):
        buffer = bytearray(8)
        audio = Audio.from_pcm(buffer, encoding)
        buffer[:] = b"\x3e" * 8
        buffer.extend(b"the memory is not held either")
        assert not audio.samples.any()

    def test_no_bytes_are_no_audio(self):
        assert load_audio(b"").duration == 0.0


BAD_ARRAYS = {
    "stereo": (np.zeros((100, 2), np.float32), ["(100, 2)", "audio[:, 0]", "mean"]),
    "scalar": (np.array(1.0), ["shape ()", "1-D"]),
    "bool": (np.zeros(4, bool), ["bool", "int16", "float32"]),
    "uint8": (np.zeros(4, np.uint8), ["uint8", "int16", "float32"]),
    "float16": (np.zeros(4, np.float16), ["float16", "float32"]),
    "complex": (np.zeros(4, complex), ["complex128", "float32"]),
    "object": (np.array([None, 1]), ["object", "float32"]),
    "text": (np.array(["a"]), ["str", "float32"]),
    "nan": (np.array([0, 0, np.nan], np.float32), ["sample 2", "nan", "nan_to_num"]),
    "infinity": (np.array([0, -np.inf, np.nan]), ["sample 1", "-inf", "finite"]),
    "float64 beyond float32": (np.array([1e300]), ["sample 0", "1e+300", "finite"]),
}

BAD_ARGUMENTS = {
    "rate 0": (lambda: Audio.from_array(np.zeros(4), 0), ["rate 0", "1000", "768000"]),
    "negative rate": (lambda: Audio.from_array(np.zeros(4), -16000), ["-16000", "1000"]),
    "rate in kHz": (lambda: Audio.from_array(np.zeros(4), 16), ["rate 16 ", "Hz", "1000"]),
    "huge rate": (lambda: Audio.from_array(np.zeros(4), 10**6), ["1000000", "768000"]),
    "broken rate": (lambda: Audio.from_array(np.zeros(4), 16000.5), ["16000.5", "whole"]),
    "rate nan": (lambda: Audio.from_array(np.zeros(4), float("nan")), ["nan", "whole"]),
    "rate True": (lambda: Audio.from_array(np.zeros(4), True), ["True", "whole"]),
    "rate as text": (lambda: Audio.from_array(np.zeros(4), "16000"), ["'16000'", "whole"]),
    "list as array": (lambda: Audio.from_array([0.0]), ["list", "numpy.asarray"]),
    "encoding": (lambda: Audio.from_pcm(b"", "s24"), ["'s24'", "s16", "mulaw"]),
    "channels": (lambda: Audio.from_pcm(b"", channels=6), ["channels=6", "1 or 2"]),
    "pcm as text": (lambda: Audio.from_pcm("00"), ["str", "bytes"]),
    "pcm as number": (lambda: Audio.from_pcm(4), ["int", "bytes"]),
    "pcm view of floats": (
        lambda: Audio.from_pcm(memoryview(np.zeros(4, np.float32))),
        ["format 'f'", "cast('B')"],
    ),
    "half a sample": (lambda: load_audio(b"\0\0\0"), ["3 bytes", "2-byte frames"]),
    "half a frame": (
        lambda: Audio.from_pcm(bytes(12), "f32", channels=2),
        ["12 bytes", "8-byte frames", "channels=2"],
    ),
    "nan in pcm": (
        lambda: Audio.from_pcm(np.array([0, np.nan], "<f4").tobytes(), "f32", channels=2),
        ["sample 1", "finite"],
    ),
    "output rate": (lambda: decode_audio("any.wav", 10), ["rate 10 ", "1000"]),
    "list": (lambda: load_audio([0.0, 0.1]), ["list", "path", "numpy.asarray"]),
    "None": (lambda: load_audio(None), ["NoneType", "path"]),
    "int": (lambda: load_audio(3), ["int", "path"]),
    "NumPy scalar": (lambda: load_audio(np.float32(1)), ["numpy.float32", "1-D NumPy array"]),
    "list as file": (lambda: decode_audio([0.0]), ["list", "path", "file object"]),
}

ENCODED_HEADS = {
    "wav": b"RIFF\x24\x00\x00\x00WAVE",
    "flac": b"fLaC\x00\x00\x00\x22",
    "ogg": b"OggS\x00\x02\x00\x00",
    "mp3": b"ID3\x04\x00\x00\x00\x00",
    "m4a": b"\x00\x00\x00\x1cftypM4A ",
    "webm": b"\x1aE\xdf\xa3\x01\x00\x00\x00",
}


def assert_says(error, exception, fragments):
    assert type(error) is exception
    assert isinstance(error, SpeechRNTError | ValueError)
    message = str(error)
    for fragment in fragments:
        assert fragment in message


class TestConstructor:
    @pytest.mark.parametrize(
        "samples",
        [
            np.zeros(10),
            np.zeros(10, dtype=np.int16),
            np.zeros((2, 5), dtype=np.float32),
            np.zeros(20, dtype=np.float32)[::2],
            np.array([0.0, np.nan], dtype=np.float32),
            np.array([0.0, 3e18], dtype=np.float32),
            [0.0, 0.0],
        ],
    )
    def test_unusable_samples(self, samples):
        with pytest.raises(InvalidAudioError, match=r"samples|array"):
            Audio(samples)

    def test_a_masked_array(self):
        with pytest.raises(InvalidAudioError, match="filled"):
            Audio.from_array(np.ma.masked_array(np.zeros(4, dtype=np.float32), [0, 1, 0, 0]))


class TestBadArguments:
    @pytest.mark.parametrize(("array", "fragments"), BAD_ARRAYS.values(), ids=BAD_ARRAYS)
    def test_array(self, array, fragments):
        with pytest.raises(AudioError) as caught:
            load_audio(array)
        assert_says(caught.value, InvalidAudioError, fragments)

    @pytest.mark.parametrize(("call", "fragments"), BAD_ARGUMENTS.values(), ids=BAD_ARGUMENTS)
    def test_argument(self, call, fragments):
        with pytest.raises(AudioError) as caught:
            call()
        assert_says(caught.value, InvalidAudioError, fragments)

    @pytest.mark.parametrize("head", ENCODED_HEADS.values(), ids=ENCODED_HEADS)
    @pytest.mark.parametrize("wrap", [bytes, bytearray, memoryview])
    def test_encoded_bytes_are_not_taken_for_pcm(self, head, wrap):
        with pytest.raises(AudioError) as caught:
            load_audio(wrap(head + bytes(100)))
        assert_says(caught.value, InvalidAudioError, ["encoded file", "io.BytesIO"])

    def test_frame_sync_of_mp3_may_be_pcm(self):
        assert len(load_audio(b"\xff\xfb\x90\x00").samples) == 2


def text_file(path):
    path.write_text("These are not the samples you are looking for.\n" * 100)
    return path


def empty_file(path):
    path.touch()
    return path


def noise_file(path):
    path.write_bytes(np.random.default_rng(0).bytes(50_000))
    return path


def video_file(path, codec="mpeg4"):
    with av.open(path, "w") as container:
        stream = container.add_stream(codec, rate=10)
        stream.width, stream.height = 64, 64
        stream.pix_fmt = "rgb24" if codec == "png" else "yuv420p"
        pixels = np.zeros((64, 64, 3), np.uint8)
        for _ in range(1 if codec == "png" else 5):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode(None))
    return path


def patched_wav(path, offset, field_format, value):
    path.write_bytes(with_field(wav_bytes(np.ones(16000)), offset, field_format, value))
    return path


def flac_head(path):
    """Write the header of a FLAC file of one second, and nothing else."""
    data = encode(path, np.ones(16000, np.int16), "flac", format="flac").read_bytes()
    path.write_bytes(data[: data.index(b"\xff\xf8")])
    return path


def m4a_bytes(path):
    return encode(path, np.ones(3 * 16000, np.int16), "aac", format="mp4").read_bytes()


def unreadable_file(path):
    if sys.platform == "win32" or os.geteuid() == 0:
        pytest.skip("this user may read every file")
    path.write_bytes(wav_bytes(np.zeros(10)))
    path.chmod(0)
    return path


def closed_file(path):
    path.write_bytes(wav_bytes(np.zeros(10)))
    with path.open("rb") as file:
        return file


def file_opened_as_text(path):
    return io.TextIOWrapper(named(wav_bytes(np.zeros(10)), path.name))


def file_opened_for_writing(path):
    return path.open("wb")


def named(data, name):
    buffer = io.BytesIO(data)
    buffer.name = name
    return buffer


BAD_FILES = {
    "missing": (lambda p: p, AudioNotFoundError, ["no such file"]),
    "missing, as text": (str, AudioNotFoundError, ["no such file"]),
    "file taken for a directory": (lambda p: text_file(p) / "x", AudioNotFoundError, ["no such"]),
    "directory": (lambda p: p.mkdir() or p, AudioFileError, ["directory", "pass one audio file"]),
    "not permitted": (unreadable_file, AudioFileError, ["cannot be opened", "may read"]),
    "null character": (lambda p: f"{p}\0", AudioFileError, ["null", "may read"]),
    "empty": (empty_file, AudioFileError, ["0 bytes"]),
    "empty BytesIO": (lambda p: named(b"", p.name), AudioFileError, ["0 bytes"]),
    "text": (text_file, AudioFileError, ["cannot be decoded", "wav, flac, mp3"]),
    "noise": (noise_file, AudioFileError, ["cannot be decoded", "wav, flac, mp3"]),
    "image": (
        lambda p: video_file(p.with_suffix(".png"), "png"),
        AudioFileError,
        ["no audio stream", "video", "with sound"],
    ),
    "silent film": (
        lambda p: video_file(p.with_suffix(".mp4")),
        AudioFileError,
        ["no audio stream", "video", "with sound"],
    ),
    "rate of 100 Hz": (
        lambda p: patched_wav(p, 24, "<I", 100),
        AudioFileError,
        ["100 Hz", "from 1000 to 768000 Hz"],
    ),
    "rate of 2 GHz": (
        lambda p: patched_wav(p, 24, "<I", 2_000_000_000),
        AudioFileError,
        ["2000000000 Hz", "from 1000 to 768000 Hz"],
    ),
    "unknown codec": (
        lambda p: patched_wav(p, 20, "<H", 0x9999),
        AudioFileError,
        ["no decoder", "convert"],
    ),
    "nine unnamed channels": (
        lambda p: named(wav_bytes(np.ones(9 * 1600), channels=9), p.name),
        AudioFileError,
        ["cannot be decoded", "wav, flac, mp3"],
    ),
    "header only": (flac_head, AudioFileError, ["none of the audio", "damaged"]),
    "moov cut off": (
        lambda p: named(m4a_bytes(p)[:-3000], p.name),
        AudioFileError,
        ["cannot be decoded", "complete"],
    ),
    "closed file": (closed_file, InvalidAudioError, ["closed", "'rb'"]),
    "text mode": (file_opened_as_text, InvalidAudioError, ["str instead of bytes", "'rb'"]),
    "write mode": (file_opened_for_writing, InvalidAudioError, ["read", "'rb'"]),
}


PLAYLISTS = {
    "hls": "#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\n{}\n#EXT-X-ENDLIST\n",
    "ffconcat": "ffconcat version 1.0\nfile {}\n",
}


class TestBadFiles:
    @pytest.mark.parametrize(("make", "exception", "fragments"), BAD_FILES.values(), ids=BAD_FILES)
    def test_says_which_file_and_what_would_be_right(
        self, make, exception, fragments, tmp_path, capfd
    ):
        file = make(tmp_path / "the file.wav")
        with pytest.raises(AudioError) as caught:
            load_audio(file)
        assert_says(caught.value, exception, ["the file", *fragments])
        if isinstance(file, io.IOBase):
            file.close()
        assert capfd.readouterr() == ("", "")

    @pytest.mark.parametrize("url", ["http://127.0.0.1:9/a.wav", "file:///tmp/a.wav", "rtp://@"])
    def test_urls_are_not_fetched(self, url):
        with pytest.raises(AudioNotFoundError, match="URLs are not fetched") as caught:
            load_audio(url)
        assert url in str(caught.value)
        assert isinstance(caught.value, FileNotFoundError)

    @pytest.mark.parametrize("playlist", PLAYLISTS.values(), ids=PLAYLISTS)
    def test_playlists_open_nothing(self, playlist, tmp_path):
        encode(tmp_path / "a.ts", np.ones(32000, np.int16), "aac", rate=16000)
        with socket.create_server(("127.0.0.1", 0)) as server:
            server.setblocking(False)
            for entry in (f"http://127.0.0.1:{server.getsockname()[1]}/a.ts", "a.ts"):
                path = tmp_path / "list.m3u8"
                path.write_text(playlist.format(entry))
                with pytest.raises(AudioFileError, match=r"list\.m3u8"):
                    load_audio(path)
            with pytest.raises(BlockingIOError):  # nobody has called
                server.accept()

    @pytest.mark.parametrize("readable", [0, 50_000])
    def test_read_errors_of_the_system_name_the_file(self, readable):
        file = FailingFile(wav_bytes(np.zeros(100_000)), readable, OSError(5, "Input/output error"))
        with pytest.raises(AudioFileError, match=r"failing\.wav.*Input/output error") as caught:
            load_audio(file)
        assert isinstance(caught.value.__cause__, OSError)

    def test_errors_of_the_caller_pass_through(self):
        file = FailingFile(wav_bytes(np.zeros(100_000)), 50_000, KeyError("own"))
        with pytest.raises(KeyError, match="own"):
            load_audio(file)

    def test_errors_of_ffmpeg_are_chained(self, tmp_path):
        with pytest.raises(AudioFileError) as caught:
            load_audio(text_file(tmp_path / "a.wav"))
        assert isinstance(caught.value.__cause__, av.FFmpegError)


class FailingFile(io.BytesIO):
    name = "failing.wav"

    def __init__(self, data, readable, error):
        super().__init__(data)
        self.readable_bytes = readable
        self.error = error

    def read(self, size=-1):
        if size and self.tell() >= self.readable_bytes:
            raise self.error
        return super().read(size)


class TestFiles:
    @pytest.mark.parametrize("name", FORMATS)
    def test_every_format_comes_back_in_time(self, name, encoded, speech):
        audio = load_audio(encoded[name])
        assert audio.samples.dtype == np.float32
        assert audio.samples.flags.c_contiguous
        assert audio.samples.flags.owndata
        assert abs(len(audio.samples) - len(speech)) <= CODEC_FRAME
        n = min(len(audio.samples), len(speech))
        assert np.corrcoef(audio.samples[:n], speech[:n])[0, 1] > 0.95
        assert audio.duration == len(audio.samples) / 16000
        assert audio.warnings == ()
        assert audio.source == str(encoded[name])

    def test_wav_at_16_khz_is_exact(self, encoded, speech):
        assert np.array_equal(load_audio(encoded["pcm.wav"]).samples, speech / np.float32(32768))

    @pytest.mark.parametrize("rate", [1000, 8000, 44100, 48000, 768000])
    def test_any_rate_keeps_pitch_level_and_time(self, rate):
        frequency = min(440, rate // 8)
        data = wav_bytes(np.round(sine(rate, frequency) * 32768), rate)
        assert_is_sine(load_audio(io.BytesIO(data)).samples, rate, frequency)

    def test_stereo_is_split(self, speech):
        stereo = np.stack([speech, -speech], axis=1)
        left, right = decode_audio(io.BytesIO(wav_bytes(stereo, channels=2)), split_stereo=True)
        assert np.array_equal(left, speech / np.float32(32768))
        assert np.array_equal(right, -left)
        assert left.flags.c_contiguous
        assert right.flags.c_contiguous

    def test_header_without_data_is_empty_audio(self, tmp_path):
        path = tmp_path / "empty.wav"
        path.write_bytes(wav_bytes(np.empty(0)))
        audio = load_audio(path)
        assert audio.samples.shape == (0,)
        assert audio.warnings == ()
        left, right = decode_audio(path, split_stereo=True)
        assert left.shape == right.shape == (0,)

    @pytest.mark.parametrize(
        "name", ["a b.wav", "a:b.wav", "http:a.wav", "ünï ☃.wav", "100%d.wav", "-i.wav", "wav"]
    )
    @pytest.mark.parametrize("kind", [str, Path])
    def test_any_file_name_is_a_file_name(self, name, kind, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        Path(name).write_bytes(wav_bytes(np.ones(1600)))
        assert len(load_audio(kind(name)).samples) == 1600
        assert load_audio(kind(name)).source == name

    def test_audio_is_returned_as_it_is(self):
        audio = load_audio(np.zeros(4, np.float32))
        assert load_audio(audio) is audio

    def test_sound_of_a_video(self, tmp_path, speech):
        path = tmp_path / "film.mkv"
        with av.open(path, "w") as container:
            video = container.add_stream("mpeg4", rate=10)
            video.width, video.height, video.pix_fmt = 64, 64, "yuv420p"
            sound = container.add_stream("pcm_s16le", rate=SAMPLE_RATE)
            sound.layout = "mono"
            for _ in range(200):  # 20 s: longer than the sound, which is no damage
                picture = av.VideoFrame.from_ndarray(np.zeros((64, 64, 3), np.uint8))
                container.mux(video.encode(picture))
            frame = av.AudioFrame.from_ndarray(speech[np.newaxis], format="s16", layout="mono")
            frame.sample_rate = SAMPLE_RATE
            container.mux([*sound.encode(frame), *sound.encode(None), *video.encode(None)])
        audio = load_audio(path)
        assert np.array_equal(audio.samples, speech / np.float32(32768))
        assert audio.warnings == ()

    def test_joined_files_of_two_kinds(self, tmp_path, speech):
        parts = []
        for rate, layout in ((44100, "stereo"), (16000, "mono")):
            path = tmp_path / f"{rate}.mp3"
            options = {"write_xing": "0", "id3v2_version": "0"}
            encode(path, speech, "libmp3lame", rate=rate, layout=layout, container_options=options)
            parts.append(path.read_bytes())
        audio = load_audio(io.BytesIO(b"".join(parts)))
        # Without the tag that says so, the encoder's delay stays in.
        assert abs(len(audio.samples) - 2 * len(speech)) < 4 * 1152 * 2
        assert audio.warnings == ()


def feed(descriptor, data):
    with os.fdopen(descriptor, "wb") as pipe:
        pipe.write(data)


class TestFileObjects:
    def test_read_from_the_beginning_and_left_open(self, encoded, speech):
        for name in ("pcm.wav", "mono_44k.m4a", "opus.ogg"):
            with encoded[name].open("rb") as file:
                file.seek(1000)
                first = load_audio(file)
                second = load_audio(file)
                assert not file.closed
            assert np.array_equal(first.samples, load_audio(encoded[name]).samples)
            assert np.array_equal(first.samples, second.samples)
            assert first.source == str(encoded[name])

    def test_bytes_io_is_called_by_its_type(self, encoded):
        assert load_audio(io.BytesIO(encoded["mono.flac"].read_bytes())).source == "BytesIO"

    @pytest.mark.parametrize("name", ["pcm.wav", "mono_44k.mp3", "opus.ogg", "stereo.webm"])
    def test_a_pipe_needs_no_seeking(self, name, encoded):
        reader, writer = os.pipe()
        with ThreadPoolExecutor(1) as pool, os.fdopen(reader, "rb") as pipe:
            pool.submit(feed, writer, encoded[name].read_bytes())
            audio = load_audio(pipe)
        expected = load_audio(encoded[name]).samples
        assert abs(len(audio.samples) - len(expected)) <= CODEC_FRAME
        assert audio.warnings == ()


class TestDamage:
    @pytest.mark.parametrize("name", ["pcm.wav", "mono.flac", "mono_44k.mp3", "mono.aiff"])
    @pytest.mark.parametrize("kept", [0.2, 0.55, 0.9])
    def test_cut_short(self, name, kept, encoded, tmp_path, caplog, capfd, speech):
        whole = load_audio(encoded[name]).samples
        data = encoded[name].read_bytes()
        path = tmp_path / name
        path.write_bytes(data[: int(kept * len(data))])
        audio = load_audio(path)
        assert audio.duration * 16000 / len(speech) == pytest.approx(kept, abs=0.25)
        n = len(audio.samples) - 2000
        assert np.abs(audio.samples[:n] - whole[:n]).max() < 1e-3
        warning = audio.warnings[-1]
        assert name in warning
        decoded, stated = map(float, re.findall(r"(\d+\.\d\d) s", warning))
        assert decoded == pytest.approx(audio.duration, abs=0.01)
        assert stated == pytest.approx(len(speech) / 16000, abs=0.05)
        assert "cut short" in warning

        with caplog.at_level(logging.WARNING, "speechrnt"):
            assert np.array_equal(decode_audio(path), audio.samples)
        assert [record.getMessage() for record in caplog.records] == list(audio.warnings)
        assert capfd.readouterr() == ("", "")

    @pytest.mark.parametrize(
        ("name", "how"),
        [
            ("cut.m4a", {"codec": "aac", "container_options": {"movflags": "faststart"}}),
            ("cut.webm", {"codec": "libopus", "rate": 48000}),
        ],
    )
    def test_container_cut_short(self, name, how, tmp_path, speech):
        path = encode(tmp_path / name, speech, **how)
        data = path.read_bytes()
        path.write_bytes(data[: len(data) // 2])
        audio = load_audio(path)
        assert audio.duration == pytest.approx(len(speech) / 32000, abs=1.0)
        assert "cut short" in audio.warnings[-1]

    @pytest.mark.parametrize("name", ["opus.ogg", "vorbis.ogg"])
    def test_ogg_cut_short_gives_what_is_there(self, name, encoded, speech):
        data = encoded[name].read_bytes()
        audio = load_audio(io.BytesIO(data[: len(data) // 2]))
        assert 0.25 < audio.duration / (len(speech) / 16000) < 0.6

    def test_wav_cut_inside_its_header_or_before_its_data(self, speech):
        data = wav_bytes(speech)
        for kept in (20, 44):
            with pytest.raises(AudioFileError, match="decoded"):
                load_audio(io.BytesIO(data[:kept]))

    @pytest.mark.parametrize("name", ["mono_44k.mp3", "mono_44k.m4a"])
    def test_damage_in_the_middle_loses_only_the_middle(self, name, encoded, speech, capfd):
        audio = load_audio(named(with_noise_in_the_middle(encoded[name].read_bytes()), name))
        assert audio.duration > 0.85 * len(speech) / 16000
        assert "damaged packet(s) skipped, the first at" in audio.warnings[0]
        assert name in audio.warnings[0]
        assert capfd.readouterr() == ("", "")

    @pytest.mark.parametrize("size", [0, 0x7FFFF000, 0x7FFFFFFF, 0xFFFFFFFF])
    def test_wav_from_a_pipe_is_not_damaged(self, size, speech):
        data = with_field(wav_bytes(speech), 4, "<I", size)
        data = with_field(data, 40, "<I", size)
        audio = load_audio(io.BytesIO(data))
        assert np.array_equal(audio.samples, speech / np.float32(32768))
        assert audio.warnings == ()

    @pytest.mark.parametrize("extra", ["quality", "adts"])
    def test_estimated_durations_are_no_damage(self, extra, tmp_path, speech):
        # The bit rate of the silence at the beginning makes the file seem far longer than it is.
        uneven = np.concatenate([np.zeros_like(speech), speech])
        if extra == "adts":
            path = encode(tmp_path / "a.aac", uneven, "aac", format="adts")
        else:
            path = encode(
                tmp_path / "a.mp3",
                uneven,
                "libmp3lame",
                options={"flags": "+qscale", "global_quality": "236"},
                container_options={"write_xing": "0"},
            )
        assert load_audio(path).warnings == ()

    def test_a_lying_header_takes_no_memory(self, tmp_path, speech):
        path = encode(tmp_path / "a.flac", speech, "flac")
        # The last 36 bits of these 8 bytes of STREAMINFO count the samples: 50 days of them.
        data = path.read_bytes()
        [field] = struct.unpack_from(">Q", data, 18)
        data = with_field(data, 18, ">Q", field | (1 << 36) - 1)
        tracemalloc.start()
        audio = load_audio(io.BytesIO(data))
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert np.array_equal(audio.samples, speech / np.float32(32768))
        assert "of 4294967.30 s" in audio.warnings[0]
        assert peak < 300 * len(data)


class TestResources:
    def test_memory_is_that_of_the_result(self, encoded):
        load_audio(encoded["pcm.wav"])
        # At this length, growing a buffer by halves would leave it almost half empty.
        file = io.BytesIO(wav_bytes(np.zeros(72 * 44100), 44100))
        tracemalloc.start()
        audio = load_audio(file)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < 1.3 * audio.samples.nbytes

    @pytest.mark.skipif(allocated_bytes() == 0, reason="needs glibc")
    @pytest.mark.parametrize("damaged", [False, True])
    def test_repeated_decoding_does_not_grow(self, damaged, encoded):
        data = encoded["mono_44k.mp3"].read_bytes()
        if damaged:
            data = with_noise_in_the_middle(data)
        assert bool(load_audio(io.BytesIO(data)).warnings) == damaged

        gc.collect()
        gc.disable()  # what needs the collector would stay
        try:
            for _ in range(30):
                load_audio(io.BytesIO(data))
            before = allocated_bytes()
            for _ in range(100):
                load_audio(io.BytesIO(data))
            grown = allocated_bytes() - before
            cyclic = gc.collect()
        finally:
            gc.enable()
        assert cyclic < 100, "objects in reference cycles were left at each decoding"
        assert grown < 100 * 2**10  # the samples alone take 0.5 MB each time

    def test_eight_threads_decode_the_same_file(self, encoded):
        for name in ("mono_44k.mp3", "stereo_48k.flac"):
            expected = load_audio(encoded[name]).samples
            with ThreadPoolExecutor(8) as pool:
                for audio in pool.map(load_audio, [encoded[name]] * 32):
                    assert np.array_equal(audio.samples, expected)


class TestParity:
    def test_formats(self, encoded):
        peer = pytest.importorskip("faster_whisper").decode_audio
        for path in encoded.values():
            assert np.array_equal(decode_audio(path), peer(str(path))), path

    def test_project_samples(self, samples):
        peer = pytest.importorskip("faster_whisper").decode_audio
        for path in sorted(samples.glob("*.wav")):
            assert np.array_equal(load_audio(path).samples, peer(str(path))), path

    def test_human_recordings(self, human_audio):
        peer = pytest.importorskip("faster_whisper").decode_audio
        paths = [p for p in sorted(human_audio.rglob("*")) if p.suffix in {".wav", ".mp3", ".flac"}]
        assert paths
        for path in paths:
            audio = load_audio(path)
            expected = peer(str(path))
            assert audio.samples.dtype == expected.dtype
            assert np.array_equal(audio.samples, expected), path
            assert audio.warnings == ()

    @pytest.mark.parametrize("rate", [8000, 16000, 44100])
    def test_rates_and_channels(self, rate, encoded):
        peer = pytest.importorskip("faster_whisper").decode_audio
        for name in ("stereo_48k.flac", "mono_44k.mp3"):
            for ours, theirs in zip(
                decode_audio(encoded[name], rate, split_stereo=True),
                peer(str(encoded[name]), rate, split_stereo=True),
                strict=True,
            ):
                assert np.array_equal(ours, theirs)
