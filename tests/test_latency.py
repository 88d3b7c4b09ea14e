"""Histograms: counts that are exact, percentiles that are a fifth too high at most."""

import math
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from speechrnt.errors import OptionError
from speechrnt.latency import STAGES, Histogram, StageTimings

TIMES = st.floats(1e-6, 3600, allow_nan=False)


def histogram_of(times):
    histogram = Histogram()
    for time in times:
        histogram.add(time)
    return histogram.snapshot()


def test_an_empty_histogram_says_zero():
    empty = Histogram().snapshot()
    assert (empty.count, empty.sum_s, empty.p50_s, empty.p99_s, empty.buckets) == (0, 0, 0, 0, {})


@given(times=st.lists(TIMES, min_size=1, max_size=200))
def test_percentiles_are_never_too_low_and_a_fifth_too_high_at_most(times):
    shown = histogram_of(times)
    assert shown.count == len(times) == sum(shown.buckets.values())
    assert shown.sum_s == pytest.approx(sum(times))
    times = sorted(times)
    for share, value in ((0.5, shown.p50_s), (0.9, shown.p90_s), (0.99, shown.p99_s)):
        exact = next(t for n, t in enumerate(times, start=1) if n >= share * len(times))
        assert exact * (1 - 1e-9) <= value <= exact * 1.2


@pytest.mark.parametrize("time", [0.0, -1.0, 1e-9, 1e-6])
def test_times_below_the_range_are_counted_at_its_beginning(time):
    shown = histogram_of([time])
    assert (shown.sum_s, shown.p50_s, shown.buckets) == (time, 1e-6, {1e-6: 1})


@pytest.mark.parametrize("time", [3612.0, 4000.0, 1e9, 1.7e308, math.inf])
def test_times_beyond_the_range_have_no_limit(time):
    shown = histogram_of([time, 1e-6, 1e-6])
    assert shown.sum_s == pytest.approx(time)
    assert (shown.p50_s, shown.p90_s, shown.p99_s) == (1e-6, math.inf, math.inf)
    assert shown.buckets == {1e-6: 2, math.inf: 1}


def test_the_longest_limit_is_of_the_last_bucket_that_has_one():
    [longest] = histogram_of([3600.0]).buckets
    assert 3600 < longest < 3612
    below, above = math.nextafter(longest, 0), math.nextafter(longest, math.inf)
    assert histogram_of([below, longest]).buckets == {longest: 2}
    assert histogram_of([above]).buckets == {math.inf: 1}


def test_what_is_no_number_is_refused_and_counts_nothing():
    histogram = Histogram()
    histogram.add(0.5)
    before = histogram.snapshot()
    with pytest.raises(OptionError, match="seconds: must be a number, not nan"):
        histogram.add(math.nan)
    assert histogram.snapshot() == before


def test_limits_of_buckets_are_in_order_and_hold_what_is_counted():
    shown = histogram_of([0.001, 0.002, 0.002, 0.5])
    assert list(shown.buckets.values()) == [1, 2, 1]
    assert list(shown.buckets) == sorted(shown.buckets)


def test_no_count_is_lost_between_threads():
    histogram = Histogram()
    threads = [
        threading.Thread(target=lambda: [histogram.add(0.01) for _ in range(2000)])
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert histogram.snapshot().count == 8000


def test_timings_are_zero_unless_told_and_have_every_stage():
    assert {stage: getattr(StageTimings(), stage) for stage in STAGES} == dict.fromkeys(STAGES, 0.0)
    assert STAGES == ("ingest", "mel", "queue", "encode", "decode", "text", "delivery", "total")
