"""Histograms: counts that are exact, percentiles that are a fifth too high at most."""

import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

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


@pytest.mark.parametrize("time", [0.0, -1.0, 1e-9, 1e9])
def test_times_beyond_the_range_are_counted_at_its_ends(time):
    shown = histogram_of([time])
    assert shown.count == 1
    assert shown.sum_s == time
    assert 1e-6 <= shown.p50_s <= 5000


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
