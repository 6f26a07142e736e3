"""Steps over paged caches, and their attention in float64, written out plainly."""

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.kernels.operators import AttentionLayout
from engine.kv.cache import KVPages
from tests.engine.kernels import layouts

SPARE_PAGES = 3
SPARE_COLUMNS = 2


def make_layout(query_lens: Sequence[int], lens: Sequence[int], page_tokens: int, seed: int = 0) -> AttentionLayout:
    """With pages that belong to no sequence, and a table wider than any sequence needs."""
    return layouts.make_layout(
        query_lens, lens, page_tokens, seed=seed, spare_pages=SPARE_PAGES, spare_columns=SPARE_COLUMNS
    )


def random_cache(
    num_pages: int, page_tokens: int, kv_heads: int, head_dim: int, dtype: torch.dtype
) -> tuple[KVPages, KVPages]:
    """One layer out of two, strided as the page-major cache has it."""
    values = page_tokens * kv_heads * head_dim * dtype.itemsize
    half = values + (page_tokens * kv_heads * 4 if dtype == torch.int8 else 0)
    memory = torch.zeros(num_pages, 2, 2, half, dtype=torch.uint8)
    keys, values_ = (_random_half(memory[:, 1, i], values, (page_tokens, kv_heads, head_dim), dtype) for i in (0, 1))
    return keys, values_


def _random_half(half: Tensor, value_bytes: int, shape: tuple[int, int, int], dtype: torch.dtype) -> KVPages:
    values = half[:, :value_bytes].view(dtype).unflatten(1, shape)
    if dtype != torch.int8:
        return KVPages(values.copy_(torch.randn(values.shape)))
    values.copy_(torch.randint(-127, 128, values.shape, dtype=torch.int8))
    scales = half[:, value_bytes:].view(torch.float32).unflatten(1, shape[:2])
    return KVPages(values, scales.copy_(torch.rand(scales.shape) / 64))


@dataclass(frozen=True)
class Case:
    """A step and its cache."""

    layout: AttentionLayout
    q: Tensor
    k: KVPages
    v: KVPages
    window: int | None = None

    @property
    def scale(self) -> float:
        return float(self.q.shape[2] ** -0.5)


def make_case(
    query_lens: Sequence[int],
    lens: Sequence[int],
    *,
    heads: tuple[int, int] = (4, 2),
    head_dim: int = 64,
    page_tokens: int = 16,
    dtype: torch.dtype = torch.bfloat16,
    cache: torch.dtype | None = None,
    window: int | None = None,
    seed: int = 0,
) -> Case:
    """Queries are a strided view, as `write` gives them."""
    torch.manual_seed(seed)
    layout = make_layout(query_lens, lens, page_tokens, seed)
    num_pages = sum(-(-length // page_tokens) for length in lens) + SPARE_PAGES
    k, v = random_cache(num_pages, page_tokens, heads[1], head_dim, cache or dtype)
    rows = torch.randn(sum(query_lens), (heads[0] + 2 * heads[1]) * head_dim).to(dtype)
    return Case(layout, rows[:, : heads[0] * head_dim].unflatten(1, (heads[0], head_dim)), k, v, window)


def random_case(seed: int) -> Case:
    """Chunks, decodes and both, in every shape that the kernels take."""
    choose = random.Random(seed)
    count = choose.randint(1, 5)
    lens = [
        choose.choice([choose.randint(1, 40), choose.randint(1, 700), choose.randint(1, 2000)]) for _ in range(count)
    ]
    query_lens = [choose.choice([1, 1, choose.randint(1, 5), choose.randint(1, 150)]) for _ in lens]
    dtype = choose.choice([torch.float32, torch.bfloat16])
    group, kv_heads = choose.choice([1, 2, 3, 4, 7, 16]), choose.randint(1, 3)
    return make_case(
        [min(queries, length) for queries, length in zip(query_lens, lens, strict=True)],
        lens,
        heads=(group * kv_heads, kv_heads),
        head_dim=choose.choice([8, 24, 64, 80, 96, 128, 256]),
        page_tokens=choose.choice([1, 3, 16, 64, 512]),
        dtype=dtype,
        cache=choose.choice([dtype, torch.int8]),
        window=choose.choice([None, None, 1, 7, 100, 1000]),
        seed=seed,
    )


def plain_values(half: KVPages) -> Tensor:
    """The pages in float64, dequantized."""
    values = half.values.double()
    return values if half.scales is None else values * half.scales.double()[..., None]


def plain_attention(case: Case) -> Tensor:
    """[T, H, D] float64."""
    layout, (keys, values) = case.layout, (plain_values(half) for half in (case.k, case.v))
    group = case.q.shape[1] // keys.shape[2]
    out = []
    for row, queries in enumerate(layout.query_lens):
        length = layout.lens[row]
        pages = layout.page_table[row, : -(-length // layout.page_tokens)].long()
        own_keys, own_values = (
            half[pages].flatten(0, 1)[:length].repeat_interleave(group, dim=1) for half in (keys, values)
        )
        start = int(layout.cu_seq_q[row])
        q = case.q[start : start + queries].double()
        at = torch.arange(length - queries, length).unsqueeze(1)
        hidden = torch.arange(length) > at
        if case.window is not None:
            hidden |= torch.arange(length) <= at - case.window
        scores = torch.einsum("qhd,khd->hqk", q, own_keys) * case.scale
        out.append(torch.einsum("hqk,khd->qhd", scores.masked_fill(hidden, float("-inf")).softmax(-1), own_values))
    return torch.cat(out)
