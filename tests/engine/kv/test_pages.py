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
    with pytest.raises(AssertionError, match="empty and cannot be shared"):
        pool.share(pages)


def test_a_page_with_content_is_findable_until_it_is_needed() -> None:
    pool = PagePool(3)
    first, second, third = pool.allocate(3)
    pool.index.insert(b"a", first)
    pool.index.insert(b"ab", second)
    pool.release([first, second, third])
    assert (pool.num_free, pool.num_idle) == (3, 2)
    assert pool.allocate(1) == [third], "empty pages go first"
    assert pool.index.match([b"a", b"ab"]) == [first, second]
    pool.share([first, second])
    assert (pool.num_free, pool.num_idle) == (0, 0)
    pool.check_integrity([[third], [first, second]])


def test_the_page_let_go_first_is_evicted_first_and_the_last_of_a_sequence_before_the_others() -> None:
    pool = PagePool(4)
    old, new = pool.allocate(2), pool.allocate(2)
    for key, page in zip([b"a", b"ab", b"c", b"cd"], [*old, *new], strict=True):
        pool.index.insert(key, page)
    pool.release(old)
    pool.release(new)
    assert [pool.allocate(1)[0] for _ in range(4)] == [old[1], old[0], new[1], new[0]]
    assert len(pool.index) == 0


def test_a_page_that_is_used_again_is_the_last_to_go() -> None:
    pool = PagePool(2)
    first, second = pool.allocate(2)
    pool.index.insert(b"a", first)
    pool.index.insert(b"b", second)
    pool.release([first])
    pool.release([second])
    pool.share([first])
    pool.release([first])
    assert pool.allocate(1) == [second]


def test_idle_pages_count_as_free_until_they_are_shared() -> None:
    pool = PagePool(3)
    pages = pool.allocate(2)
    for number, page in enumerate(pages):
        pool.index.insert(bytes([number]), page)
    pool.release(pages)
    assert pool.count_idle(pages) == 2
    pool.share(pages[:1])
    assert pool.count_idle(pages) == 1 and pool.num_free == 2


@given(
    num_pages=st.integers(1, 20),
    actions=st.lists(
        st.tuples(st.sampled_from(["allocate", "share", "release", "index", "find"]), st.integers(0, 20)), max_size=80
    ),
)
def test_counts_balance_after_every_operation(num_pages: int, actions: list[tuple[str, int]]) -> None:
    pool = PagePool(num_pages)
    holders: list[list[int]] = []
    for action, number in actions:
        if action == "allocate":
            if number <= pool.num_free:
                holders.append(pool.allocate(number))
        elif action == "find":
            if pages := pool.index.match([bytes([number])]):
                pool.share(pages)
                holders.append(pages)
        elif holders:
            pages = holders[number % len(holders)]
            if action == "index":
                for page in pages:
                    if page not in pool.index:
                        pool.index.insert(bytes([number]), page)
                continue
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
