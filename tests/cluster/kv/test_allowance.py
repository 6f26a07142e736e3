"""How many pages the bandwidth for saving lets through."""

from hypothesis import given
from hypothesis import strategies as st

from cluster.kv.allowance import BURST_S, Allowance

PAGE_BYTES = 1000


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@given(
    st.floats(1.0, 1000.0),
    st.lists(st.tuples(st.floats(0.0, 5.0), st.integers(0, 300), st.floats(0.0, 1.0)), max_size=30),
)
def test_what_is_copied_keeps_to_the_bandwidth_and_what_is_not_costs_nothing(
    rate: float, rounds: list[tuple[float, int, float]]
) -> None:
    """Rounds: seconds that pass, pages wanted, and the share of those taken that is given back."""
    clock = Clock()
    allowance = Allowance(rate * PAGE_BYTES, PAGE_BYTES, clock)
    most, copied = max(1.0, rate * BURST_S), 0
    for seconds, wanted, share in rounds:
        clock.now += seconds
        assert 0 <= allowance.pages() <= most
        taken = min(wanted, allowance.pages())
        allowance.take(taken)
        allowance.give_back(int(taken * share))
        copied += taken - int(taken * share)
        assert copied <= most + rate * clock.now + 1e-6


def test_pages_that_nobody_took_leave_no_debt() -> None:
    allowance = Allowance(40 * PAGE_BYTES, PAGE_BYTES, Clock())
    allowance.take(10_000)
    assert allowance.pages() < 0
    allowance.give_back(10_000)
    assert allowance.pages() == 10


def test_without_a_bandwidth_there_is_no_limit() -> None:
    allowance = Allowance(None, PAGE_BYTES, Clock())
    allowance.take(10**9)
    allowance.give_back(10**9)
    assert allowance.pages() > 10**9
