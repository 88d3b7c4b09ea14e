"""The log-mel of a window that grows: the bits of the whole signal's."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from speechrnt import _mel
from speechrnt.growing_mel import GrowingLogMel, complete
from speechrnt.pools import AudioBufferPool

SIGNAL = np.random.default_rng(0).uniform(-0.5, 0.5, 200_000).astype(np.float32)


def grown(pool, n_mels, start, places):
    mel = GrowingLogMel(n_mels, pool)
    mel.begin(start)
    for place in places:
        mel.push(SIGNAL[mel.end : place])
    return mel


@pytest.mark.parametrize("n_mels", [80, 128])
@settings(max_examples=40)
@given(data=st.data())
def test_features_are_those_of_the_window_alone(n_mels, data):
    start = data.draw(st.integers(0, 5000), "start")
    places = sorted(data.draw(st.lists(st.integers(start, start + 100_000), max_size=9), "cuts"))
    end = data.draw(st.integers(start + 160, start + 110_000), "end of the window")
    pool = AudioBufferPool()
    mel = grown(pool, n_mels, start, places)
    assert mel.end == (places[-1] if places else start)
    window = SIGNAL[start:end]
    out = np.full((n_mels, len(window) // 160), np.nan, np.float32)
    largest = complete(window, mel.frames, out)
    expected = _mel.log10_mel(window, n_mels)[:, : out.shape[1]]
    assert np.array_equal(out, expected)
    assert largest == expected.max()
    mel.release()
    assert pool.statistics().in_use == 0


def test_without_any_frames_all_are_computed():
    window = SIGNAL[:1600]
    out = np.empty((80, 10), np.float32)
    assert complete(window, None, out) == out.max()
    assert np.array_equal(out, _mel.log10_mel(window)[:, :10])


def test_it_grows_through_a_long_window_and_starts_anew():
    pool = AudioBufferPool()
    mel = grown(pool, 80, 0, range(0, 200_001, 1600))
    assert mel.frames.shape == (80, (200_000 - 200) // 160 + 1)
    mel.begin(50_000)
    assert mel.frames is None
    assert pool.statistics().in_use == 0
    mel.push(SIGNAL[50_000:60_000])
    expected = _mel.log10_mel(SIGNAL[50_000:60_000])
    assert np.array_equal(mel.frames, expected[:, : mel.frames.shape[1]])
    mel.release()
