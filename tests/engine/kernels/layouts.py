"""Layouts of steps over pages in shuffled order."""

from collections.abc import Sequence

import torch

from engine.kernels.operators import AttentionLayout


def make_layout(
    query_lens: Sequence[int],
    lens: Sequence[int],
    page_tokens: int,
    *,
    seed: int = 0,
    device: torch.device | str = "cpu",
    spare_pages: int = 0,
    spare_columns: int = 0,
) -> AttentionLayout:
    """No page is shared. Unused entries of the page table name a page that holds something else.

    `spare_pages` belong to no sequence; `spare_columns` make the table wider than any sequence needs.
    """
    counts = [-(-length // page_tokens) for length in lens]
    order = torch.randperm(sum(counts) + spare_pages, generator=torch.Generator().manual_seed(seed)).tolist()
    table = torch.zeros(len(lens), max(counts) + spare_columns, dtype=torch.int32)
    for row, count in enumerate(counts):
        table[row, :count] = torch.tensor([order.pop() for _ in range(count)])
    spans = list(zip(query_lens, lens, strict=True))
    positions = torch.cat([torch.arange(length - queries, length) for queries, length in spans])
    rows = torch.repeat_interleave(torch.arange(len(lens)), torch.tensor(query_lens))
    slots = table[rows, positions // page_tokens].to(torch.int64) * page_tokens + positions % page_tokens
    return AttentionLayout(
        positions=positions.to(device),
        contexts=torch.tensor(lens)[rows].to(device),
        slots=slots.to(device),
        cu_seq_q=torch.tensor([0, *torch.tensor(query_lens).cumsum(0)], dtype=torch.int32, device=device),
        context_lens=torch.tensor(lens, dtype=torch.int32, device=device),
        page_table=table.to(device),
        page_tokens=page_tokens,
        query_lens=tuple(query_lens),
        lens=tuple(lens),
    )
