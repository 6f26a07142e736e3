"""The device memory of keys and values: its layout, and what it costs before it is used."""

from pathlib import Path

import torch

from engine.kv.cache import PagedKVCache
from engine.models.spec import ModelSpec, RopeSpec

SPEC = ModelSpec(
    vocab_size=10,
    hidden=64,
    layers=3,
    heads=4,
    kv_heads=2,
    head_dim=16,
    intermediate=8,
    max_position=64,
    norm="rms",
    norm_eps=1e-5,
    positions=RopeSpec(theta=10000.0, rotary_dim=16),
    activation="silu",
    gated_mlp=True,
)


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def test_a_page_is_one_contiguous_run_over_all_layers() -> None:
    cache = PagedKVCache(SPEC, num_pages=5, page_tokens=8, dtype=torch.bfloat16)
    assert cache.pages[3].is_contiguous()
    assert cache.page_bytes == 8 * SPEC.kv_bytes_per_token(2)
    keys, values = cache.layer(2)
    keys[3, 7, 1] = 1.0
    values[3, 7, 1] = 2.0
    assert cache.pages[3, 2, 0, 7, 1].eq(1.0).all()
    assert cache.pages[3, 2, 1, 7, 1].eq(2.0).all()
    assert cache.pages.ne(0).sum() == 2 * 16


def test_memory_is_taken_as_pages_are_written_not_at_start() -> None:
    before = resident_bytes()
    num_pages = 2**30 // (16 * SPEC.kv_bytes_per_token(2))
    cache = PagedKVCache(SPEC, num_pages, page_tokens=16, dtype=torch.bfloat16)
    assert cache.pages.nbytes > 2**30 - cache.page_bytes
    assert resident_bytes() - before < 64 * 2**20
    cache.pages[: num_pages // 4] = 1.0
    assert resident_bytes() - before > 200 * 2**20
    assert cache.pages[num_pages // 4 :: 1000].eq(0).all()
