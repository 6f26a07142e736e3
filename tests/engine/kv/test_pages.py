"""The page pool under random use: counts balance after every operation."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.errors import PoolExhausted
from engine.kv.pages import PagePool


def test_a_failed_allocation_takes_nothing() -> None:
    pool = PagePool(4)
    held = pool.allocate(3)
    with pytest.raises(PoolExhausted, match="2 pages asked for, 1 of 4"):
        pool.allocate(2)
    assert pool.num_free == 1
    pool.check_integrity([held])


def test_a_shared_page_is_free_only_when_its_last_holder_lets_go() -> None:
    pool = PagePool(2)
    pages = pool.allocate(2)
    pool.share(pages)
    pool.release(pages)
    assert pool.num_free == 0
    pool.release(pages)
    assert pool.num_free == 2


def test_releasing_a_free_page_is_caught() -> None:
    pool = PagePool(1)
    pages = pool.allocate(1)
    pool.release(pages)
    with pytest.raises(AssertionError, match="released more often"):
        pool.release(pages)
    with pytest.raises(AssertionError, match="free and cannot be shared"):
        pool.share(pages)


@given(
    num_pages=st.integers(1, 20),
    actions=st.lists(st.tuples(st.sampled_from(["allocate", "share", "release"]), st.integers(0, 20)), max_size=60),
)
def test_counts_balance_after_every_operation(num_pages: int, actions: list[tuple[str, int]]) -> None:
    pool = PagePool(num_pages)
    holders: list[list[int]] = []
    for action, number in actions:
        if action == "allocate":
            if number <= pool.num_free:
                holders.append(pool.allocate(number))
        elif holders:
            pages = holders[number % len(holders)]
            if action == "share":
                pool.share(pages)
                holders.append(list(pages))
            else:
                holders.remove(pages)
                pool.release(pages)
        pool.check_integrity(holders)
    for pages in holders:
        pool.release(pages)
    assert pool.num_free == num_pages
