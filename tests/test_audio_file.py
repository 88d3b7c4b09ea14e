"""Files decoded block by block: the samples, lengths, warnings and errors of whole ones."""

import io
import os
import tracemalloc
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from audio_helpers import FORMATS, encode, encode_all, wav_bytes, with_noise_in_the_middle

from speechrnt.audio import Audio, float_blocks, load_audio, open_audio
from speechrnt.audio_file import LENGTH_TOLERANCE_S, AudioReader
from speechrnt.errors import AudioFileError, AudioNotFoundError, InvalidAudioError
from speechrnt.features import OwnMaximumWindows
from speechrnt.mel_frames import MelFrames

RATE = 16_000


@pytest.fixture(scope="module")
def noise():
    """Half a minute of noise, int16."""
    rng = np.random.default_rng(1)
    return (rng.standard_normal(30 * RATE) * 3000).astype(np.int16)


@pytest.fixture(scope="module")
def encoded(tmp_path_factory, noise):
    """`noise` in one file for each of `FORMATS`."""
    return encode_all(tmp_path_factory.mktemp("encoded"), noise)


def joined(source):
    return np.concatenate([np.zeros(0, np.float32), *float_blocks(source)])


@pytest.mark.parametrize("name", FORMATS)
def test_the_samples_are_those_of_the_whole_file(name, encoded):
    whole = load_audio(encoded[name])
    with AudioReader(encoded[name]) as reader:
        blocks = list(float_blocks(reader))
        assert len(blocks) > 3
        np.testing.assert_array_equal(np.concatenate(blocks), whole.samples)
        assert (reader.duration, reader.warnings) == (whole.duration, ())


@pytest.mark.parametrize("name", FORMATS)
def test_the_length_is_known_before_anything_is_decoded(name, encoded):
    with open_audio(encoded[name]) as reader:
        assert isinstance(reader, AudioReader)
        assert reader.duration is None
        expected = reader.expected_s
        joined(reader)
        assert reader.duration == pytest.approx(expected, abs=LENGTH_TOLERANCE_S)
        # A hair that the resampler leaves, where there is no codec with frames of its own.
        if name.endswith((".wav", ".flac", ".aiff")):
            assert reader.duration == pytest.approx(expected, abs=0.001)


def test_a_file_that_does_not_state_its_length_is_decoded_whole(noise, tmp_path):
    untagged = {"container_options": {"write_xing": "0"}}
    for path in (
        encode(tmp_path / "a.aac", noise, "aac", format="adts"),
        encode(tmp_path / "a.mp3", noise, "libmp3lame", **untagged),
    ):
        audio = open_audio(path)
        assert isinstance(audio, Audio)
        np.testing.assert_array_equal(audio.samples, load_audio(path).samples)


def test_all_other_audio_is_brought_to_samples():
    samples = np.zeros(100, np.float32)
    for audio in (samples, Audio.from_array(samples), bytes(200)):
        np.testing.assert_array_equal(joined(open_audio(audio)), samples)


def test_a_pipe_is_read_as_it_comes(encoded):
    """A FLAC header states the length; a WAV one is only believed where the file can seek."""
    for name, kind in (("mono.flac", AudioReader), ("pcm.wav", Audio)):
        reader, writer = os.pipe()
        with (
            ThreadPoolExecutor(1) as pool,
            os.fdopen(reader, "rb") as source,
            os.fdopen(writer, "wb") as sink,
        ):
            data = encoded[name].read_bytes()
            pool.submit(lambda sink=sink, data=data: (sink.write(data), sink.close()))
            audio = open_audio(source)
            assert isinstance(audio, kind)
            np.testing.assert_array_equal(joined(audio), load_audio(encoded[name]).samples)


@pytest.mark.parametrize("name", ["pcm.wav", "mono.flac", "mono_44k.mp3", "mono_44k.m4a"])
@pytest.mark.parametrize("damage", ["cut", "noise"])
def test_damage_ends_as_it_does_for_the_whole_file(name, damage, encoded, tmp_path):
    data = encoded[name].read_bytes()
    cut = data[: len(data) * 3 // 5]
    damaged = cut if damage == "cut" and name != "mono_44k.m4a" else with_noise_in_the_middle(data)
    path = tmp_path / name
    path.write_bytes(damaged)
    whole = load_audio(path)
    with AudioReader(path) as reader:
        np.testing.assert_array_equal(joined(reader), whole.samples)
        assert reader.warnings == whole.warnings
    assert whole.warnings or damage == "noise"


def test_a_bad_file_is_an_error_at_once(tmp_path, noise):
    with pytest.raises(AudioNotFoundError):
        open_audio(tmp_path / "nothing.wav")
    with pytest.raises(AudioFileError, match="empty"):
        open_audio(io.BytesIO())
    with pytest.raises(AudioFileError, match="decoded"):
        open_audio(io.BytesIO(b"no audio " * 100))
    with pytest.raises(InvalidAudioError):
        open_audio(5)


def test_a_file_without_any_audio_that_can_be_decoded_is_an_error(noise):
    header = io.BytesIO(wav_bytes(noise)[:44])
    with AudioReader(header) as reader, pytest.raises(AudioFileError, match="none"):
        joined(reader)


class Unreliable(io.BytesIO):
    def read(self, size=-1):
        if self.tell() > 400_000:
            raise OSError(5, "Input/output error")
        return super().read(size)


def test_a_file_that_fails_in_the_middle_is_an_error_that_says_so(noise):
    file = Unreliable(wav_bytes(noise))
    with AudioReader(file) as reader, pytest.raises(AudioFileError, match="Input/output"):
        joined(reader)


def test_a_file_that_is_closed_too_early_is_an_error_that_says_so(noise):
    file = io.BytesIO(wav_bytes(noise))
    with AudioReader(file) as reader:
        blocks = float_blocks(reader)
        next(blocks)
        file.close()
        with pytest.raises(AudioFileError, match="keep the file open"):
            list(blocks)


def test_the_file_is_closed_only_if_it_was_opened_here(encoded, noise):
    file = io.BytesIO(wav_bytes(noise))
    with AudioReader(file) as reader:
        next(iter(reader))
    assert not file.closed
    reader = AudioReader(encoded["pcm.wav"])
    next(iter(reader))
    reader.close()
    assert reader._own_file.closed
    reader.close()


def test_a_long_recording_is_never_whole_in_memory(tmp_path):
    path = tmp_path / "long.wav"
    seconds = 1200
    path.write_bytes(wav_bytes(np.zeros(seconds * RATE, np.int16)))
    tracemalloc.start()
    with AudioReader(path) as reader:
        windows = OwnMaximumWindows(MelFrames(float_blocks(reader), 80))
        seek = 0
        while windows.content_up_to(seek + 1) > seek:
            windows.forget(seek)
            windows.prefetch(seek + 6000)
            seek += windows.at(seek).frames
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert seek == seconds * 100
    # All samples would be 77 MB, all features 38 MB.
    assert peak < 15e6
