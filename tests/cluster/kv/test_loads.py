"""What is decided of a load, what counts as its next pages, and what it teaches of what loads cost."""

import pytest

from cluster.kv.loads import LoadCosts, RunningLoad
from cluster.kv.wire import ELSEWHERE, ON_DISK, WireError
from engine.kv.costs import choose_load
from engine.kv.tier import Load

PAGE_BYTES = 1000


def running(num_pages: int, page_seconds: float = 1.0) -> RunningLoad:
    keys = [bytes([number]) * 32 for number in range(num_pages)]
    pages = list(range(num_pages))
    load = Load(1, keys, pages, lambda loaded: page_seconds * (num_pages - loaded))
    return RunningLoad(7, load, began=10.0, heard=10.0)


def test_what_is_in_memory_is_taken_at_once_and_what_is_not_is_fetched() -> None:
    load = running(4)
    assert load.decide([7, 3, ON_DISK, ELSEWHERE], LoadCosts(PAGE_BYTES), choose_load, now=10.5) == 2
    assert (load.wanted, load.slow) == (4, {ON_DISK: 1, ELSEWHERE: 1})
    assert load.heard == load.fetched == 10.5


def test_pages_that_cost_more_than_to_compute_them_are_left() -> None:
    costs = LoadCosts(PAGE_BYTES)
    for _ in range(50):
        costs.observe(ON_DISK, 1, 5.0)
    load = running(3)
    assert load.decide([7, ON_DISK, ON_DISK], costs, choose_load, now=10.0) == 1
    assert (load.wanted, not load.slow) == (1, True)


def test_a_host_that_finds_more_than_was_asked_for_is_not_believed() -> None:
    with pytest.raises(WireError):
        running(1).decide([1, 2], LoadCosts(PAGE_BYTES), choose_load, now=10.0)


def test_pages_that_were_copied_before_are_not_copied_again() -> None:
    load = running(4)
    load.decide([7, 3, ON_DISK, ON_DISK], LoadCosts(PAGE_BYTES), choose_load, now=10.0)
    load.copied = 2
    assert load.arrived(0, 2, now=11.0) is None
    assert load.arrived(0, 3, now=12.0) == 2
    assert load.heard == 12.0


@pytest.mark.parametrize(("first", "count"), [(3, 1), (0, 5)])
def test_pages_that_are_not_next_or_not_wanted_are_not_taken(first: int, count: int) -> None:
    load = running(4)
    load.decide([ON_DISK] * 4, LoadCosts(PAGE_BYTES), choose_load, now=10.0)
    with pytest.raises(WireError):
        load.arrived(first, count, now=11.0)


def test_no_more_pages_end_the_load_where_it_is() -> None:
    load = running(4)
    load.decide([7, ON_DISK, ON_DISK, ON_DISK], LoadCosts(PAGE_BYTES), choose_load, now=10.0)
    load.copied = 1
    load.arrived(1, 0, now=11.0)
    loaded = load.end(LoadCosts(PAGE_BYTES), now=12.0)
    assert load.wanted == 1
    assert (loaded.num_pages, loaded.seconds, loaded.recompute_seconds) == (1, 2.0, 1.0)


def test_pages_that_did_not_come_tell_nothing_of_what_a_fetch_costs() -> None:
    costs, before = LoadCosts(PAGE_BYTES), LoadCosts(PAGE_BYTES).page_seconds(ON_DISK)
    refused, damaged = running(200), running(200)
    for load in (refused, damaged):
        load.decide([ON_DISK] * 200, costs, choose_load, now=10.0)
    refused.arrived(0, 0, now=10.001)
    refused.end(costs, now=10.001)
    damaged.copied = 1
    damaged.cut_short()
    damaged.end(costs, now=10.001)
    assert costs.page_seconds(ON_DISK) == before


def test_what_a_fetch_took_tells_what_the_next_will_cost() -> None:
    costs, before = LoadCosts(PAGE_BYTES), LoadCosts(PAGE_BYTES).page_seconds(ON_DISK)
    load = running(2)
    load.decide([ON_DISK, ON_DISK], costs, choose_load, now=10.0)
    load.copied = 2
    load.end(costs, now=14.0)
    assert costs.page_seconds(ON_DISK) > before
    assert costs.page_seconds(ELSEWHERE) == LoadCosts(PAGE_BYTES).page_seconds(ELSEWHERE)
