"""What tensor ranks hold of a model: everything, once or alike, and enough to compute the whole by sums over ranks."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from engine.models.spec import ExpertsSpec, LearnedPositions, ModelSpec, RopeSpec
from engine.parallel.slices import (
    VOCABULARY_UNIT,
    Slice,
    TensorRank,
    experts_of,
    key_heads,
    obstacle,
    query_heads,
    slice_of,
)

Array = NDArray[np.float64]

MODEL = ModelSpec(
    vocab_size=100,
    hidden=12,
    layers=2,
    heads=8,
    kv_heads=2,
    head_dim=4,
    intermediate=24,
    max_position=64,
    norm="rms",
    norm_eps=1e-5,
    positions=RopeSpec(theta=10000.0, rotary_dim=4),
    activation="silu",
    gated_mlp=True,
)
SPARSE = replace(MODEL, experts=ExpertsSpec(4, 2, 12, True, shared_intermediate=16, shared_gate=True))


@st.composite
def specs(draw: st.DrawFn) -> ModelSpec:
    kv_heads = draw(st.integers(1, 6))
    biased = draw(st.booleans())
    experts = ExpertsSpec(
        count=draw(st.integers(1, 8)),
        per_token=1,
        intermediate=draw(st.integers(8, 24)),
        renormalised=True,
        shared_intermediate=draw(st.sampled_from([0, 8, 20])),
        shared_gate=draw(st.booleans()),
    )
    return replace(
        MODEL,
        vocab_size=draw(st.integers(1, 300)),
        layers=1,
        heads=kv_heads * draw(st.integers(1, 6)),
        kv_heads=kv_heads,
        head_dim=draw(st.sampled_from([2, 4])),
        intermediate=draw(st.integers(8, 40)),
        norm=draw(st.sampled_from(["rms", "layer"])),
        positions=draw(st.sampled_from([MODEL.positions, LearnedPositions(rows=30)])),
        gated_mlp=draw(st.booleans()),
        qkv_bias=biased,
        out_bias=biased,
        mlp_bias=biased,
        qk_norm=draw(st.booleans()),
        embedding_dim=draw(st.sampled_from([None, 6])),
        tied_embeddings=draw(st.booleans()),
        experts=draw(st.sampled_from([None, experts])),
    )


@st.composite
def cuts(draw: st.DrawFn) -> tuple[ModelSpec, list[TensorRank]]:
    """A model and all ranks of degrees that it allows."""
    spec = draw(specs())
    most = 1 if spec.experts is None else spec.experts.count
    allowed = [
        (size, expert)
        for size in range(1, spec.heads + 1)
        for expert in range(1, most + 1)
        if obstacle(spec, size, expert) is None
    ]
    size, expert = draw(st.sampled_from(allowed))
    return spec, [TensorRank(rank, size, expert) for rank in range(size)]


def indices(part: Slice, shape: tuple[int, ...]) -> tuple[NDArray[np.int64], ...]:
    """The rows, and the columns of a matrix, as numbers of the whole parameter."""
    axes = [part.rows] if part.columns is None else [part.rows, part.columns]
    found = [np.array([i for run in runs for i in range(run.start, run.end)], dtype=np.int64) for runs in axes]
    assert len(found) == len(shape)
    return tuple(found)


def cut(name: str, whole: Array, spec: ModelSpec, rank: TensorRank) -> Array:
    """The rank's part of a parameter's values."""
    part = slice_of(name, whole.shape, spec, rank)
    values = whole[np.ix_(*indices(part, whole.shape))]
    return np.concatenate([values, np.zeros((part.padding, *whole.shape[1:]))]) if part.padding else values


@given(cuts())
def test_every_value_is_held_once_or_by_all_who_need_it(case: tuple[ModelSpec, list[TensorRank]]) -> None:
    spec, ranks = case
    size = len(ranks)
    keys_held = max(1, size // spec.kv_heads)
    for name, shape in spec.parameter_shapes().items():
        held = np.zeros(shape, dtype=np.int64)
        for rank in ranks:
            where = indices(slice_of(name, shape, spec, rank), shape)
            assert all(len(set(axis.tolist())) == len(axis) for axis in where), "a rank holds nothing twice"
            held[np.ix_(*where)] += 1
        module = name.rpartition(".")[0].rpartition(".")[2]
        queries = spec.heads * spec.head_dim
        if module == "qkv":
            assert (held[:queries] == 1).all() and (held[queries:] == keys_held).all(), name
        elif module in ("embed", "head", "mlp_in", "experts_in", "experts_out", "shared_in") or (
            module in ("out", "mlp_out", "shared_out") and name.endswith("weight")
        ):
            assert (held == 1).all(), name
        else:
            assert (held == size).all(), name


@given(cuts())
def test_shapes_are_those_of_what_is_held(case: tuple[ModelSpec, list[TensorRank]]) -> None:
    spec, ranks = case
    for name, shape in spec.parameter_shapes().items():
        parts = [slice_of(name, shape, spec, rank) for rank in ranks]
        for part in parts:
            rows, *columns = (len(axis) for axis in indices(part, shape))
            assert part.shape == (rows + part.padding, *columns)
        if len(ranks) == 1:
            assert parts[0].shape == shape and not parts[0].padding
        if name in ("embed.weight", "head.weight"):
            assert len({part.shape for part in parts}) == 1, "logits are gathered in equal parts"
            assert len(ranks) == 1 or parts[0].shape[0] % VOCABULARY_UNIT == 0


@given(specs(), st.integers(1, 6), st.sampled_from([1, 2, 4, 8]))
def test_inner_channels_are_dealt_out_in_blocks(spec: ModelSpec, size: int, unit: int) -> None:
    spec = replace(spec, experts=None, heads=size, kv_heads=size, head_dim=8, intermediate=unit * spec.intermediate)
    counts = []
    for rank in range(size):
        part = slice_of("layers.0.mlp_out.weight", (12, spec.intermediate), spec, TensorRank(rank, size), unit)
        assert part.columns is not None
        (run,) = part.columns
        assert run.start % unit == 0 and run.count % unit == 0
        counts.append(run.count)
    assert sum(counts) == spec.intermediate
    assert max(counts) - min(counts) <= unit


def attend(q: Array, k: Array, v: Array) -> Array:
    """Grouped-query attention of [T, heads, dim] over [T, kv_heads, dim], without a mask."""
    k, v = (np.repeat(x, q.shape[1] // k.shape[1], axis=1) for x in (k, v))
    scores = np.einsum("qhd,khd->hqk", q, k)
    weights = np.exp(scores - scores.max(axis=2, keepdims=True))
    return np.einsum("hqk,khd->qhd", weights / weights.sum(axis=2, keepdims=True), v)


def attention(qkv: Array, out: Array, x: Array, heads: int, kv_heads: int, head_dim: int) -> Array:
    made = (x @ qkv.T).reshape(len(x), heads + 2 * kv_heads, head_dim)
    q, k, v = np.split(made, [heads, heads + kv_heads], axis=1)
    return attend(q, k, v).reshape(len(x), -1) @ out.T


def gated(rows: Array, columns: Array, x: Array) -> Array:
    gate, up = np.split(x @ rows.T, 2, axis=1)
    return (gate / (1 + np.exp(-gate)) * up) @ columns.T


@pytest.fixture
def random() -> np.random.Generator:
    return np.random.default_rng(7)


@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_attention_is_the_sum_of_what_ranks_compute(size: int, random: np.random.Generator) -> None:
    shapes = MODEL.parameter_shapes()
    qkv, out = (random.normal(size=shapes[f"layers.0.{name}.weight"]) for name in ("qkv", "out"))
    x = random.normal(size=(5, MODEL.hidden))
    ranks = [TensorRank(rank, size) for rank in range(size)]
    partial = [
        attention(
            cut("layers.0.qkv.weight", qkv, MODEL, rank),
            cut("layers.0.out.weight", out, MODEL, rank),
            x,
            query_heads(MODEL, rank).count,
            key_heads(MODEL, rank).count,
            MODEL.head_dim,
        )
        for rank in ranks
    ]
    whole = attention(qkv, out, x, MODEL.heads, MODEL.kv_heads, MODEL.head_dim)
    np.testing.assert_allclose(sum(partial), whole, rtol=1e-9)


@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_the_mlp_is_the_sum_of_what_ranks_compute(size: int, random: np.random.Generator) -> None:
    shapes = MODEL.parameter_shapes()
    rows, columns = (random.normal(size=shapes[f"layers.0.{name}.weight"]) for name in ("mlp_in", "mlp_out"))
    x = random.normal(size=(5, MODEL.hidden))
    partial = [
        gated(
            cut("layers.0.mlp_in.weight", rows, MODEL, TensorRank(rank, size)),
            cut("layers.0.mlp_out.weight", columns, MODEL, TensorRank(rank, size)),
            x,
        )
        for rank in range(size)
    ]
    np.testing.assert_allclose(sum(partial), gated(rows, columns, x), rtol=1e-9)


def mixture(rows: Array, columns: Array, weights: Array, x: Array) -> Array:
    """Experts one below the other, each token's result weighed by [T, experts]."""
    count = weights.shape[1]
    results = [
        gated(inside, outside, x)
        for inside, outside in zip(np.split(rows, count), np.split(columns, count), strict=True)
    ]
    return sum(weights[:, index, None] * result for index, result in enumerate(results))


