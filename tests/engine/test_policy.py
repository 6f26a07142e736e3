"""Admission and victims, called with numbers."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.policy import (
    LEAST_CHUNK,
    Demand,
    Supply,
    admit_optimistic,
    admit_reserved,
    batch_share,
    choose_victim,
    chunk_tokens,
    prompt_share,
    spread_share,
    unfelt_tokens,
)
from engine.sampling_params import SamplingParams
from engine.sequence import Order, Request, Sequence


def holder(priority: int, arrival: int, *, pages: int = 1, in_flight: bool = False) -> Sequence:
    request = Request("r", (1,), SamplingParams())
    sequence = Sequence(arrival, request, Order(priority, arrival, 0), 0, frozenset(), 1)
    sequence.pages = list(range(pages))
    sequence.in_flight = in_flight
    return sequence


@pytest.mark.parametrize(
    ("now", "free", "running", "admitted"),
    [(4, 4, 0, True), (5, 4, 0, False), (4, 6, 2, True), (4, 5, 2, False)],
)
def test_optimistic_admission_leaves_a_page_to_grow_for_each_running_sequence(
    now: int, free: int, running: int, admitted: bool
) -> None:
    assert admit_optimistic(Demand(now, 99), Supply(100, free, running, 0)) is admitted


def test_reservation_counts_max_tokens_and_not_what_is_free() -> None:
    assert admit_reserved(Demand(1, 10), Supply(total=30, free=0, num_running=2, reserved=20))
    assert not admit_reserved(Demand(1, 11), Supply(total=30, free=30, num_running=2, reserved=20))


def test_the_victim_is_the_lowest_priority_then_the_latest() -> None:
    early, late, unimportant = holder(0, 1), holder(0, 9), holder(1, 2)
    assert choose_victim([early, late, unimportant], early) is unimportant
    assert choose_victim([early, late], early) is late


def test_nobody_yields_to_a_later_sequence_and_nobody_in_flight_yields() -> None:
    assert choose_victim([holder(0, 1), holder(0, 2)], holder(0, 3)) is None
    assert choose_victim([holder(0, 9, in_flight=True), holder(0, 8, pages=0)], holder(0, 3)) is None


def test_a_chunk_is_what_the_budget_leaves() -> None:
    assert (chunk_tokens(100, 30), chunk_tokens(10, 30)) == (30, 10)


@given(
    most=st.integers(1, 10_000),
    token_seconds=st.floats(0.0, 1.0, allow_nan=False),
    max_stall_s=st.floats(0.01, 2.0, allow_nan=False),
)
def test_prompts_beside_decodes_take_no_longer_than_allowed_where_short_chunks_can_help(
    most: int, token_seconds: float, max_stall_s: float
) -> None:
    tokens = unfelt_tokens(most, token_seconds, max_stall_s)
    assert min(most, LEAST_CHUNK) <= tokens <= most
    assert tokens * token_seconds <= max_stall_s or tokens < 2 * LEAST_CHUNK
    longer = 2 * tokens + 1
    assert longer > most or longer * token_seconds > max_stall_s, "no shorter than it must be"


@given(num_decoding=st.integers(0, 500), depth=st.integers(1, 8))
def test_decodes_make_as_many_batches_as_are_in_flight_and_they_differ_by_little(num_decoding: int, depth: int) -> None:
    share = batch_share(num_decoding, depth)
    assert share * depth >= num_decoding > (share - 1) * depth


@given(prompts=st.lists(st.integers(1, 5000), max_size=20), depth=st.integers(1, 8), budget=st.integers(0, 4096))
def test_prompts_are_shared_among_the_batches_in_flight(prompts: list[int], depth: int, budget: int) -> None:
    share = prompt_share(prompts, depth, budget)
    assert min(budget, LEAST_CHUNK) <= share <= budget
    assert share == budget or share * min(depth, max(1, len(prompts))) >= min(sum(prompts), budget * depth)


@given(
    prompts=st.lists(st.integers(2, 500), max_size=20),
    batches=st.integers(1, 20),
    least=st.integers(1, 200),
    budget=st.integers(1, 2000),
)
def test_prompts_beside_decodes_are_spread_over_as_many_batches_as_are_given(
    prompts: list[int], batches: int, least: int, budget: int
) -> None:
    share = spread_share(prompts, batches, least, budget)
    assert min(least, budget) <= share <= budget
    assert share == budget or share * batches >= sum(prompts)
    assert share <= least or (share - 1) * batches < sum(prompts)


def test_a_lone_prompt_is_not_cut_finer_and_two_are_run_by_turns() -> None:
    assert prompt_share([1000], 2, 1024) == 1000
    assert prompt_share([5000], 2, 1024) == 1024
    assert prompt_share([900, 700], 2, 1024) == 800
    assert prompt_share([100, 20], 2, 1024) == LEAST_CHUNK
