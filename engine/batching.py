"""Lays chosen chunks of sequences out as one flat `Batch`. Decides nothing and changes nothing."""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from engine.batch import Batch, Edit, PromptLogprobRow, Samples
from engine.lanes import Lanes
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
    lane = np.array([sequence.lane for sequence in sequences])
    last_token, length = lanes.last_token[lane], lanes.length[lane]
    axis = _mixed(last_token, length, chunks) if chunks else _decoding(last_token, length)
    rows = np.flatnonzero(axis.context_lens == length) if chunks else np.arange(len(sequences))
    drawing, drawing_lanes, partial = sequences, lane, []
    if len(rows) < len(sequences):
        drawing, drawing_lanes = [sequences[row] for row in rows.tolist()], lane[rows]
        partial = [sequences[row] for row in np.flatnonzero(axis.context_lens != length).tolist()]
    edits, logprobs = _wishes(lanes, drawing, drawing_lanes)
    batch = Batch(
        step=step,
        sequence_ids=tuple([sequence.sequence_id for sequence in sequences]),
        token_ids=axis.token_ids,
        positions=axis.positions,
        cu_seq_q=axis.cu_seq_q,
        context_lens=axis.context_lens,
        page_table=lanes.pages(lane, int(axis.context_lens.max())),
        samples=Samples(rows, length[rows], lanes.settings[drawing_lanes], edits, logprobs),
        prompt_logprobs=_prompt_logprobs(lanes, sequences, lane, axis),
    )
    return Layout(batch, sequences, drawing, drawing_lanes, partial)


class _Axis(NamedTuple):
    """The flat token axis of a batch; see `Batch`."""

    token_ids: NDArray[np.int64]
    positions: NDArray[np.int64]
    cu_seq_q: NDArray[np.int32]
    context_lens: NDArray[np.int32]


def _decoding(last_token: NDArray[np.int64], length: NDArray[np.int64]) -> _Axis:
    """One token of each sequence."""
    cu_seq_q = np.arange(len(length) + 1, dtype=np.int32)
    return _Axis(last_token, length - 1, cu_seq_q, length.astype(np.int32))


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


def _prompt_logprobs(
    lanes: Lanes, sequences: list[Sequence], lane: NDArray[np.int64], axis: _Axis
) -> tuple[PromptLogprobRow, ...]:
    found = []
    for row in lanes.special_among(lane):
        request, top = sequences[row].request, sequences[row].request.params.prompt_logprobs
        if top is not None and wants_prompt_logprobs(sequences[row]):
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
