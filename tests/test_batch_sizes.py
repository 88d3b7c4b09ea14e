"""Which batch sizes are used: from a clock that says what it is told."""

import threading

import pytest

from speechrnt import batch_sizes
from speechrnt.batch_sizes import BatchSizes


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still but for what calls cost, and those calls."""

    class Clock:
        now = 0.0

        def costing(self, seconds_per_size):
            sizes = []

            def call(size):
                sizes.append(size)
                self.now += seconds_per_size(size)

            return call, sizes

    clock = Clock()
    monkeypatch.setattr(batch_sizes.time, "process_time", lambda: clock.now)
    return clock


@pytest.fixture
def wall(monkeypatch, clock):
    """The same, but what passes is time on the wall only."""
    monkeypatch.setattr(batch_sizes.time, "process_time", lambda: 0.0)
    monkeypatch.setattr(batch_sizes.time, "perf_counter", lambda: clock.now)
    return clock


def sizes_for(encode, decode, clock, largest=16, fits=lambda frames: 1000, device="cpu"):
    sizes = BatchSizes(largest, fits, device)
    sizes.measure(300, clock.costing(encode)[0], clock.costing(decode)[0])
    return sizes.of(300)


def test_where_company_makes_nothing_cheaper_there_is_none(clock):
    assert sizes_for(lambda n: 0.001 * n, lambda n: 0.001 * n, clock) == (1, 1)


def test_where_a_call_costs_the_same_whatever_its_size_the_largest_is_used(clock):
    assert sizes_for(lambda n: 0.001, lambda n: 0.001, clock) == (16, 16)


def test_encoding_and_decoding_are_judged_apart(clock):
    assert sizes_for(lambda n: 0.001 * n, lambda n: 0.001, clock) == (1, 16)


def test_what_is_encoded_together_is_decoded_together(clock):
    assert sizes_for(lambda n: 0.001, lambda n: 0.001 * n, clock) == (16, 16)


def test_the_smallest_size_that_is_nearly_as_good_is_taken(clock):
    # 1: 10 ms each; 2: 6; 4: 5; 8: 4.9; 16: 4.85.
    per_item = {1: 10, 2: 6, 4: 5, 8: 4.9, 16: 4.85}
    decode_size = sizes_for(lambda n: 0.001 * n, lambda n: 1e-3 * n * per_item[n], clock)[1]
    assert decode_size == 4


def test_no_size_beyond_the_memory_or_the_configuration_is_tried(clock):
    call, tried = clock.costing(lambda n: 0.001)
    sizes = BatchSizes(16, lambda frames: 6, "cpu")
    sizes.measure(300, call, call)
    assert max(tried) == 6
    assert sizes.of(300) == (6, 6)
    assert sizes.largest(300) == 6


def test_something_always_fits():
    sizes = BatchSizes(8, lambda frames: 0, "cpu")
    assert sizes.largest(3000) == 1
    assert sizes.of(100) == (1, 1)


def test_trying_ends_when_there_is_no_hope(clock):
    call, tried = clock.costing(lambda n: 0.001 * n * n)
    BatchSizes(256, lambda frames: 1000, "cpu").measure(300, call, call)
    assert max(tried) == 2


def test_trying_ends_when_it_takes_long_and_brings_nothing(clock):
    call, tried = clock.costing(lambda n: 0.3 * n)
    BatchSizes(256, lambda frames: 1000, "cpu").measure(300, call, call)
    assert tried == 2 * [1, 1, 2]


def test_trying_goes_on_as_long_as_it_brings_much_however_long_it_takes(clock):
    # A large model: a call costs 0.3 s more than its windows.
    assert sizes_for(lambda n: 0.6 * n, lambda n: 0.3 + 0.02 * n, clock, largest=8) == (1, 8)


def test_on_a_cpu_what_passes_while_others_compute_is_no_cost(wall):
    sizes = BatchSizes(2, lambda frames: 1000, "cpu")
    call, _ = wall.costing(lambda n: 0.001)
    assert set(sizes.measure(300, call, call).encode.values()) == {0.0}


def test_on_a_gpu_cost_is_what_passes(wall):
    sizes = BatchSizes(2, lambda frames: 1000, "cuda")
    call, _ = wall.costing(lambda n: 0.001)
    assert sizes.measure(300, call, call).encode == pytest.approx({1: 1e-3, 2: 5e-4})


def test_what_is_measured_can_be_read(clock):
    sizes = BatchSizes(4, lambda frames: 1000, "cpu")
    call, _ = clock.costing(lambda n: 0.001)
    costs = sizes.measure(300, call, call)
    assert sizes.costs == {300: costs}
    assert costs.encode == pytest.approx({1: 1e-3, 2: 5e-4, 4: 2.5e-4})


def test_unmeasured_only_the_decoder_gets_company_on_a_cpu():
    assert BatchSizes(8, lambda frames: 1000, "cpu").of(3000) == (1, 8)


def test_unmeasured_both_get_company_on_a_gpu():
    assert BatchSizes(8, lambda frames: 1000, "cuda").of(3000) == (8, 8)


def test_expected_time_follows_what_is_observed():
    sizes = BatchSizes(8, lambda frames: 1000, "cpu")
    assert sizes.expected_s(300) == 0
    sizes.observe(300, 4, 0.4)
    assert sizes.expected_s(300) == pytest.approx(0.1)
    for _ in range(20):
        sizes.observe(300, 1, 0.3)
    assert sizes.expected_s(300) == pytest.approx(0.3, rel=0.01)


def test_expected_time_of_an_unknown_context_is_in_proportion_to_the_nearest_one():
    sizes = BatchSizes(8, lambda frames: 1000, "cpu")
    sizes.observe(100, 1, 0.1)
    sizes.observe(1000, 1, 0.5)
    assert sizes.expected_s(200) == pytest.approx(0.2)
    assert sizes.expected_s(3000) == pytest.approx(1.5)


def test_measuring_sets_the_expected_time(clock):
    sizes = BatchSizes(1, lambda frames: 1000, "cpu")
    sizes.measure(300, clock.costing(lambda n: 0.02)[0], clock.costing(lambda n: 0.03)[0])
    assert sizes.expected_s(300) == pytest.approx(0.05)


def test_a_call_that_fails_while_it_is_measured_leaves_all_as_it_was():
    def fail(size):
        raise RuntimeError("no")

    sizes = BatchSizes(8, lambda frames: 1000, "cpu")
    before = sizes.of(300)
    with pytest.raises(RuntimeError, match="no"):
        sizes.measure(300, fail, fail)
    assert (sizes.of(300), sizes.costs) == (before, {})


def test_threads_observe_and_read_side_by_side():
    sizes = BatchSizes(8, lambda frames: 1000, "cpu")

    def work(frames):
        for _ in range(500):
            sizes.observe(frames, 1, 0.1)
            assert sizes.expected_s(frames) == pytest.approx(0.1)
            assert sizes.of(frames)[1] in (1, 8)

    threads = [threading.Thread(target=work, args=(100 * n,)) for n in range(1, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