@pytest.mark.parametrize(("size", "expert"), [(1, 1), (2, 1), (2, 2), (4, 1), (4, 2), (4, 4), (8, 4)])
def test_experts_are_the_sum_of_what_ranks_compute(size: int, expert: int, random: np.random.Generator) -> None:
    shapes = SPARSE.parameter_shapes()
    rows, columns = (random.normal(size=shapes[f"layers.0.{name}.weight"]) for name in ("experts_in", "experts_out"))
    x, weights = random.normal(size=(5, SPARSE.hidden)), random.random(size=(5, 4))
    partial = []
    for index in range(size):
        rank = TensorRank(index, size, expert)
        held = experts_of(SPARSE, rank)
        inside = cut("layers.0.experts_in.weight", rows, SPARSE, rank)
        outside = cut("layers.0.experts_out.weight", columns, SPARSE, rank)
        partial.append(mixture(inside, outside, weights[:, held.start : held.end], x))
    np.testing.assert_allclose(sum(partial), mixture(rows, columns, weights, x), rtol=1e-9)


@pytest.mark.parametrize("size", [1, 2, 8])
def test_the_vocabulary_is_looked_up_by_a_sum_and_scored_by_concatenation(
    size: int, random: np.random.Generator
) -> None:
    table = random.normal(size=(MODEL.vocab_size, MODEL.hidden))
    ids = np.array([0, 31, 32, 63, 64, 99])
    found = np.zeros((len(ids), MODEL.hidden))
    logits = []
    for index in range(size):
        rank = TensorRank(index, size)
        part = cut("embed.weight", table, MODEL, rank)
        begin = index * len(part)
        mine = (ids >= begin) & (ids < begin + len(part))
        found[mine] += part[ids[mine] - begin]
        logits.append(table[:3] @ part.T)
    np.testing.assert_array_equal(found, table[ids])
    np.testing.assert_allclose(np.concatenate(logits, axis=1)[:, : MODEL.vocab_size], table[:3] @ table.T)


