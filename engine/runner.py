"""The only owner of device work: a batch becomes tensors, runs through the model and comes back as drawn tokens.

Knows neither scheduler nor policy: who runs is in the batch.
"""

import time
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.batch import Batch, PromptLogprobRow, StepOutput, StepStats, TokenLogprob
from engine.forward import Forward
from engine.kernels import AttentionLayout
from engine.sampler import Sampler

LOGPROB_ROWS = 128
"""Rows of prompt logits held at once: a long prompt times a large vocabulary would be gigabytes."""


class Runner:
    """Runs batches one at a time on the model's device."""

    def __init__(self, forward: Forward, page_tokens: int, sampler: Sampler) -> None:
        self._forward = forward
        self._page_tokens = page_tokens
        self._sampler = sampler

    def run(self, batch: Batch) -> StepOutput:
        start = time.perf_counter()
        with torch.inference_mode():
            layout = layout_of(batch, self._page_tokens, self._forward.device)
            hidden = self._forward.hidden(self._to_device(batch.token_ids), layout)
            prompt_logprobs = [self._prompt_logprobs(hidden, batch, row) for row in batch.prompt_logprobs]
            drawn = self._sampler.sample(self._forward.logits(hidden, self._sample_rows(batch)), batch.samples)
        stats = StepStats(batch.num_tokens, batch.num_sequences, time.perf_counter() - start)
        return StepOutput(batch.step, drawn.token_ids, drawn.logprobs, prompt_logprobs, stats, drawn.failed)

    def _sample_rows(self, batch: Batch) -> Tensor:
        """The last token of each sequence that samples: the only rows that need logits."""
        return self._to_device(batch.cu_seq_q[batch.samples.rows + 1].astype(np.int64) - 1)

    def _prompt_logprobs(self, hidden: Tensor, batch: Batch, row: PromptLogprobRow) -> tuple[TokenLogprob, ...]:
        first = int(batch.cu_seq_q[row.row])
        found: list[TokenLogprob] = []
        for start in range(0, len(row.targets), LOGPROB_ROWS):
            targets = row.targets[start : start + LOGPROB_ROWS]
            rows = torch.arange(first + start, first + start + len(targets), device=self._forward.device)
            logits = self._forward.logits(hidden, rows)
            found.extend(self._sampler.token_logprobs(logits, list(targets), row.top))
        return tuple(found)

    def _to_device(self, array: NDArray[Any]) -> Tensor:
        return torch.from_numpy(array).to(self._forward.device)


def layout_of(batch: Batch, page_tokens: int, device: torch.device) -> AttentionLayout:
    """The batch's places in the cache, on the device."""

    def tensor(array: NDArray[Any]) -> Tensor:
        return torch.from_numpy(array).to(device)

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


def slots(batch: Batch, page_tokens: int) -> NDArray[np.int64]:
    """[T] where each token's keys and values go: page * page_tokens + offset."""
    sequences = np.arange(batch.num_sequences)
    if batch.num_tokens > batch.num_sequences:
        sequences = np.repeat(sequences, np.diff(batch.cu_seq_q))
    columns, offsets = np.divmod(batch.positions, page_tokens)
    return batch.page_table[sequences, columns].astype(np.int64) * page_tokens + offsets
