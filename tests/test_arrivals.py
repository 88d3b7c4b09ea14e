"""When samples arrived."""

from hypothesis import given
from hypothesis import strategies as st

from speechrnt.arrivals import Arrivals


class TestArrivals:
    def test_a_sample_arrived_with_the_piece_that_holds_it(self):
        arrivals = Arrivals()
        arrivals.add(100, 1.0)
        arrivals.add(200, 2.0)
        assert [arrivals.of(at) for at in (1, 100, 101, 200)] == [1.0, 1.0, 2.0, 2.0]
        assert arrivals.of(201) is None

    def test_a_steady_trickle_does_not_move_arrivals_on(self):
        arrivals = Arrivals()
        for step in range(1000):
            arrivals.add(step + 1, step * 0.004)
        assert len(arrivals) < 500
        for step in (0, 500, 999):
            assert 0 <= step * 0.004 - arrivals.of(step + 1) <= 0.01

    def test_what_is_needed_for_later_samples_stays(self):
        arrivals = Arrivals()
        for piece in range(1, 11):
            arrivals.add(piece * 100, float(piece))
        arrivals.forget(550)
        assert len(arrivals) == 5
        assert arrivals.of(550) == 6.0
        arrivals.forget(2000)
        assert len(arrivals) == 0
        assert arrivals.of(1) is None

    @given(st.lists(st.tuples(st.integers(1, 100), st.floats(0, 1)), max_size=30), st.integers(0))
    def test_it_is_a_list_of_all_arrivals_but_for_a_step(self, pieces, sample):
        arrivals, all_of_them = Arrivals(), []
        received, now = 0, 0.0
        for size, pause in pieces:
            received, now = received + size, now + pause
            arrivals.add(received, now)
            all_of_them.append((received, now))
        known = next((at for end, at in all_of_them if end >= sample), None)
        found = arrivals.of(sample)
        assert (found is None) == (known is None)
        if known is not None:
            assert 0 <= known - found <= 0.0101
