"""Streams: their text is that of the recording."""

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from streaming_helpers import (
    RATE,
    WAIT_S,
    cut,
    one_shot,
    said,
    streamed,
)

from speechrnt import (
    Audio,
    OptimizationConfig,
    PerformanceOptimizedSTT,
)

LANGUAGES = ("en", "de", "es", "fr")


class TestExactness:
    """A stream's text is the recording's, however it was cut and whenever partials ran."""

    @pytest.mark.parametrize("language", LANGUAGES)
    @settings(
        max_examples=6,
    )
    @given(data=st.data())
    def test_random_chunks(self, stt, recordings, language, data):
        samples = recordings.joined(language, 2, 0.7)
        places = data.draw(st.lists(st.integers(0, len(samples)), max_size=60), "cuts")
        interval = data.draw(st.sampled_from([0.05, 0.5, 60.0]), "partial interval")
        detect = data.draw(st.booleans(), "detect the language")
        known = None if detect else language
        result = streamed(stt, cut(samples, places), known, partial_interval_s=interval)
        assert said(result) == said(one_shot(stt, samples, known))

    @settings(
        max_examples=10,
    )
    @given(data=st.data())
    def test_flushes_at_random_samples(self, stt, recordings, data):
        samples = recordings.joined("en", 2, 0.7, skip=data.draw(st.integers(0, 5)))
        flushes = sorted(data.draw(st.lists(st.integers(0, len(samples)), max_size=5), "flushes"))
        vad = data.draw(st.booleans(), "vad")
        pieces = []
        for piece in cut(samples, flushes):
            half = len(piece) // 3
            pieces += [piece[:half], piece[half:], None]
        result = streamed(stt, pieces[:-1], "en", vad=vad)
        assert said(result) == said(one_shot(stt, samples, "en", flushes, vad=vad))

    def test_one_sample_at_a_time(self, stt, recordings):
        samples = recordings.joined("en", 1, 0.0)[: 2 * RATE]
        result = streamed(stt, np.split(samples, len(samples)), "en")
        assert said(result) == said(one_shot(stt, samples, "en"))

    def test_a_minute_without_a_pause(self, stt, recordings):
        samples = recordings.joined("en", 60, 0.0)[: 60 * RATE]
        expected = one_shot(stt, samples, "en")
        assert len(expected.segments) >= 3
        for segment, following in zip(expected.segments, expected.segments[1:], strict=False):
            assert following.start - segment.end < 0.5  # cut for its length
        result = streamed(stt, cut(samples, range(0, len(samples), 1111)), "en")
        assert said(result) == said(expected)

    def test_three_minutes_with_pauses(self, stt, recordings):
        pieces = [
            recordings.joined(LANGUAGES[index % 4], 1, 0.4 + index % 5 * 0.3, index // 4)
            for index in range(80)
        ]
        samples = np.concatenate(pieces)
        assert len(samples) >= 180 * RATE
        expected = one_shot(stt, samples)
        assert len(expected.segments) > 40
        result = streamed(stt, cut(samples, range(0, len(samples), 8000)))
        assert said(result) == said(expected)

    @pytest.mark.parametrize("at", [0.31, 0.5, 0.77])
    def test_the_end_inside_a_word(self, stt, recordings, at):
        samples = recordings.joined("en", 1, 0.0, skip=9)
        samples = samples[: round(at * len(samples))]
        result = streamed(stt, cut(samples, range(0, len(samples), 320)), "en")
        assert said(result) == said(one_shot(stt, samples, "en"))

    def test_telephone_audio(self, stt, recordings):
        samples = recordings.joined("de", 2, 0.6)
        data = (samples[::2] * 2**15).astype("<i2").tobytes()
        expected = one_shot(stt, Audio.from_pcm(data, "s16", 8000), "de")
        pieces = [data[at : at + 333] for at in range(0, len(data), 333)]
        result = streamed(stt, pieces, "de", sample_rate=8000)
        assert said(result) == said(expected)

    @pytest.mark.parametrize("options", [{"vad": False}, {"beam_size": 1}, {"endpoint_s": 0.2}])
    def test_options(self, stt, recordings, options):
        samples = recordings.joined("es", 3, 0.35)
        result = streamed(stt, cut(samples, range(0, len(samples), 777)), "es", **options)
        assert said(result) == said(one_shot(stt, samples, "es", **options))

    def test_audio_that_comes_in_real_time(self, stt, recordings):
        samples = recordings.joined("fr", 2, 0.6)
        stream = stt.stream()
        for piece in cut(samples, range(0, len(samples), 3200)):
            stream.push(piece)
            time.sleep(len(piece) / RATE)
        assert said(stream.finalize().result(WAIT_S)) == said(one_shot(stt, samples))

    def test_without_threads_of_its_own(self, recordings):
        samples = recordings.joined("en", 3, 0.6)
        config = OptimizationConfig(enable_async_processing=False)
        with PerformanceOptimizedSTT(config) as stt:
            # More than a nested call per task could bear.
            long = np.concatenate([np.zeros(1800 * RATE, np.float32), samples])
            result = streamed(stt, [long], "en", max_buffered_s=600.0)
            assert result.text == one_shot(stt, samples, "en").text
