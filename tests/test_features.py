"""Windows of features: faster-whisper's to the last bit, and reduced ones."""

import os
import platform
import subprocess
import sys

import numpy as np
import pytest
from faster_whisper.feature_extractor import FeatureExtractor as PeerExtractor

from speechrnt import _mel
from speechrnt.features import (
    FRAMES_PER_SECOND,
    WINDOW_FRAMES,
    FeatureExtractor,
    FullContextWindows,
    OwnMaximumWindows,
    ReducedContextWindows,
)
from speechrnt.mel_frames import MelFrames

RATE = 16000
RNG = np.random.default_rng(5)


def frames_of(samples, n_mels=80, block=20_000):
    blocks = (samples[start : start + block] for start in range(0, len(samples), block))
    return MelFrames(blocks, n_mels)


def noise(samples, level=0.1):
    return (RNG.standard_normal(samples) * level).astype(np.float32)


class TestFeatureExtractor:
    @pytest.mark.parametrize("n_mels", [80, 128])
    def test_filters_are_the_same(self, n_mels):
        expected = PeerExtractor(feature_size=n_mels).mel_filters
        np.testing.assert_array_equal(FeatureExtractor(n_mels).mel_filters, expected)

    @pytest.mark.parametrize("n_mels", [80, 128])
    @pytest.mark.parametrize(
        "samples", [0, 1, 40, 41, 159, 160, 401, RATE, 30 * RATE, 59 * RATE + 17, 100 * RATE]
    )
    def test_equal_to_the_last_bit(self, n_mels, samples):
        audio = noise(samples)
        audio[: samples // 3] *= 1e-4
        expected = PeerExtractor(feature_size=n_mels)(audio)
        np.testing.assert_array_equal(FeatureExtractor(n_mels)(audio), expected)

    @pytest.mark.filterwarnings("ignore::RuntimeWarning")
    @pytest.mark.parametrize("samples", [RATE, 40 * RATE])
    def test_equal_where_powers_overflow(self, samples):
        audio = noise(samples, level=1e20)
        expected = PeerExtractor()(audio)
        assert not np.isfinite(expected).all()
        np.testing.assert_array_equal(FeatureExtractor()(audio), expected)

    @pytest.mark.skipif(platform.machine() != "x86_64", reason="names a kernel for x86-64")
    @pytest.mark.parametrize("kernel", ["Haswell", "Nehalem"])
    def test_equal_with_other_kernels_of_blas(self, kernel):
        program = """
import numpy as np
from faster_whisper.feature_extractor import FeatureExtractor as PeerExtractor
from speechrnt.features import FeatureExtractor
audio = np.random.default_rng(1).standard_normal(100 * 16000).astype(np.float32)
np.testing.assert_array_equal(FeatureExtractor()(audio), PeerExtractor()(audio))
"""
        environment = {**os.environ, "OPENBLAS_CORETYPE": kernel}
        subprocess.run([sys.executable, "-c", program], env=environment, check=True)

    def test_the_native_kernel_agrees(self):
        audio = noise(7 * RATE)
        np.testing.assert_allclose(_mel.log_mel(audio), FeatureExtractor()(audio), atol=1e-4)

    def test_attributes_are_those_of_the_peer(self):
        for name in ("sampling_rate", "n_fft", "hop_length", "chunk_length", "n_samples"):
            assert getattr(FeatureExtractor(), name) == getattr(PeerExtractor(), name)
        assert FeatureExtractor().nb_max_frames == PeerExtractor().nb_max_frames
        assert FeatureExtractor().time_per_frame == PeerExtractor().time_per_frame


class TestFullContext:
    def test_the_rest_of_a_window_is_zero(self):
        features = FeatureExtractor()(noise(4 * RATE))
        window = FullContextWindows(features).at(150)
        assert (window.start, window.duration) == (1.5, 2.5)
        assert window.features.shape == (1, 80, WINDOW_FRAMES)
        np.testing.assert_array_equal(window.features[0, :, :250], features[:, 150:400])
        assert not window.features[0, :, 250:].any()

    def test_a_window_is_no_longer_than_the_encoder(self):
        window = FullContextWindows(FeatureExtractor()(noise(40 * RATE))).at(100)
        assert window.frames == WINDOW_FRAMES


class TestReducedContext:
    def windows(self, samples, n_mels=80, **options):
        return ReducedContextWindows(
            frames_of(samples, n_mels), **{"longest_s": 10.0, "margin_s": 0.5, **options}
        )

    def test_audio_margin_and_silence(self):
        audio = noise(3 * RATE)
        window = self.windows(audio).at(0)
        assert (window.frames, window.features.shape) == (300, (1, 80, 350))
        log10_mel = _mel.log10_mel(audio)[:, :300]
        maximum = log10_mel.max()
        expected = (np.maximum(log10_mel, maximum - 8) + 4) / 4
        np.testing.assert_allclose(window.features[0, :, :300], expected, atol=1e-6)
        np.testing.assert_allclose(window.features[0, :, 300:], (maximum - 8 + 4) / 4, atol=1e-6)

    @pytest.mark.parametrize("n_mels", [80, 128])
    def test_the_encoder_output_never_looks_like_its_input(self, n_mels):
        for frames in range(0, 1000, 7):
            audio = np.zeros(frames * 160, dtype=np.float32)
            context = self.windows(audio, n_mels, margin_s=0).at(0).features.shape[2]
            assert context >= max(frames, 1)
            assert (context + 1) // 2 != n_mels

    def test_floor(self):
        audio = noise(RATE)
        assert self.windows(audio, floor_s=10.0).at(0).features.shape[2] == 1000

    def test_no_room_for_the_margin(self):
        window = self.windows(noise(30 * RATE), longest_s=30.0, margin_s=2.0).at(0)
        assert (window.frames, window.features.shape[2]) == (3000, WINDOW_FRAMES)

    def test_long_audio_is_cut_at_a_pause(self):
        audio = noise(25 * RATE)
        audio[int(8.2 * RATE) : int(8.6 * RATE)] = 0
        window = self.windows(audio).at(0)
        assert 8.2 < window.duration < 8.6

    def test_the_cut_depends_on_the_audio_alone(self):
        audio = noise(25 * RATE)
        assert self.windows(audio).at(0).frames == self.windows(audio * 0.5).at(0).frames

    def test_of_equally_quiet_places_the_latest_is_taken(self):
        window = self.windows(np.zeros(25 * RATE, dtype=np.float32)).at(0)
        assert 9.9 < window.duration <= 10

    def test_windows_cover_the_audio(self):
        windows = self.windows(noise(60 * RATE))
        seek = 0
        content = windows.content_up_to(sys.maxsize)
        while seek < content:
            window = windows.at(seek)
            assert 5 * FRAMES_PER_SECOND <= window.frames <= 10 * FRAMES_PER_SECOND or (
                seek + window.frames == content
            )
            seek += window.frames
        assert seek == 60 * FRAMES_PER_SECOND

    def test_full_context_of_the_same_audio(self):
        windows = self.windows(noise(3 * RATE))
        window = windows.at(100)
        full = windows.full_context(window)
        assert (full.seek, full.frames) == (window.seek, window.frames)
        assert full.features.shape[2] == WINDOW_FRAMES
        np.testing.assert_array_equal(full.features[:, :, :200], window.features[:, :, :200])


class TestOwnMaximum:
    def test_windows_are_those_of_their_audio_alone(self):
        audio = noise(70 * RATE)
        windows = OwnMaximumWindows(frames_of(audio))
        for seek, frames in ((0, 3000), (1000, 3000), (6000, 1000)):
            window = windows.at(seek)
            assert (window.seek, window.frames) == (seek, frames)
            expected = np.full((80, WINDOW_FRAMES), -10.0, dtype=np.float32)
            expected[:, :frames] = _mel.log10_mel(audio, 80)[:, seek : seek + frames]
            _mel.normalize(expected, out=expected)
            np.testing.assert_array_equal(window.features[0], expected)

    def test_clips_end_where_they_should(self):
        windows = OwnMaximumWindows(frames_of(noise(10 * RATE)), 500)
        assert [windows.at(100, end).frames for end in (150, 600, 700)] == [50, 500, 500]

    @pytest.mark.parametrize("samples", [0, 1, 159, 160])
    def test_hardly_any_audio(self, samples):
        window = OwnMaximumWindows(frames_of(noise(samples))).at(0)
        assert window.frames == samples // 160
        assert np.isfinite(window.features).all()