@pytest.mark.parametrize(
    ("spec", "size", "expert", "unit", "said"),
    [
        (MODEL, 3, 1, 1, "8 heads cannot be divided among 3 ranks"),
        (replace(MODEL, heads=12, kv_heads=4), 6, 1, 1, "6 ranks neither divide 4 heads of keys and values"),
        (MODEL, 2, 2, 1, "the model has no experts"),
        (SPARSE, 8, 3, 1, "4 experts cannot be divided among 3 groups"),
        (SPARSE, 2, 4, 1, "2 ranks cannot be divided into 4 groups"),
        (MODEL, 8, 1, 4, "24 inner channels in blocks of 4 are too few for 8 ranks"),
        (MODEL, 8, 1, 8, "the 4 channels of a rank's heads are no multiple of the group of 8"),
        (MODEL, 0, 1, 1, "at least 1"),
    ],
)
def test_degrees_that_cannot_be_say_why(spec: ModelSpec, size: int, expert: int, unit: int, said: str) -> None:
    assert said in (obstacle(spec, size, expert, unit) or "")


@pytest.mark.parametrize("rank", [(2, 2, 1), (-1, 2, 1), (0, 4, 3)])
def test_ranks_that_are_none_are_refused(rank: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match="rank"):
        TensorRank(*rank)
