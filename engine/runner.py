"""The only owner of device work: a batch becomes tensors, runs through the model and comes back as drawn tokens.

Knows neither scheduler nor policy: who runs is in the batch.
"""

import time
from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.batch import Batch, PromptLogprobRow, Samples, StepOutput, StepStats, TokenLogprob
from engine.forward import Forward
from engine.kernels.operators import AttentionLayout, Wanted
from engine.sampler import Drawn

LOGPROB_ROWS = 128
"""Rows of prompt logits held at once: a long prompt times a large vocabulary would be gigabytes."""


class Draws(Protocol):
    """`engine.sampler.Sampler`, or one that shares the vocabulary with others."""

    def sample(self, logits: Tensor, samples: Samples) -> Drawn: ...

    def token_logprobs(self, logits: Tensor, targets: SequenceOf[int], top: int) -> tuple[TokenLogprob, ...]: ...


Receive = Callable[[int], Tensor]
"""Waits for the hidden states of so many tokens from the stage before."""


class Runner:
    """Runs batches one at a time on the model's device: all of a model, or its last stage."""

    def __init__(self, forward: Forward, page_tokens: int, sampler: Draws, receive: Receive | None = None) -> None:
        """`receive` brings what a later stage begins with."""
        self._forward = forward
        self._page_tokens = page_tokens
        self._sampler = sampler
        self._receive = receive

    def run(self, batch: Batch) -> StepOutput:
        start = time.perf_counter()
        device = self._forward.device
        layout = layout_of(batch, self._page_tokens, device)
        begins = wanted_begins(batch)
        wanted = wanted_of(batch, begins, layout)
        # Before the forward pass: after it the caches are cold, and the same few lines take several times as long.
        sampled = _to(device, sampled_rows(batch, begins))
        hidden = self._forward.hidden(inputs_of(batch, device, self._receive), layout, wanted)
        prompt_logprobs = [self._prompt_logprobs(hidden, begins, row) for row in batch.prompt_logprobs]
        drawn = self._sampler.sample(self._forward.logits(hidden, sampled), batch.samples)
        # A batch that draws nothing asks the device for no answer. Its pages are copied and given away from now on, and
        # what it took is learnt from.
        self._forward.wait()
        stats = StepStats(batch.num_tokens, batch.num_sequences, time.perf_counter() - start)
        return StepOutput(batch.step, drawn.token_ids, drawn.logprobs, prompt_logprobs, stats, drawn.failed)

    def _prompt_logprobs(
        self, hidden: Tensor, begins: NDArray[np.int32], row: PromptLogprobRow
    ) -> tuple[TokenLogprob, ...]:
        """`hidden` are the wanted rows; those of a sequence with targets are its whole chunk."""
        first = int(begins[row.row])
        found: list[TokenLogprob] = []
        for start in range(0, len(row.targets), LOGPROB_ROWS):
            targets = row.targets[start : start + LOGPROB_ROWS]
            rows = torch.arange(first + start, first + start + len(targets), device=self._forward.device)
            logits = self._forward.logits(hidden, rows)
            found.extend(self._sampler.token_logprobs(logits, list(targets), row.top))
        return tuple(found)


def inputs_of(batch: Batch, device: torch.device, receive: Receive | None) -> Tensor:
    """What a stage begins with: token ids, or what the stage before has made of them."""
    return _to(device, batch.token_ids) if receive is None else receive(batch.num_tokens)


def layout_of(batch: Batch, page_tokens: int, device: torch.device) -> AttentionLayout:
    """The batch's places in the cache, on the device."""

    tensor = partial(_to, device)
    only_decodes = batch.num_tokens == batch.num_sequences
    query_lens = (1,) * batch.num_sequences if only_decodes else tuple(np.diff(batch.cu_seq_q).tolist())
    contexts = batch.positions + 1 if only_decodes else np.repeat(batch.context_lens.astype(np.int64), query_lens)
    return AttentionLayout(
        positions=tensor(batch.positions),
        contexts=tensor(contexts),
        slots=tensor(slots(batch, page_tokens)),
        cu_seq_q=tensor(batch.cu_seq_q),
        context_lens=tensor(batch.context_lens),
        page_table=tensor(batch.page_table),
        page_tokens=page_tokens,
        query_lens=query_lens,
        lens=tuple(batch.context_lens.tolist()),
    )


def wanted_begins(batch: Batch) -> NDArray[np.int32]:
    """[S + 1] where each sequence's wanted tokens begin among all wanted ones.

    Wanted are the last token of a sequence that samples, and every token of one with prompt logprobs.
    """
    if len(batch.samples) == batch.num_tokens:
        return batch.cu_seq_q
    begins = np.zeros(batch.num_sequences + 1, np.int32)
    begins[batch.samples.rows + 1] = 1
    scored = np.array([row.row for row in batch.prompt_logprobs if row.targets], np.int64)
    begins[scored + 1] = batch.cu_seq_q[scored + 1] - batch.cu_seq_q[scored]
    return begins.cumsum(dtype=np.int32)


def sampled_rows(batch: Batch, begins: NDArray[np.int32]) -> NDArray[np.int64]:
    """[R] where the last token of each sequence that samples is among the wanted ones. `begins` is `wanted_begins`."""
    if len(batch.samples) == batch.num_tokens:
        return batch.samples.rows
    return begins[batch.samples.rows + 1].astype(np.int64) - 1


def wanted_of(batch: Batch, begins: NDArray[np.int32], layout: AttentionLayout) -> Wanted | None:
    """The wanted tokens of a batch with this layout; None if all are. `begins` is `wanted_begins`."""
    if begins[-1] == batch.num_tokens:
        return None
    device, counts = layout.positions.device, np.diff(begins)
    some = np.flatnonzero(counts)
    places = np.arange(begins[-1]) + np.repeat(batch.cu_seq_q[1:] - begins[1:], counts)
    rows, sequences = (torch.from_numpy(index).to(device) for index in (places, some))
    return Wanted(
        rows,
        AttentionLayout(
            positions=layout.positions[rows],
            contexts=layout.contexts[rows],
            slots=layout.slots[rows],
            cu_seq_q=torch.from_numpy(np.append(begins[:1], begins[some + 1])).to(device),
            context_lens=layout.context_lens[sequences],
            page_table=layout.page_table[sequences],
            page_tokens=layout.page_tokens,
            query_lens=tuple(counts[some].tolist()),
            lens=tuple(batch.context_lens[some].tolist()),
        ),
    )


def slots(batch: Batch, page_tokens: int) -> NDArray[np.int64]:
    """[T] where each token's keys and values go: page * page_tokens + offset."""
    sequences = np.arange(batch.num_sequences)
    if batch.num_tokens > batch.num_sequences:
        sequences = np.repeat(sequences, np.diff(batch.cu_seq_q))
    columns = batch.positions // page_tokens
    pages = batch.page_table.take(sequences * batch.page_table.shape[1] + columns)
    return batch.positions + (pages - columns) * page_tokens


def _to(device: torch.device, array: NDArray[Any]) -> Tensor:
    return torch.from_numpy(array).to(device)
