"""What the busiest of the groups that experts are dealt out to has to do, if a router favours no expert. Pure.

All ranks of a layer wait for that one at the sum that follows, so that what counts is the expectation of the maximum,
which is more than the maximum of expectations. A router that does favour some makes it more yet.
"""

import math
from functools import cache

_ALL = 1e-3
"""Experts that are still to be hit, expected, from which on all are taken to be."""
_STEPS, _FURTHEST = 400, 8.0
"""Of the integral below, and standard deviations that it covers."""


def busiest_hit(experts: int, per_token: int, groups: int, tokens: int) -> float:
    """Experts that any of so many tokens goes to, expected, in the group that has most of them.

    Exact: each token draws `per_token` of all experts without replacement. The weights that it reads are theirs.
    """
    if tokens < 1:
        return 0.0
    by_tokens = _busiest_hits(experts, per_token, groups)
    return by_tokens[min(tokens, len(by_tokens)) - 1]


def busiest_load(experts: int, per_token: int, groups: int, tokens: int) -> float:
    """Tokens that pass an expert, each as often as it passes one, expected, in the group that has most to compute.

    The largest of normal variables with the mean, variance and correlation of the groups' loads: of one token's choice
    within a tenth, and closer the more tokens there are.
    """
    mean = tokens * per_token / groups
    if groups == 1 or tokens < 1:
        return mean
    left_out = (experts - per_token) / (experts - 1)
    variance = mean * (1 - 1 / groups) * left_out
    # What one group has more, the others have less: a correlation of -1 / (groups - 1).
    most = mean + math.sqrt(variance * groups / (groups - 1)) * _largest_normal(groups)
    return min(most, tokens * min(per_token, experts // groups))


@cache
def _busiest_hits(experts: int, per_token: int, groups: int) -> tuple[float, ...]:
    """`busiest_hit` of one token, of two and so on, until all experts are hit."""
    most, steps = _most_in_a_group(experts, groups), _new_hits(experts, per_token)
    chances = [1.0] + [0.0] * experts
    found: list[float] = []
    while True:
        after = [0.0] * (experts + 1)
        for hit, chance in enumerate(chances):
            if chance:
                for new, share in steps[hit]:
                    after[hit + new] += chance * share
        chances = after
        if sum((experts - hit) * chance for hit, chance in enumerate(chances)) < _ALL:
            return (*found, float(most[experts]))
        found.append(sum(chance * each for chance, each in zip(chances, most, strict=True)))


def _new_hits(experts: int, per_token: int) -> list[list[tuple[int, float]]]:
    """By experts that are hit already: how many another token adds, with the chance of each number."""
    every = math.comb(experts, per_token)
    return [
        [
            (new, math.comb(experts - hit, new) * math.comb(hit, per_token - new) / every)
            for new in range(per_token + 1)
            if new <= experts - hit and per_token - new <= hit
        ]
        for hit in range(experts + 1)
    ]


def _most_in_a_group(experts: int, groups: int) -> list[float]:
    """By experts that are hit: how many are in the group with most of them, expected. All sets of a size are alike."""
    size = experts // groups
    most = [0.0] * (experts + 1)
    for bound in range(size):
        ways = [1]
        for _ in range(groups):
            ways = _product(ways, [math.comb(size, count) for count in range(bound + 1)])
        for hit in range(experts + 1):
            within = ways[hit] if hit < len(ways) else 0
            most[hit] += 1 - within / math.comb(experts, hit)
    return most


def _product(a: list[int], b: list[int]) -> list[int]:
    """Of two polynomials."""
    found = [0] * (len(a) + len(b) - 1)
    for i, x in enumerate(a):
        for j, y in enumerate(b):
            found[i + j] += x * y
    return found


@cache
def _largest_normal(count: int) -> float:
    """Of so many independent standard normal variables the largest, expected."""
    width = _FURTHEST / _STEPS
    values = (width * (step + 0.5) for step in range(_STEPS))
    below = ((1 + math.erf(x / math.sqrt(2))) / 2 for x in values)
    return sum(1 - p**count - (1 - p) ** count for p in below) * width
