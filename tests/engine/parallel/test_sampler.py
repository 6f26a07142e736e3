"""Drawing over a vocabulary in parts draws what is drawn over the whole."""

from collections.abc import Sequence

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from engine.batch import SampleRow, Samples
from engine.parallel.sampler import RanksSampler
from engine.sampler import Drawn, Sampler
from engine.sampling_params import SamplingParams

KINDS = [
    SamplingParams(temperature=0.0),
    SamplingParams(temperature=0.0, logprobs=3),
    SamplingParams(temperature=0.9, top_p=0.8),
    SamplingParams(temperature=1.1, top_k=5, logprobs=0),
    SamplingParams(temperature=1.1, top_k=4),
    SamplingParams(temperature=2.0, top_k=3, top_p=0.7, min_p=0.01),
    SamplingParams(temperature=0.5, top_k=1),
    SamplingParams(temperature=0.0, logit_bias={3: 9.0}),
    SamplingParams(temperature=0.0, allowed_token_ids=[1, 5]),
]


class Lockstep:
    """Ranks one after the other, rank 0 last: what the others bring is kept for it."""

    def __init__(self, size: int) -> None:
        self.rank = 0
        self.values = 0
        """That each rank has brought."""
        self._size = size
        self._brought: list[list[Tensor]] = [[] for _ in range(size)]

    def gather(self, x: Tensor) -> Tensor | None:
        if self.rank:
            self._brought[self.rank].append(x.clone())
            return None
        self.values += x.numel()
        others = [self._brought[rank].pop(0) for rank in range(1, self._size)]
        return torch.stack([x, *others], dim=1)

    def assert_all_taken(self) -> None:
        assert not any(self._brought)


def parts_of(logits: Tensor, size: int, unit: int) -> list[tuple[range, Tensor]]:
    """Ids and padded logits of each rank; the padding, rows of zeros in the head, gives zeros."""
    vocabulary = logits.shape[1]
    each = -(-vocabulary // (size * unit)) * unit
    found = []
    for rank in range(size):
        held = range(min(rank * each, vocabulary), min((rank + 1) * each, vocabulary))
        part = torch.zeros(len(logits), each)
        part[:, : len(held)] = logits[:, held.start : held.stop]
        found.append((held, part))
    return found


def drawn_in_parts(logits: Tensor, samples: Samples, size: int, unit: int, ranks: Lockstep | None = None) -> Drawn:
    ranks = ranks or Lockstep(size)
    answer = Drawn([], [])
    for rank, (held, part) in sorted(enumerate(parts_of(logits, size, unit)), reverse=True):
        ranks.rank = rank
        answer = RanksSampler(Sampler(), ranks, held, logits.shape[1]).sample(part, samples)
    ranks.assert_all_taken()
    return answer


@st.composite
def rows(draw: st.DrawFn) -> tuple[Tensor, Samples]:
    """Logits with equal values, and at times some that nothing can be drawn from."""
    count, vocabulary = draw(st.integers(1, 5)), draw(st.integers(6, 40))
    values = st.sampled_from([-2.0, -0.5, 0.0, 1.0, 3.0, 3.0, float("-inf")])
    logits = torch.tensor(
        draw(st.lists(st.lists(values, min_size=vocabulary, max_size=vocabulary), min_size=count, max_size=count))
    )
    if draw(st.booleans()):
        logits[draw(st.integers(0, count - 1)), draw(st.integers(0, vocabulary - 1))] = draw(
            st.sampled_from([float("nan"), float("inf")])
        )
    kinds: Sequence[SamplingParams] = draw(st.lists(st.sampled_from(KINDS), min_size=count, max_size=count))
    sample_rows = [SampleRow(row, kind, 7 + row, 0, 11) for row, kind in enumerate(kinds)]
    return logits, Samples.of(sample_rows)


@settings(max_examples=200)
@given(rows(), st.integers(2, 4), st.sampled_from([1, 4, 32]))
def test_parts_draw_what_the_whole_draws(drawn: tuple[Tensor, Samples], size: int, unit: int) -> None:
    """Also where ranks have no id at all, rows are -inf throughout or hold NaN, and the largest logit is negative."""
    logits, samples = drawn
    assert drawn_in_parts(logits, samples, size, unit) == Sampler().sample(logits, samples)


def test_of_a_row_with_a_top_k_no_more_than_its_candidates_are_brought() -> None:
    logits = torch.from_numpy(np.random.default_rng(0).normal(size=(3, 4000)).astype(np.float32))
    kinds = [SamplingParams(temperature=0.0), SamplingParams(top_k=20), SamplingParams(top_k=7, top_p=0.9)]
    samples = Samples.of([SampleRow(row, kind, 7 + row, 0, 11) for row, kind in enumerate(kinds)])
    ranks = Lockstep(2)
    assert drawn_in_parts(logits, samples, 2, 32, ranks) == Sampler().sample(logits, samples)
    # The largest of each row, with its id, and twenty and one of two.
    assert ranks.values == 2 * (3 + 2 * 21)


def test_prompt_logprobs_are_those_of_the_whole() -> None:
    logits = torch.from_numpy(np.random.default_rng(0).normal(size=(6, 50)).astype(np.float32))
    targets = [0, 49, 7, 20, 33, 31]
    ranks = Lockstep(3)
    found: tuple = ()
    for rank, (held, part) in sorted(enumerate(parts_of(logits, 3, 8)), reverse=True):
        ranks.rank = rank
        found = RanksSampler(Sampler(), ranks, held, 50).token_logprobs(part, targets, 4)
        assert bool(found) is (rank == 0)
    assert found == Sampler().token_logprobs(logits, targets, 4)
