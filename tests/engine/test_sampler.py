"""Sampling against a slow oracle, against exact distributions, and against everything that may go wrong in one row."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from engine.batch import SampleRow, Samples
from engine.randomness import uniforms
from engine.sampler import Drawn, Sampler
from engine.sampling import reductions
from tests.engine.chi_square import assert_frequencies
from tests.engine.sample_rows import batches, make_row, sample, sample_one
from tests.engine.slow_sampler import distribution, explains

pytestmark = pytest.mark.usefixtures("two_threads")


class TestAgainstOracle:
    @settings(max_examples=250)
    @given(batches())
    def test_every_token_is_the_oracles(self, batch: tuple[Tensor, list[SampleRow]]) -> None:
        logits, rows = batch
        drawn = sample(logits, rows)
        assert drawn.failed == {}
        for values, row, token in zip(logits.numpy(), rows, drawn.token_ids, strict=True):
            uniform = float(uniforms([row.seed], [row.sample_index], [row.position])[0])
            # Borders of min_p and top_p may fall on either side of float32's rounding.
            assert any(explains(distribution(values, row, nudge), token, uniform) for nudge in (0.0, 1e-6, -1e-6))

    @pytest.mark.parametrize("decimals", [None, 1])
    @pytest.mark.parametrize("top_p", [0.05, 0.5, 0.95, 0.9999])
    def test_nuclei_far_wider_than_the_leading_tokens(self, top_p: float, decimals: int | None) -> None:
        values = np.random.default_rng(5).normal(size=(40, 5000)).astype(np.float32)
        if decimals is not None:
            values = values.round(decimals)
        rows = [make_row(seed=i, top_p=top_p, temperature=1.5) for i in range(len(values))]
        tokens = sample(torch.from_numpy(values), rows).token_ids
        for logits, row, token in zip(values, rows, tokens, strict=True):
            uniform = float(uniforms([row.seed], [0], [0])[0])
            assert any(explains(distribution(logits, row, nudge), token, uniform) for nudge in (0.0, 1e-6, -1e-6))

    @pytest.mark.parametrize("top_p", [0.02, 0.5, 0.99])
    def test_wide_nucleus_of_equal_tokens_takes_the_lowest(self, top_p: float) -> None:
        rows = [make_row(seed=seed, top_p=top_p) for seed in range(400)]
        tokens = sample(torch.zeros(400, 5000), rows).token_ids
        size = round(5000 * top_p)
        assert size * 0.95 < max(tokens) < size
        assert min(tokens) < size * 0.05

    def test_rows_of_different_top_k_keep_to_their_own(self) -> None:
        rows = [make_row(seed=seed, top_k=1 + seed % 3) for seed in range(300)]
        tokens = sample(torch.zeros(300, 500), rows).token_ids
        assert [set(tokens[remainder::3]) for remainder in range(3)] == [{0}, {0, 1}, {0, 1, 2}]

    def test_logits_are_left_alone(self) -> None:
        logits = torch.randn(4, 100)
        before = logits.clone()
        rows = [
            make_row(logit_bias={1: 5.0}, banned=[2]),
            make_row(temperature=0),
            make_row(top_p=0.5, repetition_penalty=2.0, output=[1, 2]),
            make_row(allowed_token_ids=(3, 4), min_p=0.1, logprobs=3),
        ]
        sample(logits, rows)
        assert torch.equal(logits, before)


class TestBatchIndependence:
    @settings(max_examples=100)
    @given(batches(), st.randoms(use_true_random=False))
    def test_rows_draw_the_same_alone_and_in_any_order(
        self, batch: tuple[Tensor, list[SampleRow]], random: Any
    ) -> None:
        logits, rows = batch
        rows = [row._replace(params=row.params.model_copy(update={"logprobs": i % 4})) for i, row in enumerate(rows)]
        together = sample(logits, rows)
        order = random.sample(range(len(rows)), len(rows))
        permuted = sample(logits[order], [rows[i] for i in order])
        for place, i in enumerate(order):
            alone = sample(logits[i : i + 1], [rows[i]])
            assert alone.token_ids[0] == together.token_ids[i] == permuted.token_ids[place]
            assert alone.logprobs[0] == together.logprobs[i] == permuted.logprobs[place]

    def test_large_vocabulary_alone_and_with_every_other_feature_beside_it(self) -> None:
        logits = torch.randn(5, 50_257, generator=torch.Generator().manual_seed(3)) * 2
        rows = [
            make_row(temperature=1.0, seed=1, logprobs=2),
            make_row(top_p=0.97, seed=2),
            make_row(top_k=500, seed=3),
            make_row(min_p=0.01, seed=4, banned=[7]),
            make_row(temperature=0, repetition_penalty=1.2, output=[5, 5, 6]),
        ]
        together = sample(logits, rows)
        for i, row in enumerate(rows):
            alone = sample(logits[i : i + 1], [row])
            assert (alone.token_ids[0], alone.logprobs[0]) == (together.token_ids[i], together.logprobs[i])


@pytest.mark.parametrize("first_above", [reductions.first_above, reductions.first_above_in_blocks])
class TestInverseCdf:
    def test_borders_belong_to_the_next_token_of_positive_weight(self, first_above: Callable[..., Tensor]) -> None:
        weights = torch.zeros(3, 2 * reductions.BLOCK)
        weights[:, [3, 70, 100]] = torch.tensor([1.0, 1.0, 2.0])
        share = torch.tensor([[0.0], [0.25], [0.5]], dtype=torch.float64)
        assert first_above(weights, share).flatten().tolist() == [3, 70, 100]

    def test_the_largest_share_below_one_stays_on_the_last_possible_token(
        self, first_above: Callable[..., Tensor]
    ) -> None:
        weights = torch.rand(200, 5 * reductions.BLOCK, generator=torch.Generator().manual_seed(0))
        weights[:, -9:] = 0.0
        share = torch.full((200, 1), 1 - 2.0**-53, dtype=torch.float64)
        assert set(first_above(weights, share).flatten().tolist()) == {5 * reductions.BLOCK - 10}


DRAWS = 20_000


@pytest.mark.parametrize(
    "params",
    [
        {},
        {"temperature": 0.5},
        {"temperature": 3.0},
        {"top_k": 10},
        {"top_p": 0.8},
        {"min_p": 0.15},
        {"top_k": 30, "top_p": 0.9},
        {"top_k": 80, "temperature": 2.0},
        {"min_p": 0.05, "top_k": 20, "top_p": 0.95, "temperature": 1.4},
        {"top_p": 0.97, "temperature": 4.0},
        {"logit_bias": {3: 2.0, 4: -100.0}, "allowed_token_ids": (1, 3, 4, 5, 99)},
    ],
    ids=str,
)
def test_frequencies_follow_the_exact_distribution(params: dict[str, Any]) -> None:
    vocabulary = 150
    logits = np.random.default_rng(11).normal(size=vocabulary).astype(np.float32) * 2
    rows = [make_row(seed=99, position=position, **params) for position in range(DRAWS)]
    drawn = sample(torch.from_numpy(logits).expand(DRAWS, -1), rows)
    counts = np.bincount(drawn.token_ids, minlength=vocabulary)
    assert_frequencies(counts, distribution(logits, rows[0]))


class TestRandomness:
    def test_same_seed_and_position_same_token_other_seed_others(self) -> None:
        logits = torch.zeros(1, 1000)
        tokens = [
            [sample(logits, [make_row(seed=seed, position=p)]).token_ids[0] for p in range(20)] for seed in (1, 1, 2)
        ]
        assert tokens[0] == tokens[1]
        assert tokens[0] != tokens[2]

    def test_samples_of_one_request_differ(self) -> None:
        rows = [make_row(seed=4)._replace(sample_index=i) for i in range(8)]
        tokens = sample(torch.zeros(8, 10_000), rows).token_ids
        assert len(set(tokens)) == 8


class TestGreedy:
    def test_ties_go_to_the_lowest_token(self) -> None:
        for vocabulary in (2, 64, 65, 500, 50_257):
            logits = torch.zeros(3, vocabulary)
            logits[1, vocabulary // 2 :] = 1.0
            logits[2, -1] = 1.0
            rows = [make_row(temperature=0) for _ in range(3)]
            assert sample(logits, rows).token_ids == [0, vocabulary // 2, vocabulary - 1]

    @pytest.mark.parametrize(
        "params", [{"top_k": 1}, {"top_p": 1e-9}, {"min_p": 1.0, "top_k": 1}, {"temperature": 1e-30}]
    )
    def test_the_narrowest_filters_are_greedy(self, params: dict[str, Any]) -> None:
        logits = torch.randn(500)
        assert all(sample_one(logits, seed=seed, **params) == int(logits.argmax()) for seed in range(20))

    def test_penalties_and_bias_move_the_choice(self) -> None:
        assert sample_one([1.0, 2.0, 3.0], temperature=0, output=[2], presence_penalty=1.5) == 1
        assert sample_one([1.0, 2.0, 3.0], temperature=0, output=[2, 2], frequency_penalty=0.6) == 1
        assert sample_one([1.0, 2.0, 3.0], temperature=0, output=[2], frequency_penalty=0.6) == 2
        assert sample_one([1.0, 2.0, 3.0], temperature=0, prompt=[2], repetition_penalty=2.0) == 1
        assert sample_one([-1.0, -2.0, -3.0], temperature=0, prompt=[0], repetition_penalty=2.5) == 1
        assert sample_one([1.0, 2.0, 3.0], temperature=0, prompt=[2], presence_penalty=2.0) == 2
        assert sample_one([1.0, 2.0, 3.0], temperature=0, logit_bias={0: 100.0}) == 0


class TestExcludedTokens:
    def test_banned_and_disallowed_tokens_are_never_drawn(self) -> None:
        rows = [make_row(seed=seed, banned=[0, 2], allowed_token_ids=(0, 1, 2, 5)) for seed in range(300)]
        assert set(sample(torch.zeros(300, 9), rows).token_ids) == {1, 5}

    def test_bias_does_not_bring_an_excluded_token_back(self) -> None:
        assert sample_one([0.0, 0.0, 9.0], banned=[2], logit_bias={2: 100.0}, allowed_token_ids=(1, 2)) == 1

    def test_tokens_outside_the_vocabulary_change_nothing(self) -> None:
        row = {"banned": [7], "logit_bias": {9: 5.0}, "allowed_token_ids": (1, 12)}
        assert sample_one([0.0, 0.0, 9.0], **row) == 1


class SortingReductions:
    """Another implementation of the reductions, by sorting whole rows; counts what is asked of it."""

    def __init__(self) -> None:
        self.calls: set[str] = set()

    def largest(self, x: Tensor) -> tuple[list[float], list[int]]:
        self.calls.add("largest")
        values, ids = x.sort(dim=-1, descending=True, stable=True)
        return values[:, 0].tolist(), ids[:, 0].tolist()

    def k_largest(self, x: Tensor, k: int) -> tuple[Tensor, Tensor]:
        self.calls.add("k_largest")
        values, ids = x.sort(dim=-1, descending=True, stable=True)
        return values[:, :k], ids[:, :k]

    def log_sum_exp(self, x: Tensor) -> Tensor:
        self.calls.add("log_sum_exp")
        return x.double().logsumexp(-1)


class TestReductions:
    @settings(max_examples=100)
    @given(batches())
    def test_any_implementation_draws_the_same(self, batch: tuple[Tensor, list[SampleRow]]) -> None:
        logits, rows = batch
        samples = Samples.of([row._replace(params=row.params.model_copy(update={"logprobs": 3})) for row in rows])
        ours, theirs = Sampler().sample(logits, samples), Sampler(SortingReductions()).sample(logits, samples)
        assert theirs.token_ids == ours.token_ids
        for mine, other in zip(ours.logprobs, theirs.logprobs, strict=True):
            assert mine is not None and other is not None
            assert (other.token_id, other.rank) == (mine.token_id, mine.rank)
            assert other.logprob == pytest.approx(mine.logprob, abs=1e-6)
            assert [token for token, _ in other.top] == [token for token, _ in mine.top]

    def test_they_are_used_throughout(self) -> None:
        reductions = SortingReductions()
        rows = [make_row(top_k=3), make_row(top_p=0.5), make_row(logprobs=1, presence_penalty=1.0, output=[3])]
        Sampler(reductions).sample(torch.randn(3, 300), Samples.of(rows))
        assert reductions.calls == {"largest", "k_largest", "log_sum_exp"}


class TestExtremes:
    @pytest.mark.parametrize("params", [{}, {"top_k": 3}, {"top_p": 0.9}, {"min_p": 0.1}, {"temperature": 0}])
    def test_huge_and_masked_logits(self, params: dict[str, Any]) -> None:
        logits = [-math.inf, 1e4, -1e4, -math.inf, -3e38]
        assert {sample_one(logits, seed=seed, **params) for seed in range(50)} == {1}
        assert {sample_one([-3e38, 3e38], seed=seed, **params) for seed in range(50)} == {1}

    @pytest.mark.parametrize("params", [{}, {"top_k": 9}, {"top_p": 0.5}, {"min_p": 1.0}, {"temperature": 0}])
    def test_vocabulary_of_one(self, params: dict[str, Any]) -> None:
        assert sample_one([-5.0], logprobs=3, **params) == 0

    @pytest.mark.parametrize("temperature", [1e-300, 1e300])
    def test_temperatures_beyond_float32(self, temperature: float) -> None:
        assert sample_one([1.0, -math.inf, 0.0], temperature=temperature) in (0, 2)

    @pytest.mark.parametrize("penalty", [1e-300, 1e300])
    def test_penalties_beyond_float32_harm_no_other_row(self, penalty: float) -> None:
        rows = [make_row(repetition_penalty=penalty, prompt=[0, 1]), make_row(temperature=0)]
        drawn = sample(torch.tensor([[5.0, -1.0, 0.0], [0.0, 1.0, 0.0]]), rows)
        assert drawn.token_ids[1] == 1
        assert 1 not in drawn.failed

    def test_top_k_beyond_any_integer_keeps_every_token(self) -> None:
        assert {sample_one([0.0] * 5, seed=seed, top_k=2**80) for seed in range(100)} == set(range(5))

    def test_no_rows(self) -> None:
        assert sample(torch.empty(0, 10), []) == Drawn([], [])


class TestFailures:
    @pytest.mark.parametrize("params", [{"temperature": 0}, {}, {"top_p": 0.9, "banned": [1]}], ids=str)
    @pytest.mark.parametrize(
        ("poison", "reason"), [(math.nan, "contain NaN"), (math.inf, "contain +inf"), (-math.inf, "all -inf")]
    )
    def test_bad_row_fails_alone(self, poison: float, reason: str, params: dict[str, Any]) -> None:
        logits = torch.randn(3, 300)
        healthy = sample(logits, [make_row(seed=i, logprobs=1, **params) for i in range(3)])
        if poison == -math.inf:
            logits[1] = poison
        else:
            logits[1, 170] = poison
        drawn = sample(logits, [make_row(seed=i, logprobs=1, **params) for i in range(3)])
        assert list(drawn.failed) == [1]
        assert reason in drawn.failed[1]
        assert drawn.token_ids == [healthy.token_ids[0], 0, healthy.token_ids[2]]
        assert drawn.logprobs == [healthy.logprobs[0], None, healthy.logprobs[2]]

    @pytest.mark.parametrize("temperature", [0.0, 1.0])
    def test_row_without_any_token_left_fails_alone(self, temperature: float) -> None:
        rows = [
            make_row(temperature=temperature, banned=[0, 1, 2]),
            make_row(temperature=0),
            make_row(temperature=temperature, allowed_token_ids=(17,)),
        ]
        drawn = sample(torch.tensor([[1.0, 2.0, 3.0]] * 3), rows)
        assert drawn.token_ids == [0, 2, 0]
        assert sorted(drawn.failed) == [0, 2]
        assert all("no token is left" in reason for reason in drawn.failed.values())
