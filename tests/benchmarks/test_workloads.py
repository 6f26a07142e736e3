"""The workloads: their ranges, their seeds, and the arithmetic of request-level waste."""

import random
import statistics
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.workloads import EVEN, ORCA, Range, expected_maximum, make, poisson, request_level_penalty


def test_orcas_lengths() -> None:
    items = make(4000, ORCA, vocab_size=1000)
    prompts, outputs = [len(item.prompt) for item in items], [item.output_tokens for item in items]
    assert (min(prompts), max(prompts), min(outputs), max(outputs)) == (32, 512, 1, 128)
    assert statistics.fmean(prompts) == pytest.approx(272, rel=0.03)
    assert statistics.fmean(outputs) == pytest.approx(64.5, rel=0.03)


def test_as_many_tokens_in_as_out() -> None:
    items = make(4000, EVEN, vocab_size=1000)
    for lengths in ([len(item.prompt) for item in items], [item.output_tokens for item in items]):
        assert (min(lengths), max(lengths)) == (16, 256)
        assert statistics.fmean(lengths) == pytest.approx(136, rel=0.03)


def test_a_seed_fixes_everything_and_no_token_is_special() -> None:
    assert make(5, ORCA, vocab_size=50, seed=3) == make(5, ORCA, vocab_size=50, seed=3)
    assert make(5, ORCA, vocab_size=50, seed=3) != make(5, ORCA, vocab_size=50, seed=4)
    tokens = {token for item in make(50, ORCA, vocab_size=50) for token in item.prompt}
    assert tokens == set(range(3, 50))


def test_poisson_arrivals_have_the_rate_and_change_nothing_else() -> None:
    items = make(3000, EVEN, vocab_size=100)
    arriving = poisson(items, rate=4.0, seed=2)
    assert [(item.prompt, item.output_tokens) for item in arriving] == [(i.prompt, i.output_tokens) for i in items]
    gaps = [b.arrival - a.arrival for a, b in pairwise(arriving)]
    assert min(gaps) > 0
    assert statistics.fmean(gaps) == pytest.approx(0.25, rel=0.06)
    assert statistics.pstdev(gaps) == pytest.approx(0.25, rel=0.08)
    with pytest.raises(ValueError, match="above 0"):
        poisson(items, rate=0)


@given(low=st.integers(1, 20), size=st.integers(1, 60), batch=st.integers(1, 40))
def test_the_expected_maximum_is_that_of_the_definition(low: int, size: int, batch: int) -> None:
    # P(max = k) = P(all <= k) - P(all <= k - 1)
    definition = sum((low + k) * (((k + 1) / size) ** batch - (k / size) ** batch) for k in range(size))
    assert expected_maximum(Range(low, low + size - 1), batch) == pytest.approx(definition)


def test_the_penalty_meets_the_closed_form_and_a_simulation() -> None:
    rng = random.Random(0)
    for batch in (1, 2, 4, 8, 16, 32):
        penalty = request_level_penalty(ORCA.output, batch)
        assert penalty == pytest.approx((batch / (batch + 1) * 128 + 0.5) / 64.5, rel=2e-4)
        draws = [max(rng.randint(1, 128) for _ in range(batch)) for _ in range(4000)]
        assert penalty == pytest.approx(statistics.fmean(draws) / 64.5, rel=0.03)
