"""The busiest group of experts, against every choice that tokens could make."""

import random
from collections import Counter
from collections.abc import Callable
from itertools import combinations, product

import pytest

from cluster.planner.experts import busiest_hit, busiest_load

SMALL = [(4, 2, 2, 1), (4, 2, 4, 2), (6, 2, 2, 3), (6, 2, 3, 2), (6, 3, 3, 2), (4, 1, 2, 4), (8, 2, 2, 1), (8, 2, 4, 2)]


def expected(experts: int, per_token: int, groups: int, tokens: int, of: Callable[[list[int]], Counter[int]]) -> float:
    """The largest count of a group, on average over everything that the tokens can choose."""
    choices = list(combinations(range(experts), per_token))
    every = [of([e for chosen in drawn for e in chosen]) for drawn in product(choices, repeat=tokens)]
    return sum(max(counts.values()) for counts in every) / len(every)


def by_group(experts: int, groups: int) -> Callable[[list[int]], Counter[int]]:
    return lambda drawn: Counter(expert // (experts // groups) for expert in drawn)


@pytest.mark.parametrize(("experts", "per_token", "groups", "tokens"), SMALL)
def test_experts_that_are_hit_are_those_of_every_choice(experts: int, per_token: int, groups: int, tokens: int) -> None:
    count = by_group(experts, groups)
    hit = expected(experts, per_token, groups, tokens, lambda drawn: count(list(set(drawn))))
    assert busiest_hit(experts, per_token, groups, tokens) == pytest.approx(hit, abs=2e-3)


@pytest.mark.parametrize(("experts", "per_token", "groups", "tokens"), SMALL)
def test_loads_are_about_those_of_every_choice(experts: int, per_token: int, groups: int, tokens: int) -> None:
    load = expected(experts, per_token, groups, tokens, by_group(experts, groups))
    assert busiest_load(experts, per_token, groups, tokens) == pytest.approx(load, rel=0.12)


@pytest.mark.parametrize("groups", [2, 4, 8])
def test_loads_of_many_tokens_are_those_that_are_drawn(groups: int) -> None:
    draw, count = random.Random(0), by_group(8, groups)
    trials = [max(count([e for _ in range(64) for e in draw.sample(range(8), 2)]).values()) for _ in range(400)]
    assert busiest_load(8, 2, groups, 64) == pytest.approx(sum(trials) / len(trials), rel=0.02)


def test_one_token_of_a_mixture_keeps_two_of_eight_experts_busy() -> None:
    assert busiest_hit(8, 2, 1, 1) == pytest.approx(2)
    assert busiest_hit(8, 2, 2, 1) == pytest.approx(10 / 7)
    assert busiest_hit(8, 2, 4, 1) == pytest.approx(8 / 7)
    assert busiest_hit(8, 2, 8, 1) == pytest.approx(1)


def test_many_tokens_hit_every_expert_and_no_tokens_none() -> None:
    assert busiest_hit(128, 8, 4, 1000) == 32
    assert busiest_hit(8, 2, 4, 0) == busiest_load(8, 2, 4, 0) == 0
    assert busiest_load(8, 2, 1, 100) == 200
