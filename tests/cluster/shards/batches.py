"""Batches and outputs to send: any that hypothesis thinks of, and those of a steady stream of decodes."""

from typing import Any

import numpy as np
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from engine.batch import (
    SETTINGS,
    Batch,
    Edit,
    PromptLogprobRow,
    SampleRow,
    Samples,
    StepOutput,
    StepStats,
    TokenLogprob,
)
from engine.sampling_params import SamplingParams

tokens = st.integers(0, 2**31 - 1)
reals = st.floats(allow_nan=False)


def arrays(dtype: Any, length: int | None = None, low: int = 0, high: int = 2**31 - 1) -> st.SearchStrategy[Any]:
    shape = st.integers(0, 4) if length is None else length
    elements = st.floats(width=32, allow_nan=False) if dtype == np.float32 else st.integers(low, high)
    return hnp.arrays(dtype, shape, elements=elements)


def by_index(count: int, values: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[int, Any]]:
    """Some of `count` indices, with a value each."""
    return st.dictionaries(st.integers(0, max(0, count - 1)), values, max_size=min(2, count))


@st.composite
def edits(draw: st.DrawFn) -> Edit:
    biased, seen = draw(st.integers(0, 3)), draw(st.integers(0, 3))
    return Edit(
        draw(arrays(np.int64, biased)),
        draw(arrays(np.float32, biased)),
        draw(st.none() | arrays(np.int64)),
        draw(arrays(np.int64)),
        draw(reals),
        draw(reals),
        draw(reals),
        draw(arrays(np.int64, seen)),
        draw(arrays(np.float32, seen)),
    )


@st.composite
def batches(draw: st.DrawFn) -> Batch:
    lengths = draw(st.lists(st.integers(1, 5), min_size=1, max_size=5))
    count, total = len(lengths), sum(lengths)
    before = draw(st.lists(st.integers(0, 100), min_size=count, max_size=count))
    rows = draw(st.lists(st.integers(0, count - 1), max_size=count))
    settings = np.zeros(len(rows), SETTINGS)
    for name in SETTINGS.names or ():
        settings[name] = draw(st.integers(0, 100))
    scored = draw(st.lists(st.integers(0, count - 1), max_size=2))
    return Batch(
        step=draw(st.integers(0, 2**63 - 1)),
        sequence_ids=tuple(draw(st.lists(st.integers(0, 2**62), min_size=count, max_size=count))),
        token_ids=draw(arrays(np.int64, total)),
        positions=draw(arrays(np.int64, total)),
        cu_seq_q=np.concatenate(([0], np.cumsum(lengths))).astype(np.int32),
        context_lens=np.array([length + more for length, more in zip(lengths, before, strict=True)], np.int32),
        page_table=draw(hnp.arrays(np.int32, (count, draw(st.integers(0, 4))), elements=st.integers(0, 2**31 - 1))),
        samples=Samples(
            np.array(rows, np.int64),
            draw(arrays(np.int64, len(rows))),
            settings,
            draw(by_index(len(rows), edits())),
            draw(by_index(len(rows), st.integers(0, 20))),
        ),
        prompt_logprobs=tuple(
            PromptLogprobRow(row, tuple(draw(st.lists(tokens, max_size=lengths[row]))), draw(st.integers(0, 20)))
            for row in scored
        ),
    )


logprobs = st.builds(
    TokenLogprob, tokens, reals, st.integers(1, 10**6), st.lists(st.tuples(tokens, reals), max_size=3).map(tuple)
)


@st.composite
def outputs(draw: st.DrawFn) -> StepOutput:
    drawn = draw(st.lists(tokens, max_size=5))
    return StepOutput(
        draw(st.integers(0, 2**63 - 1)),
        drawn,
        [draw(st.none() | logprobs) for _ in drawn],
        draw(st.lists(st.lists(logprobs, max_size=3).map(tuple), max_size=2)),
        StepStats(draw(st.integers(0, 10**6)), draw(st.integers(0, 10**6)), draw(st.floats(0, 1e9))),
        draw(by_index(len(drawn), st.text(max_size=20))),
    )


def decodes(sequences: int = 32, context: int = 2048, page_tokens: int = 16, step: int = 1) -> Batch:
    """An iteration of streams that draw a token each."""
    pages = -(-context // page_tokens)
    params = SamplingParams()
    return Batch(
        step=step,
        sequence_ids=tuple(range(sequences)),
        token_ids=np.arange(sequences, dtype=np.int64),
        positions=np.full(sequences, context - 1, np.int64),
        cu_seq_q=np.arange(sequences + 1, dtype=np.int32),
        context_lens=np.full(sequences, context, np.int32),
        page_table=np.arange(sequences * pages, dtype=np.int32).reshape(sequences, pages),
        samples=Samples.of(
            [SampleRow(row, params, seed=row, sample_index=0, position=context) for row in range(sequences)]
        ),
    )


def same(a: Any, b: Any) -> bool:
    """Whether two values are equal, arrays by type, shape and bytes."""
    if isinstance(a, np.ndarray):
        return isinstance(b, np.ndarray) and a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
    if isinstance(a, Batch | Samples):
        return type(a) is type(b) and all(same(getattr(a, name), getattr(b, name)) for name in a.__slots__)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)
