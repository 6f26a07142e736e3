"""The only owner of device work: a batch becomes tensors, runs through the decoder and comes back as drawn tokens.

Knows neither scheduler nor policy: who runs is in the batch.
"""

import time

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.batch import Batch, PromptLogprobRow, StepOutput, StepStats, TokenLogprob
from engine.kernels import AttentionLayout
from engine.kv.cache import PagedKVCache
from engine.models.decoder import Decoder
from engine.sampler import Sampler, token_logprobs

_LOGPROB_ROWS = 128
"""Rows of prompt logits held at once: a long prompt times a large vocabulary would be gigabytes."""


class Runner:
    """Runs batches one at a time on the decoder's device."""

    def __init__(self, decoder: Decoder, cache: PagedKVCache, sampler: Sampler) -> None:
        self._decoder = decoder
        self._cache = cache
        self._sampler = sampler

    def run(self, batch: Batch) -> StepOutput:
        start = time.perf_counter()
        with torch.inference_mode():
            self._cache.clear(self._to_device(opened_pages(batch, self._cache.page_tokens)))
            token_ids = self._to_device(batch.token_ids)
            hidden = self._decoder.forward(token_ids, self._layout(batch), self._cache)
            prompt_logprobs = [self._prompt_logprobs(hidden, batch, row) for row in batch.prompt_logprobs]
            drawn = self._sampler.sample(self._decoder.logits(hidden[self._sample_rows(batch)]), batch.samples)
        stats = StepStats(batch.num_tokens, batch.num_sequences, time.perf_counter() - start)
        return StepOutput(batch.step, drawn.token_ids, drawn.logprobs, prompt_logprobs, stats, drawn.failed)

    def _layout(self, batch: Batch) -> AttentionLayout:
        query_lens = np.diff(batch.cu_seq_q)
        return AttentionLayout(
            positions=self._to_device(batch.positions),
            contexts=self._to_device(np.repeat(batch.context_lens.astype(np.int64), query_lens)),
            slots=self._to_device(slots(batch, self._cache.page_tokens)),
            cu_seq_q=self._to_device(batch.cu_seq_q),
            context_lens=self._to_device(batch.context_lens),
            page_table=self._to_device(batch.page_table),
            page_tokens=self._cache.page_tokens,
            query_lens=tuple(query_lens.tolist()),
            lens=tuple(batch.context_lens.tolist()),
        )

    def _sample_rows(self, batch: Batch) -> Tensor:
        """The last token of each sequence that samples: the only rows that need logits."""
        sequences = np.fromiter((sample.row for sample in batch.samples), np.int64, len(batch.samples))
        return self._to_device(batch.cu_seq_q[sequences + 1].astype(np.int64) - 1)

    def _prompt_logprobs(self, hidden: Tensor, batch: Batch, row: PromptLogprobRow) -> tuple[TokenLogprob, ...]:
        first = int(batch.cu_seq_q[row.row])
        found: list[TokenLogprob] = []
        for start in range(0, len(row.targets), _LOGPROB_ROWS):
            targets = row.targets[start : start + _LOGPROB_ROWS]
            logits = self._decoder.logits(hidden[first + start : first + start + len(targets)])
            found.extend(token_logprobs(logits, list(targets), row.top))
        return tuple(found)

    def _to_device(self, array: NDArray[np.int64] | NDArray[np.int32]) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(self._decoder.device)


def slots(batch: Batch, page_tokens: int) -> NDArray[np.int64]:
    """[T] where each token's keys and values go: page * page_tokens + offset."""
    sequences = np.repeat(np.arange(batch.num_sequences), np.diff(batch.cu_seq_q))
    pages = batch.page_table[sequences, batch.positions // page_tokens].astype(np.int64)
    return pages * page_tokens + batch.positions % page_tokens


def opened_pages(batch: Batch, page_tokens: int) -> NDArray[np.int64]:
    """Pages that this batch begins to write and does not fill: the other slots still hold an earlier owner's values."""
    last = batch.context_lens.astype(np.int64) - 1
    first_written = last + 1 - np.diff(batch.cu_seq_q)
    is_opened = (last // page_tokens * page_tokens >= first_written) & (last % page_tokens < page_tokens - 1)
    return batch.page_table[np.arange(batch.num_sequences), last // page_tokens][is_opened].astype(np.int64)
