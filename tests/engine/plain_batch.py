"""The oracle of `engine.batching`: a batch laid out sequence by sequence from what the sequences themselves hold."""

import numpy as np

from engine.batch import Batch, PromptLogprobRow, SampleRow, Samples
from engine.sequence import Sequence


def plain_batch(step: int, spans: list[tuple[Sequence, int, int]], page_tokens: int) -> Batch:
    """The iteration that runs tokens `start` to `end` of each (sequence, start, end)."""
    tokens: list[int] = []
    positions: list[int] = []
    cu_seq_q = [0]
    samples: list[SampleRow] = []
    prompt_logprobs: list[PromptLogprobRow] = []
    for row, (sequence, start, end) in enumerate(spans):
        tokens += sequence.tokens[start:end]
        positions += range(start, end)
        cu_seq_q.append(len(tokens))
        if end == len(sequence.tokens):
            samples.append(_sample_row(row, sequence))
        top, prompt = sequence.request.params.prompt_logprobs, sequence.request.prompt_token_ids
        if top is not None and sequence.sample_index == 0 and sequence.num_scored < len(prompt) - 1:
            prompt_logprobs.append(PromptLogprobRow(row, prompt[start + 1 : end + 1], top))
    width = max(-(-end // page_tokens) for _, _, end in spans)
    table = np.zeros((len(spans), width), np.int32)
    for row, (sequence, _, _) in enumerate(spans):
        pages = sequence.pages[:width]
        table[row, : len(pages)] = pages
    return Batch(
        step=step,
        sequence_ids=tuple(sequence.sequence_id for sequence, _, _ in spans),
        token_ids=np.array(tokens, np.int64),
        positions=np.array(positions, np.int64),
        cu_seq_q=np.array(cu_seq_q, np.int32),
        context_lens=np.array([end for _, _, end in spans], np.int32),
        page_table=table,
        samples=Samples.of(samples),
        prompt_logprobs=tuple(prompt_logprobs),
    )


def _sample_row(row: int, sequence: Sequence) -> SampleRow:
    params, prompt = sequence.request.params, sequence.request.prompt_token_ids
    output = sequence.tokens[len(prompt) :]
    banned = tuple(sequence.stop_token_ids) if len(output) < params.min_tokens else ()
    return SampleRow(
        row, params, sequence.seed, sequence.sample_index, len(sequence.tokens), banned, prompt, tuple(output)
    )


def assert_same(found: Batch, expected: Batch) -> None:
    """Every number and every dtype."""
    assert (found.step, found.sequence_ids) == (expected.step, expected.sequence_ids)
    assert found.prompt_logprobs == expected.prompt_logprobs
    for name in ("token_ids", "positions", "cu_seq_q", "context_lens", "page_table"):
        _assert_same_array(getattr(found, name), getattr(expected, name), name)
    for name in ("rows", "positions", "settings"):
        _assert_same_array(getattr(found.samples, name), getattr(expected.samples, name), f"samples.{name}")
    assert found.samples.logprobs == expected.samples.logprobs
    assert list(found.samples.edits) == list(expected.samples.edits)
    for edit, wanted in zip(found.samples.edits.values(), expected.samples.edits.values(), strict=True):
        for name, value, right in zip(edit._fields, edit, wanted, strict=True):
            if isinstance(right, np.ndarray):
                _assert_same_array(value, right, f"edit.{name}")
            else:
                assert value == right, f"edit.{name}"


def _assert_same_array(found: np.ndarray, expected: np.ndarray, name: str) -> None:
    assert found.dtype == expected.dtype, name
    assert found.shape == expected.shape, name
    assert found.flags.c_contiguous, f"{name} is handed to kernels by its address"
    assert np.array_equal(found, expected), name
