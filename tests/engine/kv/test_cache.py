"""The device memory of keys and values: its layout, and what it costs before it is used."""

from pathlib import Path

import pytest
import torch

from engine.kv.cache import PagedKVCache, kv_bytes_per_token
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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.int8])
def test_a_page_is_one_contiguous_run_over_all_layers(dtype: torch.dtype) -> None:
    cache = PagedKVCache(SPEC, num_pages=5, page_tokens=8, dtype=dtype)
    assert cache.pages[3].is_contiguous()
    assert cache.page_bytes == 8 * kv_bytes_per_token(SPEC, dtype)
    for half in cache.layer(2):
        half.values[3, 7, 1] = 1
        if half.scales is not None:
            half.scales[3, 7, 1] = 0.5
    assert cache.pages[3, 2].ne(0).any(1).all()
    cache.pages[3, 2] = 0
    assert not cache.pages.any()


def test_int8_keeps_a_scale_for_each_token_and_head_in_the_page() -> None:
    keys, values = PagedKVCache(SPEC, num_pages=5, page_tokens=8, dtype=torch.int8).layer(1)
    assert keys.values.shape == values.values.shape == (5, 8, 2, 16)
    assert keys.scales is not None and keys.scales.shape == (5, 8, 2)
    assert kv_bytes_per_token(SPEC, torch.int8) == 3 * 2 * 2 * (16 + 4)


def test_memory_is_taken_as_pages_are_written_not_at_start() -> None:
    before = resident_bytes()
    num_pages = 2**30 // (16 * kv_bytes_per_token(SPEC, torch.bfloat16))
    cache = PagedKVCache(SPEC, num_pages, page_tokens=16, dtype=torch.bfloat16)
    assert cache.pages.nbytes > 2**30 - cache.page_bytes
    assert resident_bytes() - before < 64 * 2**20
    cache.pages[: num_pages // 4] = 1
    assert resident_bytes() - before > 200 * 2**20
    assert cache.pages[num_pages // 4 + 100 :: 1000].eq(0).all()
