"""The cost model: what it learns from what was measured, and what it then chooses."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.kv.costs import GUESS, LEAST_PAGES, LEAST_TOKENS, CopyCost, PrefillCost, choose_load

TOKEN, KEY = 1e-3, 2e-7
"""Seconds, of a device that the tests make up."""


def prefill(cost: PrefillCost, first: int, count: int) -> None:
    keys = sum(range(first + 1, first + count + 1))
    cost.observe(count, keys, TOKEN * count + KEY * keys)


def test_prefill_is_predicted_from_chunks_of_other_contexts() -> None:
    cost = PrefillCost()
    for first in (0, 512, 1024, 0, 2048):
        prefill(cost, first, 512)
    expected = TOKEN * 1000 + KEY * sum(range(4001, 5001))
    assert cost.seconds(4000, 1000) == pytest.approx(expected, rel=1e-3)
    assert cost.seconds(0, 0) == 0.0


def test_contexts_that_are_all_alike_tell_the_rate_and_nothing_of_attention() -> None:
    cost = PrefillCost()
    for _ in range(5):
        prefill(cost, 0, 128)
    assert cost.seconds(0, 128) == pytest.approx(TOKEN * 128 + KEY * 128 * 129 / 2, rel=1e-3)
    assert cost.seconds(10_000, 100) > 0


def test_decodes_teach_nothing_of_prefill() -> None:
    cost = PrefillCost()
    cost.observe(LEAST_TOKENS - 1, 5000, 100.0)
    assert cost.seconds(0, 10) == 10 * GUESS


def test_what_is_new_outweighs_what_is_old() -> None:
    cost = PrefillCost()
    for seconds in [1.0] * 100 + [2.0] * 100:
        cost.observe(100, 5050, seconds)
    assert cost.seconds(0, 100) == pytest.approx(2.0, rel=0.02)


@given(
    chunks=st.lists(
        st.tuples(st.integers(64, 1024), st.integers(0, 8000), st.floats(1e-4, 10.0)), min_size=1, max_size=40
    ),
    first=st.integers(0, 10_000),
    count=st.integers(1, 4096),
)
def test_predictions_are_never_negative(chunks: list[tuple[int, int, float]], first: int, count: int) -> None:
    cost = PrefillCost()
    for tokens, before, seconds in chunks:
        cost.observe(tokens, tokens * before + tokens * (tokens + 1) // 2, seconds)
    assert cost.seconds(first, count) >= 0.0
    assert cost.seconds(first, count + 1) >= cost.seconds(first, count)


def test_copies_follow_what_they_took() -> None:
    cost = CopyCost(5.0)
    assert cost.page_seconds == 5.0
    cost.observe(LEAST_PAGES, 0.1 * LEAST_PAGES)
    assert cost.page_seconds == pytest.approx(0.1)
    for _ in range(100):
        cost.observe(4, 0.8)
    assert cost.page_seconds == pytest.approx(0.2, rel=0.02)
    cost.observe(0, 9.0)
    assert cost.page_seconds == pytest.approx(0.2, rel=0.02)


def test_one_page_that_took_long_does_not_make_all_pages_dear() -> None:
    cost, slow = CopyCost(1e-4), 0.05
    cost.observe(1, slow)
    assert cost.page_seconds < slow / (LEAST_PAGES - 1)
    cost.observe(250, 0.025)
    assert cost.page_seconds < 4e-4
    cost.observe(1, slow)
    assert cost.page_seconds < 6e-4


@given(pages=st.lists(st.floats(0.0, 1.0), max_size=30), compute=st.floats(0.0, 1.0))
def test_no_other_number_of_pages_would_be_faster(pages: list[float], compute: float) -> None:
    def rest(count: int) -> float:
        return compute * (len(pages) + 1 - count)

    totals = [sum(pages[:count]) + rest(count) for count in range(len(pages) + 1)]
    assert totals[choose_load(pages, rest)] == pytest.approx(min(totals))


def test_the_part_that_is_in_memory_is_loaded_and_the_part_on_a_slow_disk_computed() -> None:
    assert choose_load([0.1] * 4 + [5.0] * 4, lambda count: 1.0 * (9 - count)) == 4
