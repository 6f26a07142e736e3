"""Tags of pages: what is shown is found, and nothing else, at a cost that does not grow with their number."""

import hashlib
import time
from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from cluster.kv.tags import BUCKET, hide, is_shown, new_table, show


def key(number: int) -> bytes:
    return hashlib.blake2b(number.to_bytes(8, "little"), digest_size=32).digest()


@given(steps=st.lists(st.tuples(st.booleans(), st.integers(0, 20))))
def test_what_was_shown_and_not_hidden_is_found(steps: list[tuple[bool, int]]) -> None:
    tags = new_table(len(steps) + 1)
    there: Counter[int] = Counter()
    for is_new, number in steps:
        (show if is_new else hide)(tags, key(number))
        there[number] = there[number] + 1 if is_new else max(0, there[number] - 1)
        assert all(is_shown(tags, key(number)) == (there[number] > 0) for number in range(21))


def test_a_full_bucket_shows_no_more_and_harms_no_other_page() -> None:
    tags = new_table(1)
    for number in range(BUCKET + 5):
        show(tags, key(number))
    assert [is_shown(tags, key(number)) for number in range(BUCKET + 5)] == [True] * BUCKET + [False] * 5
    for number in range(BUCKET + 5):
        hide(tags, key(number))
    assert not tags.any()


def test_a_table_for_no_pages_shows_none() -> None:
    assert not is_shown(new_table(0), key(1))


def test_pages_fill_their_table_and_are_shown() -> None:
    tags = new_table(20_000)
    for number in range(20_000):
        show(tags, key(number))
    assert sum(is_shown(tags, key(number)) for number in range(20_000)) >= 19_990


def test_to_look_among_millions_of_pages_takes_microseconds() -> None:
    tags = new_table(2**22)
    begin = time.perf_counter()
    for number in range(1000):
        is_shown(tags, key(number))
    assert time.perf_counter() - begin < 0.5, "14 ms each, if all tags were looked through"
