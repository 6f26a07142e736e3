"""Rows to sample from, drawn one by one or at random with every feature."""

from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor

from engine.batch import SampleRow, Samples
from engine.sampler import Drawn, Sampler
from engine.sampling_params import SamplingParams


def make_row(
    *, seed: int = 0, position: int = 0, prompt: Any = (), output: Any = (), banned: Any = (), **params: Any
) -> SampleRow:
    return SampleRow(
        row=0,
        params=SamplingParams(**params),
        seed=seed,
        sample_index=0,
        position=position,
        banned=tuple(banned),
        prompt=tuple(prompt),
        output=tuple(output),
    )


def sample(logits: Tensor, rows: list[SampleRow]) -> Drawn:
    return Sampler().sample(logits, Samples.of(rows))


def sample_one(logits: list[float] | Tensor, **row: Any) -> int:
    drawn = sample(torch.as_tensor(logits, dtype=torch.float32)[None], [make_row(**row)])
    assert drawn.failed == {}
    return drawn.token_ids[0]


@st.composite
def logits_rows(draw: st.DrawFn, vocabulary: int) -> np.ndarray:
    """Random logits with what models produce: wide and narrow scales, ties as of bfloat16, masked tokens."""
    random = np.random.default_rng(draw(st.integers(0, 2**32)))
    values = random.normal(size=vocabulary) * draw(st.sampled_from([0.01, 1.0, 4.0, 100.0]))
    if draw(st.booleans()):
        values = np.round(values * 2) / 2
    if draw(st.booleans()):
        values[random.permutation(vocabulary)[: draw(st.integers(0, vocabulary - 1))]] = -np.inf
    return values.astype(np.float32)


@st.composite
def sample_rows(draw: st.DrawFn, vocabulary: int) -> SampleRow:
    """Every feature, each off half of the time. At least the last token is neither banned nor excluded."""

    def maybe(strategy: st.SearchStrategy[Any], off: Any) -> Any:
        return draw(strategy) if draw(st.booleans()) else off

    token = st.integers(0, vocabulary - 1)
    tokens = st.lists(token, max_size=12)
    return make_row(
        seed=draw(st.integers(0, 2**64 - 1)),
        position=draw(st.integers(0, 2**20)),
        prompt=maybe(tokens, ()),
        output=maybe(tokens, ()),
        banned=maybe(st.lists(st.integers(0, max(0, vocabulary - 2)), max_size=5 * (vocabulary > 1)), ()),
        temperature=maybe(st.sampled_from([0.0, 0.01, 0.7, 2.0]), 1.0),
        top_k=maybe(st.sampled_from([1, 2, 5, 64, 65, 1000]), 0),
        top_p=maybe(st.sampled_from([1e-9, 0.3, 0.9, 0.999]), 1.0),
        min_p=maybe(st.sampled_from([0.001, 0.2, 1.0]), 0.0),
        repetition_penalty=maybe(st.sampled_from([0.8, 1.3]), 1.0),
        presence_penalty=maybe(st.sampled_from([-1.0, 1.5]), 0.0),
        frequency_penalty=maybe(st.sampled_from([-0.5, 0.75]), 0.0),
        logit_bias=maybe(st.dictionaries(token, st.sampled_from([-100.0, -1.5, 2.25]), max_size=4), None),
        allowed_token_ids=maybe(tokens.map(lambda ids: (*ids, vocabulary - 1)), None),
    )


@st.composite
def batches(draw: st.DrawFn) -> tuple[Tensor, list[SampleRow]]:
    vocabulary = draw(st.sampled_from([1, 2, 7, 63, 64, 65, 128, 200, 777]))
    size = draw(st.integers(1, 6))
    logits = np.stack([draw(logits_rows(vocabulary)) for _ in range(size)])
    # The token that nothing excludes stays possible.
    logits[:, -1] = np.where(np.isinf(logits[:, -1]), 0.0, logits[:, -1])
    return torch.from_numpy(logits), [draw(sample_rows(vocabulary)) for _ in range(size)]
