"""Keys and values of a step, gathered from pages into what `scaled_dot_product_attention` takes.

Two shapes of work: `DecodeKeys`, many sequences with one query each, padded to one length; `ChunkKeys`, one sequence
with many queries. Grouped-query attention never copies keys per query head: decodes put a group's heads on SDPA's query
axis, chunks broadcast the keys with stride 0 (torch's `enable_gqa` leaves the fused CPU kernel and is 6 times slower).
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.kernels.operators import AttentionLayout
from engine.kv.cache import KVPages

_SMALL_PAGES = 8
"""Up to this many pages, padding is cheaper than another call."""


def group_decodes(pages: Mapping[int, int]) -> list[list[int]]:
    """Splits rows (row -> pages to gather) so that padding at most doubles what is gathered, beyond a small size."""
    groups: list[list[int]] = []
    longest = 0
    for row in sorted(pages, key=lambda row: -pages[row]):
        if not groups or longest > max(2 * pages[row], _SMALL_PAGES):
            groups.append([])
            longest = pages[row]
        groups[-1].append(row)
    return [sorted(group) for group in groups]


@dataclass(frozen=True, slots=True, eq=False)
class DecodeKeys:
    """Keys that B sequences with one query each attend to, padded to L = columns * page_tokens."""

    rows: Tensor
    """[B] int64 the queries on the flat token axis."""
    pages: Tensor
    """[B * columns] int64 pages to gather, sequence after sequence."""
    bias: Tensor
    """[B, 1, 1, L] added to the scores: -inf where a gathered slot is no key of the sequence or outside its window."""

    @staticmethod
    def of(layout: AttentionLayout, sequences: list[int], window: int | None, dtype: torch.dtype) -> "DecodeKeys":
        device = layout.page_table.device
        index = torch.tensor(sequences, device=device)
        lens = layout.context_lens[index].to(torch.int64).unsqueeze(1)
        first_visible = torch.zeros_like(lens) if window is None else (lens - window).clamp(min=0)
        first_page = first_visible // layout.page_tokens
        num_pages = (lens - 1) // layout.page_tokens + 1 - first_page
        columns = torch.arange(int(num_pages.max()), device=device)
        # Padding repeats a page of the same sequence: what another one left in its pages may not be finite, and a
        # weight of 0 does not hide an infinity.
        page_columns = first_page + torch.where(columns < num_pages, columns, 0)
        pages = layout.page_table[index].to(torch.int64).gather(1, page_columns)
        positions = first_page * layout.page_tokens + torch.arange(len(columns) * layout.page_tokens, device=device)
        visible = (positions >= first_visible) & (positions < lens)
        rows = layout.cu_seq_q[index].to(torch.int64)
        return DecodeKeys(rows, pages.flatten(), _bias(visible, dtype)[:, None, None, :])

    def attend(self, q: Tensor, k: KVPages, v: KVPages, scale: float) -> Tensor:
        """[B, H, D] queries to [B, H, D]."""
        batch, heads, head_dim = q.shape
        kv_heads = k.values.shape[2]
        keys, values = (
            gather(pages, self.pages, q.dtype).view(batch, -1, kv_heads, head_dim).transpose(1, 2) for pages in (k, v)
        )
        grouped = q.reshape(batch, kv_heads, heads // kv_heads, head_dim)
        out = F.scaled_dot_product_attention(grouped, keys, values, attn_mask=self.bias, scale=scale)
        return out.reshape(batch, heads, head_dim)


@dataclass(frozen=True, slots=True, eq=False)
class ChunkKeys:
    """Keys that the consecutive queries of one sequence attend to."""

    rows: slice
    """The queries on the flat token axis."""
    pages: Tensor
    """[N] int64 pages to gather."""
    num_keys: int
    """Keys to use of the gathered slots."""
    bias: Tensor | None
    """[queries, num_keys] added to the scores; None is plain causal attention from the first key on."""

    @staticmethod
    def of(layout: AttentionLayout, sequence: int, window: int | None, dtype: torch.dtype) -> "ChunkKeys":
        device = layout.page_table.device
        start = sum(layout.query_lens[:sequence])
        num_queries, length = layout.query_lens[sequence], layout.lens[sequence]
        first_query = length - num_queries
        first_visible = 0 if window is None else max(0, first_query - window + 1)
        first_page = first_visible // layout.page_tokens
        end_page = (length - 1) // layout.page_tokens + 1
        first_key = first_page * layout.page_tokens
        bias = None
        if first_query > 0 or (window is not None and window < length):
            queries = torch.arange(first_query, length, device=device).unsqueeze(1)
            keys = torch.arange(first_key, length, device=device)
            visible = keys <= queries
            if window is not None:
                visible &= keys > queries - window
            bias = _bias(visible, dtype)
        pages = layout.page_table[sequence, first_page:end_page].to(torch.int64)
        return ChunkKeys(slice(start, start + num_queries), pages, length - first_key, bias)

    def attend(self, q: Tensor, k: KVPages, v: KVPages, scale: float) -> Tensor:
        """[N, H, D] queries to [N, H, D]."""
        num_queries, heads, head_dim = q.shape
        kv_heads = k.values.shape[2]
        keys, values = (
            gather(pages, self.pages, q.dtype)
            .view(-1, kv_heads, head_dim)[: self.num_keys]
            .transpose(0, 1)
            .unsqueeze(1)
            .expand(kv_heads, heads // kv_heads, self.num_keys, head_dim)
            for pages in (k, v)
        )
        grouped = q.view(num_queries, kv_heads, heads // kv_heads, head_dim).permute(1, 2, 0, 3)
        out = F.scaled_dot_product_attention(
            grouped, keys, values, attn_mask=self.bias, is_causal=self.bias is None, scale=scale
        )
        return out.permute(2, 0, 1, 3).reshape(num_queries, heads, head_dim).contiguous()


def gather(pages: KVPages, index: Tensor, dtype: torch.dtype) -> Tensor:
    """Pages by number, [N, page_tokens, kv_heads, head_dim] of `dtype`, dequantized where the cache is int8."""
    values = pages.values.index_select(0, index)
    if pages.scales is None:
        return values
    return (values * pages.scales.index_select(0, index).unsqueeze(-1)).to(dtype)


def _bias(visible: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros_like(visible, dtype=dtype).masked_fill_(~visible, float("-inf"))
