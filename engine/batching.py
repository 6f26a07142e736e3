"""Lays chosen chunks of sequences out as one flat `Batch`. Decides nothing and changes nothing."""

from typing import NamedTuple

import numpy as np

from engine.batch import Batch, PromptLogprobRow, SampleRow
from engine.sequence import Sequence


class Chunk(NamedTuple):
    """The next `num_tokens` tokens of a sequence, to run in one iteration."""

    sequence: Sequence
    num_tokens: int


def build_batch(step: int, chunks: list[Chunk]) -> Batch:
    """The iteration that runs `chunks`, in their order. Each sequence must already have pages for its tokens."""
    token_ids: list[int] = []
    positions: list[int] = []
    cu_seq_q = [0]
    context_lens: list[int] = []
    samples: list[SampleRow] = []
    prompt_logprobs: list[PromptLogprobRow] = []
    for row, (sequence, count) in enumerate(chunks):
        start = sequence.num_computed
        end = start + count
        token_ids += sequence.tokens[start:end]
        positions += range(start, end)
        cu_seq_q.append(len(token_ids))
        context_lens.append(end)
        if end == len(sequence.tokens):
            samples.append(_sample_row(row, sequence))
        if wants_prompt_logprobs(sequence):
            prompt_logprobs.append(_prompt_logprob_row(row, sequence, start, end))
    page_table = np.zeros((len(chunks), max(len(c.sequence.pages) for c in chunks)), dtype=np.int32)
    for row, (sequence, _) in enumerate(chunks):
        page_table[row, : len(sequence.pages)] = sequence.pages
    return Batch(
        step=step,
        sequence_ids=tuple(c.sequence.sequence_id for c in chunks),
        token_ids=np.array(token_ids, dtype=np.int64),
        positions=np.array(positions, dtype=np.int64),
        cu_seq_q=np.array(cu_seq_q, dtype=np.int32),
        context_lens=np.array(context_lens, dtype=np.int32),
        page_table=page_table,
        samples=tuple(samples),
        prompt_logprobs=tuple(prompt_logprobs),
    )


def wants_prompt_logprobs(sequence: Sequence) -> bool:
    """Whether logprobs of prompt tokens are still to be reported; a prompt computed again is not reported again."""
    return (
        sequence.request.params.prompt_logprobs is not None
        and sequence.sample_index == 0
        and sequence.num_scored < sequence.num_prompt - 1
    )


def _sample_row(row: int, sequence: Sequence) -> SampleRow:
    params, num_prompt = sequence.request.params, sequence.num_prompt
    history = params.needs_history
    return SampleRow(
        row=row,
        params=params,
        seed=sequence.seed,
        sample_index=sequence.sample_index,
        position=len(sequence.tokens),
        banned=tuple(sequence.stop_token_ids) if sequence.num_output < params.min_tokens else (),
        prompt=sequence.request.prompt_token_ids if history else (),
        output=sequence.tokens[num_prompt:] if history else (),
    )


def _prompt_logprob_row(row: int, sequence: Sequence, start: int, end: int) -> PromptLogprobRow:
    top = sequence.request.params.prompt_logprobs
    assert top is not None
    return PromptLogprobRow(row, sequence.request.prompt_token_ids[start + 1 : end + 1], top)
