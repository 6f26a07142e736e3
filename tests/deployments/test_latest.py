"""What was seen last is remembered, and no more."""

from hypothesis import given
from hypothesis import strategies as st

from deployments.latest import Latest


@given(keys=st.lists(st.integers(0, 9)), most=st.integers(1, 5))
def test_the_latest_keys_are_remembered_and_older_ones_forgotten(keys: list[int], most: int) -> None:
    latest: Latest[int] = Latest(most)
    for key in keys:
        latest.add(key)
        assert key in latest
    assert sum(key in latest for key in range(10)) == min(most, len(set(keys)))


def test_more_at_once_than_fit_leave_the_last_of_them() -> None:
    latest: Latest[str] = Latest(2)
    latest.add("a", "b", "c")
    assert ("a" in latest, "b" in latest, "c" in latest) == (False, True, True)
