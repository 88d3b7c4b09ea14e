"""The filter bank: sums in order, equal to those of the BLAS that it stands in for."""

import numpy as np
import pytest

from speechrnt import _filter_bank, _mel, features

pytestmark = pytest.mark.skipif(
    not _filter_bank.is_available(), reason="needs a CPU with fused multiply-add"
)


def power_of(frames, bins=201, seed=0):
    return np.random.default_rng(seed).random((frames, bins), dtype=np.float32)


def summed_in_order(filters, power):
    """Sum with the rounding of a fused multiply-add, by way of numbers with 64 bits or more."""
    sums = np.zeros((len(filters), len(power)), dtype=np.float32)
    for weights, values in zip(filters.T, power.T, strict=True):
        terms = np.multiply.outer(weights.astype(np.longdouble), values.astype(np.longdouble))
        sums = (terms + sums).astype(np.float32)
    return sums


@pytest.mark.skipif(np.finfo(np.longdouble).nmant < 63, reason="long double is no wider here")
@pytest.mark.parametrize("n_mels", [80, 128])
@pytest.mark.parametrize("frames", [1, 15, 16, 17, 100])
def test_each_sum_is_in_order_and_rounded_once_a_term(n_mels, frames):
    filters, power = _mel.mel_filters(n_mels), power_of(frames)
    np.testing.assert_array_equal(
        _filter_bank.filter_power(filters, power), summed_in_order(filters, power)
    )


def test_filters_may_have_zeros_within_and_nothing_but_zeros():
    filters = np.array([[0, 1, 0, 2, 0], [0, 0, 0, 0, 0], [1, 0, 0, 0, 3]], dtype=np.float32)
    power = np.array([[1, 2, 3, 4, 5], [5, 4, 3, 2, 1]], dtype=np.float32)
    expected = [[10, 8], [0, 0], [16, 8]]
    np.testing.assert_array_equal(_filter_bank.filter_power(filters, power), expected)


@pytest.mark.parametrize("shapes", [((0, 5), (3, 5)), ((2, 5), (0, 5)), ((2, 0), (3, 0))])
def test_empty_arrays(shapes):
    filters, power = (np.ones(shape, dtype=np.float32) for shape in shapes)
    out = _filter_bank.filter_power(filters, power)
    np.testing.assert_array_equal(out, np.zeros((len(filters), len(power))))


@pytest.mark.parametrize(
    ("filters", "power"),
    [
        (np.ones((2, 5)), np.ones((3, 5), np.float32)),
        (np.ones((2, 5), np.float32), np.ones((3, 5), np.float16)),
        (np.ones((2, 5), np.float32), np.ones((3, 4), np.float32)),
        (np.ones((2, 257), np.float32), np.ones((3, 257), np.float32)),
        (np.ones((129, 5), np.float32), np.ones((3, 5), np.float32)),
        (np.ones((5, 2), np.float32).T, np.ones((3, 5), np.float32)),
        (np.ones(5, np.float32), np.ones((3, 5), np.float32)),
    ],
)
def test_other_arrays_are_refused(filters, power):
    with pytest.raises(ValueError, match=r"bins|contiguous|[Bb]uffer"):
        _filter_bank.filter_power(filters, power)


@pytest.mark.parametrize("n_mels", [80, 128])
def test_where_blas_sums_in_order_it_does_so_for_every_number_of_frames(n_mels):
    if not features._blas_sums_in_order(n_mels):
        pytest.skip("this BLAS sums in another order, and the filter bank is not used")
    filters = _mel.mel_filters(n_mels)
    least = features._LEAST_FRAMES
    for frames in (*range(least, least + 150), *range(200, 3001, 41), 3001, 7919, 60_001):
        power = power_of(frames, seed=frames) * np.float32(10.0) ** (frames % 9 - 4)
        np.testing.assert_array_equal(
            _filter_bank.filter_power(filters, power), filters @ power.T, err_msg=str(frames)
        )
