"""Lays chosen chunks of sequences out as one flat `Batch`. Decides nothing and changes nothing."""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from engine.batch import Batch, Edit, PromptLogprobRow, Samples
from engine.lanes import Group, Lanes
from engine.sequence import Sequence


class Chunk(NamedTuple):
    """The next `num_tokens` tokens of a sequence, to run in one iteration."""

    sequence: Sequence
    num_tokens: int


class Layout(NamedTuple):
    """A batch, and whom its results belong to."""

    batch: Batch
    sequences: list[Sequence]
    """The batch's rows."""
    drawing: list[Sequence]
    """Whom `batch.samples` draw for."""
    drawing_lanes: NDArray[np.int64]
    partial: list[Sequence]
    """The others: sequences whose chunk ends before their last token."""


def build_batch(step: int, lanes: Lanes, decodes: list[Sequence], chunks: list[Chunk]) -> Layout:
    """The iteration that runs the last token of each of `decodes`, then `chunks`, in their order.

    Each sequence is in a lane and has pages for its tokens.
    """
    sequences = decodes + [chunk.sequence for chunk in chunks] if chunks else decodes
    group = lanes.group(sequences)
    last_token, length = lanes.last_token[group.lanes], lanes.length[group.lanes]
    if chunks:
        axis = _mixed(last_token, length, chunks)
        drawing = _drawing(group, length, axis)
    else:
        axis = _decoding(last_token, length, group)
        drawing = _Drawing(group.sequences, group.lanes, [], group.rows, length, group.settings)
    edits, logprobs = _wishes(lanes, drawing.sequences, drawing.lanes)
    batch = Batch(
        step=step,
        sequence_ids=group.sequence_ids,
        token_ids=axis.token_ids,
        positions=axis.positions,
        cu_seq_q=axis.cu_seq_q,
        context_lens=axis.context_lens,
        page_table=lanes.pages(group.lanes, axis.context_lens),
        samples=Samples(drawing.rows, drawing.positions, drawing.settings, edits, logprobs),
        prompt_logprobs=_prompt_logprobs(lanes, group, axis),
    )
    return Layout(batch, group.sequences, drawing.sequences, drawing.lanes, drawing.partial)


class _Axis(NamedTuple):
    """The flat token axis of a batch; see `Batch`."""

    token_ids: NDArray[np.int64]
    positions: NDArray[np.int64]
    cu_seq_q: NDArray[np.int32]
    context_lens: NDArray[np.int32]


class _Drawing(NamedTuple):
    """Which sequences of a batch draw a token; see `Layout` and `Samples`."""

    sequences: list[Sequence]
    lanes: NDArray[np.int64]
    partial: list[Sequence]
    rows: NDArray[np.int64]
    positions: NDArray[np.int64]
    settings: NDArray[np.void]


def _decoding(last_token: NDArray[np.int64], length: NDArray[np.int64], group: Group) -> _Axis:
    """One token of each sequence."""
    return _Axis(last_token, length - 1, group.one_each, length.astype(np.int32))


def _mixed(last_token: NDArray[np.int64], length: NDArray[np.int64], chunks: list[Chunk]) -> _Axis:
    """One token of each sequence but the last ones, which run `chunks`."""
    num_decodes = len(length) - len(chunks)
    spans = [(c.sequence.tokens, c.sequence.num_computed, c.sequence.num_computed + c.num_tokens) for c in chunks]
    context_lens = length.astype(np.int32)
    context_lens[num_decodes:] = [end for _, _, end in spans]
    counts = np.ones(len(length), np.int32)
    counts[num_decodes:] = [chunk.num_tokens for chunk in chunks]
    return _Axis(
        np.concatenate([last_token[:num_decodes], *(np.array(t[start:end], np.int64) for t, start, end in spans)]),
        np.concatenate([length[:num_decodes] - 1, *(np.arange(start, end) for _, start, end in spans)]),
        np.concatenate(([0], counts.cumsum())).astype(np.int32),
        context_lens,
    )


def _drawing(group: Group, length: NDArray[np.int64], axis: _Axis) -> _Drawing:
    """Those whose last token is in the batch."""
    draws = axis.context_lens == length
    rows = np.flatnonzero(draws)
    return _Drawing(
        [group.sequences[row] for row in rows.tolist()],
        group.lanes[rows],
        [group.sequences[row] for row in np.flatnonzero(~draws).tolist()],
        rows,
        length[rows],
        group.settings[rows],
    )


def _wishes(
    lanes: Lanes, drawing: list[Sequence], drawing_lanes: NDArray[np.int64]
) -> tuple[dict[int, Edit], dict[int, int]]:
    """`Samples.edits` and `Samples.logprobs`."""
    edits: dict[int, Edit] = {}
    logprobs: dict[int, int] = {}
    for index in lanes.special_among(drawing_lanes):
        sequence = drawing[index]
        if (edit := lanes.edit(sequence)) is not None:
            edits[index] = edit
        if (top := sequence.request.params.logprobs) is not None:
            logprobs[index] = top
    return edits, logprobs


def _prompt_logprobs(lanes: Lanes, group: Group, axis: _Axis) -> tuple[PromptLogprobRow, ...]:
    found = []
    for row in lanes.special_among(group.lanes):
        sequence = group.sequences[row]
        request, top = sequence.request, sequence.request.params.prompt_logprobs
        if top is not None and wants_prompt_logprobs(sequence):
            end = int(axis.context_lens[row])
            start = end - int(axis.cu_seq_q[row + 1] - axis.cu_seq_q[row])
            found.append(PromptLogprobRow(row, request.prompt_token_ids[start + 1 : end + 1], top))
    return tuple(found)


def wants_prompt_logprobs(sequence: Sequence) -> bool:
    """Whether logprobs of prompt tokens are still to be reported; a prompt computed again is not reported again."""
    return (
        sequence.request.params.prompt_logprobs is not None
        and sequence.sample_index == 0
        and sequence.num_scored < sequence.num_prompt - 1
    )
