"""Hugging Face `generate` on static batches of 16: left padding, an attention mask, all rows to the longest output.

Only the tokens that were asked for are noted; those that pad a batch to its longest output are not.
"""

from collections.abc import Sequence
from typing import Any

import torch
import transformers

from .wire import Item, Load, Timeline, bytes_of_files, serve

PAD = 2
STATIC_BATCH = 16


class Transformers:
    version = str(transformers.__version__)

    def __init__(self, load: Load) -> None:
        torch.set_num_threads(load.threads)
        self.weight_bytes = bytes_of_files(load.model, ".safetensors")
        self._model = transformers.AutoModelForCausalLM.from_pretrained(load.model, dtype=torch.bfloat16)

    def prepare(self, items: Sequence[Item]) -> None:
        pass

    def run(self, items: Sequence[Item], timeline: Timeline) -> None:
        for begin in range(0, len(items), STATIC_BATCH):
            self._generate(begin, items[begin : begin + STATIC_BATCH], timeline)

    def _generate(self, begin: int, batch: Sequence[Item], timeline: Timeline) -> None:
        width = max(len(item.prompt) for item in batch)
        longest = max(item.output_tokens for item in batch)
        token_ids = torch.full((len(batch), width), PAD)
        mask = torch.zeros_like(token_ids)
        for row, item in enumerate(batch):
            token_ids[row, width - len(item.prompt) :] = torch.tensor(item.prompt)
            mask[row, width - len(item.prompt) :] = 1

        def watch(so_far: torch.Tensor, _scores: Any, **_: Any) -> torch.Tensor:
            """Called after every token; never stops a row."""
            drawn, last = so_far.shape[1] - width, so_far[:, -1].tolist()
            rows = (row for row, item in enumerate(batch) if drawn <= item.output_tokens)
            timeline.note((begin + row, [last[row]]) for row in rows)
            return torch.zeros(len(batch), dtype=torch.bool)

        self._model.generate(
            token_ids,
            attention_mask=mask,
            max_new_tokens=longest,
            min_new_tokens=longest,
            do_sample=False,
            stopping_criteria=[watch],
        )


if __name__ == "__main__":
    serve(Transformers)
