"""Pieces of audio: the same samples however they are cut."""

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from speechrnt.audio import PCM_ENCODINGS, Audio
from speechrnt.errors import InvalidAudioError
from speechrnt.pcm import PcmReader


def signal(n_samples, seed=0):
    rng = np.random.default_rng(seed)
    wave = np.sin(np.arange(n_samples) * 0.03) * 0.3 + rng.uniform(-0.2, 0.2, n_samples)
    return wave.astype(np.float32)


def coded(samples, encoding):
    """Return the bytes of samples."""
    if encoding == "f32":
        return samples.astype("<f4").tobytes()
    if encoding == "s32":
        return (samples * 2**31).astype("<i4").tobytes()
    if encoding == "s16":
        return (samples * 2**15).astype("<i2").tobytes()
    return np.random.default_rng(1).integers(0, 256, len(samples), np.uint8).tobytes()


def read(data, cuts, **declared):
    """Read data, cut at some places."""
    reader = PcmReader(**declared)
    places = [0, *sorted(cuts), len(data)]
    pieces = [reader.read(data[a:b]) for a, b in pairwise(places)]
    return np.concatenate([*pieces, reader.finish()])


class TestChunkInvariance:
    @pytest.mark.parametrize("encoding", PCM_ENCODINGS)
    @settings(max_examples=15)
    @given(cuts=st.lists(st.integers(0, 4000), max_size=40))
    def test_bytes_may_be_cut_anywhere(self, encoding, cuts):
        data = coded(signal(1000), encoding)
        cuts = [min(cut, len(data)) for cut in cuts]
        expected = Audio.from_pcm(data, encoding).samples
        assert np.array_equal(read(data, cuts, encoding=encoding), expected)

    @pytest.mark.parametrize("rate", [8000, 11025, 22050, 24000, 44100, 48000])
    @settings(max_examples=8)
    @given(cuts=st.lists(st.integers(0, 20_000), max_size=20))
    def test_resampling_goes_on_from_piece_to_piece(self, rate, cuts):
        data = coded(signal(10_000), "s16")
        expected = Audio.from_pcm(data, "s16", rate).samples
        assert np.array_equal(read(data, cuts, sample_rate=rate), expected)

    @settings(max_examples=5)
    @given(cuts=st.sets(st.integers(1, 199_999), max_size=3))
    def test_long_pieces_are_like_short_ones(self, cuts):
        samples = signal(200_000)
        expected = Audio.from_array(samples, 8000).samples
        assert np.array_equal(read(samples, cuts, sample_rate=8000), expected)

    def test_one_sample_at_a_time(self):
        data = coded(signal(300), "s16")
        expected = Audio.from_pcm(data, "s16", 48_000).samples
        assert np.array_equal(read(data, range(2, 600, 2), sample_rate=48_000), expected)
        odd = read(data, range(1, 600), sample_rate=48_000)
        assert np.array_equal(odd, expected)

    @pytest.mark.parametrize("dtype", ["int16", "int32", "float32", "float64"])
    def test_arrays_say_by_their_dtype_what_they_hold(self, dtype):
        samples = signal(1000)
        if dtype.startswith("int"):
            samples = samples * np.iinfo(dtype).max
        samples = samples.astype(dtype)
        assert np.array_equal(read(samples, [10, 11, 500]), Audio.from_array(samples).samples)

    @pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
    def test_all_kinds_of_bytes(self, kind):
        data = coded(signal(100), "s16")
        assert np.array_equal(PcmReader().read(kind(data)), Audio.from_pcm(data).samples)

    def test_bytes_of_every_second_place(self):
        data = coded(signal(100), "s16")
        spread = bytearray(2 * len(data))
        spread[::2] = data
        assert np.array_equal(
            PcmReader().read(memoryview(spread)[::2]), Audio.from_pcm(data).samples
        )

    def test_nothing_is_nothing(self):
        for rate in (16_000, 8000):
            reader = PcmReader(rate)
            assert reader.read(b"").size == reader.finish().size == 0

    def test_half_a_sample_at_the_end_is_dropped(self):
        data = coded(signal(100), "s16")
        assert np.array_equal(read(data + b"x", [7]), Audio.from_pcm(data).samples)


