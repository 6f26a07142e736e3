"""Steps over paged caches, and their attention in float64, written out plainly."""

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.kernels.operators import AttentionLayout
from engine.kv.cache import KVLayout, KVPages, PagedKVCache
from engine.models.spec import ModelSpec, RopeSpec
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
    spec = ModelSpec(
        vocab_size=1,
        hidden=8,
        layers=2,
        heads=kv_heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        intermediate=8,
        max_position=1,
        norm="rms",
        norm_eps=1e-5,
        positions=RopeSpec(theta=1.0, rotary_dim=head_dim),
        activation="silu",
        gated_mlp=True,
    )
    keys, values = PagedKVCache(spec, num_pages, page_tokens, dtype, layout=KVLayout.WORDS).layer(1)
    for half in (keys, values):
        if half.scales is None:
            half.values.normal_()
        else:
            half.values.random_(-127, 128)
            half.scales.uniform_(0, 1 / 64)
    if dtype == torch.int8:
        keys.values.view(torch.uint8).bitwise_xor_(128)
    return keys, values


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
        page_tokens=choose.choice([16, 16, 48, 64, 512]),
        dtype=dtype,
        cache=choose.choice([dtype, torch.int8]),
        window=choose.choice([None, None, 1, 7, 100, 1000]),
        seed=seed,
    )


def rows_of(k: KVPages, v: KVPages) -> tuple[KVPages, KVPages]:
    """Copies of keys and values of a cache of words as a cache of rows has them."""
    keys = k.values.permute(0, 3, 1, 2, 4).flatten(3)
    values = v.values.permute(0, 2, 4, 1, 3).flatten(1, 2).clone()
    if k.scales is None or v.scales is None:
        return KVPages(keys.clone()), KVPages(values)
    true_keys = (keys.contiguous().view(torch.uint8).int() - 128).to(torch.int8)
    return KVPages(true_keys, k.scales.transpose(1, 2).clone()), KVPages(values, v.scales.transpose(1, 2).clone())


def plain_values(half: KVPages) -> Tensor:
    """The pages of a cache of rows in float64, dequantized."""
    values = half.values.double()
    return values if half.scales is None else values * half.scales.double()[..., None]


def plain_attention(case: Case) -> Tensor:
    """[T, H, D] float64."""
    layout, (keys, values) = case.layout, (plain_values(half) for half in rows_of(case.k, case.v))
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