class TestOwnership:
    @pytest.mark.parametrize("dtype", ["float32", "int16"])
    def test_the_samples_are_the_readers_own(self, dtype):
        chunk = np.ones(100, dtype=dtype)
        samples = PcmReader().read(chunk)
        expected = samples.copy()
        chunk[:] = 0
        assert np.array_equal(samples, expected)

    def test_bytes_may_be_reused_at_once(self):
        chunk = bytearray(coded(signal(100), "f32"))
        samples = PcmReader(encoding="f32").read(chunk)
        expected = samples.copy()
        chunk[:] = bytes(len(chunk))
        assert np.array_equal(samples, expected)


class TestBadInput:
    @pytest.mark.parametrize("rate", [0, 999, 1_000_000, 16_000.5, "16000", None, True, -16_000])
    def test_rate(self, rate):
        with pytest.raises(InvalidAudioError, match="sample rate"):
            PcmReader(rate)

    @pytest.mark.parametrize("encoding", ["s8", "", "S16", None])
    def test_encoding(self, encoding):
        with pytest.raises(InvalidAudioError, match="encoding"):
            PcmReader(encoding=encoding)

    @pytest.mark.parametrize(
        ("chunk", "message"),
        [
            (np.zeros((10, 2), np.float32), "shape"),
            (np.zeros((), np.float32), "shape"),
            (np.zeros(10, np.int8), "dtype"),
            (np.zeros(10, np.complex64), "dtype"),
            (np.array([0, np.nan], np.float32), "finite"),
            (np.array([0, np.inf]), "finite"),
            (np.array([0, -np.inf], np.float32), "finite"),
            (np.array([1e300]), "finite"),
            ([0.0, 1.0], "not list"),
            ("text", "not str"),
            (None, "not NoneType"),
            (memoryview(np.zeros(4, np.float32)), "memoryview of format"),
        ],
    )
    def test_chunk(self, chunk, message):
        reader = PcmReader()
        with pytest.raises(InvalidAudioError, match=message):
            reader.read(chunk)
        assert len(reader.read(bytes(20))) == 10

    def test_nothing_is_taken_of_a_bad_piece(self):
        reader = PcmReader(encoding="f32")
        good = signal(4)
        data = good.tobytes()
        first = reader.read(data[:6])
        with pytest.raises(InvalidAudioError):
            reader.read(data[6:8] + np.array([np.nan], "<f4").tobytes())
        rest = reader.read(data[6:])
        assert np.array_equal(np.concatenate([first, rest]), good)

    def test_an_array_between_the_halves_of_a_sample(self):
        reader = PcmReader()
        reader.read(b"abc")
        with pytest.raises(InvalidAudioError, match="rest of it"):
            reader.read(np.zeros(10, np.float32))
        assert len(reader.read(b"d")) == 1

    def test_integers_stored_as_floats_are_warned_of_once(self):
        reader = PcmReader()
        assert reader.warnings == ()
        for peak in (20_000, 30_000):
            reader.read(np.array([0, peak], np.float32))
        [warning] = reader.warnings
        assert "20000" in warning


def test_a_piece_comes_out_but_for_the_resamplers_delay():
    reader = PcmReader(8000)
    out = sum(len(reader.read(np.zeros(800, np.float32))) for _ in range(10))
    assert 16_000 - 400 <= out <= 16_000


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs /proc")
def test_resampling_takes_no_thread():
    before = len(list(Path("/proc/self/task").iterdir()))
    readers = [PcmReader(8000) for _ in range(20)]
    for reader in readers:
        reader.read(np.zeros(800, np.float32))
    assert len(list(Path("/proc/self/task").iterdir())) == before
