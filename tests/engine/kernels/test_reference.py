"""The torch operators against arithmetic written out plainly in float64."""

import math
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.kernels.operators import AttentionLayout, QKNorm
from engine.kernels.paged_sdpa import group_decodes
from engine.kernels.reference import ReferenceOperators, quantize_rows, rotate
from engine.kv.cache import KVPages
from engine.quant.weights import Int4Weight, Int8Weight, Weight
from tests.engine.kernels import layouts

PAGE_TOKENS = 4
OPERATORS = ReferenceOperators()


def make_layout(query_lens: Sequence[int], lens: Sequence[int], seed: int = 0) -> AttentionLayout:
    return layouts.make_layout(query_lens, lens, PAGE_TOKENS, seed=seed)


def plain_attention(
    q: torch.Tensor, k: KVPages, v: KVPages, layout: AttentionLayout, window: int | None
) -> torch.Tensor:
    """One query and one head at a time."""
    out = torch.zeros_like(q, dtype=torch.float64)
    group = q.shape[1] // k.values.shape[2]
    token = 0
    for row, queries in enumerate(layout.query_lens):
        pages = layout.page_table[row].long()
        keys, values = (plain_values(half)[pages].flatten(0, 1) for half in (k, v))
        for position in range(layout.lens[row] - queries, layout.lens[row]):
            first = 0 if window is None else max(0, position - window + 1)
            for head in range(q.shape[1]):
                seen = slice(first, position + 1)
                scores = keys[seen, head // group] @ q[token, head].double() * 0.3
                out[token, head] = scores.softmax(0) @ values[seen, head // group]
            token += 1
    return out


def plain_values(half: KVPages) -> torch.Tensor:
    values = half.values.double()
    return values if half.scales is None else values * half.scales.double()[..., None]


def random_cache(num_pages: int, kv_heads: int, head_dim: int, int8: bool = False) -> tuple[KVPages, KVPages]:
    """Strided views of one layer out of three, as the page-major cache gives them."""
    shape = (num_pages, 3, 2, PAGE_TOKENS, kv_heads, head_dim)
    if not int8:
        pages = torch.randn(shape)
        return KVPages(pages[:, 1, 0]), KVPages(pages[:, 1, 1])
    pages = torch.randint(-127, 128, shape, dtype=torch.int8)
    scales = torch.rand(shape[:-1]) / 64
    return KVPages(pages[:, 1, 0], scales[:, 1, 0]), KVPages(pages[:, 1, 1], scales[:, 1, 1])


@settings(max_examples=40)
@given(
    data=st.data(),
    window=st.sampled_from([None, 1, 3, 9, 100]),
    heads=st.sampled_from([(4, 4), (4, 2), (6, 1)]),
    int8=st.booleans(),
)
def test_paged_attention_is_attention(
    data: st.DataObject, window: int | None, heads: tuple[int, int], int8: bool
) -> None:
    lens = data.draw(st.lists(st.integers(1, 45), min_size=1, max_size=6))
    query_lens = [data.draw(st.one_of(st.just(1), st.integers(1, length))) for length in lens]
    torch.manual_seed(0)
    layout = make_layout(query_lens, lens, seed=len(lens))
    k, v = random_cache(int(layout.page_table.max()) + 60, heads[1], 8, int8)
    q = torch.randn(sum(query_lens), heads[0], 8)
    found = OPERATORS.attention(layout).attend(q, k, v, scale=0.3, window=window)
    assert found.is_contiguous()
    torch.testing.assert_close(found.double(), plain_attention(q, k, v, layout, window), atol=1e-5, rtol=0)


def test_values_that_are_not_finite_stay_with_their_own_sequence() -> None:
    """Page 0 is what unused table entries name; its owner's NaN must not reach the sequences beside it."""
    layout = make_layout([1, 1, 1, 3], [2, 30, 5, 7])
    layout.page_table[layout.page_table == 0] = 50
    layout.page_table[0, 0] = 0
    layout.page_table[2, 2:] = 0
    k, v = random_cache(60, 2, 8)
    k.values[0], v.values[0] = math.nan, math.inf
    out = OPERATORS.attention(layout).attend(torch.randn(6, 4, 8), k, v, scale=0.3, window=None)
    assert not out[0].isfinite().all()
    assert out[1:].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("norm", [False, True])
def test_write_stores_rotated_keys_and_plain_values_at_their_slots(dtype: torch.dtype, norm: bool) -> None:
    layout = make_layout([3, 1], [3, 6])
    k_pages, v_pages = (half.values.to(dtype) for half in random_cache(8, 2, 8))
    before = k_pages.clone()
    qkv = torch.randn(4, (4 + 2 * 2) * 8).to(dtype)
    heads = qkv.clone().view(4, 8, 8)
    angles = torch.rand(4, 3)
    cos_sin = torch.cat((angles.cos(), angles.sin()), dim=1)
    weights = torch.rand(2, 8).to(dtype)
    qk_norm = QKNorm(weights[0], weights[1], 1e-3) if norm else None
    q = OPERATORS.attention(layout).write(qkv, cos_sin, KVPages(k_pages), KVPages(v_pages), qk_norm)
    expected = heads.float()
    if norm:
        weight = weights.float()[[0, 0, 0, 0, 1, 1, 0, 0]]
        expected = expected / (expected.pow(2).mean(-1, keepdim=True) + 1e-3).sqrt() * weight
    expected = rotate(expected, cos_sin).to(dtype)
    torch.testing.assert_close(q, expected[:, :4])
    for token, slot in enumerate(layout.slots.tolist()):
        torch.testing.assert_close(k_pages[slot // PAGE_TOKENS, slot % PAGE_TOKENS], expected[token, 4:6])
        torch.testing.assert_close(v_pages[slot // PAGE_TOKENS, slot % PAGE_TOKENS], heads[token, 6:])
    written = torch.zeros(8 * PAGE_TOKENS, dtype=torch.bool)
    written[layout.slots] = True
    assert torch.equal(k_pages.flatten(0, 1)[~written], before.flatten(0, 1)[~written])


def test_an_int8_cache_holds_each_head_to_half_a_step_of_its_own_scale() -> None:
    layout = make_layout([3, 1], [3, 6])
    k, v = random_cache(8, 2, 8, int8=True)
    qkv = torch.randn(4, 8 * 8) * torch.tensor([[1.0], [100.0], [1e-3], [0.0]])
    OPERATORS.attention(layout).write(qkv, None, k, v)
    heads = qkv.view(4, 8, 8)
    for half, written in ((k, heads[:, 4:6]), (v, heads[:, 6:])):
        pages, offsets = layout.slots // PAGE_TOKENS, layout.slots % PAGE_TOKENS
        assert half.scales is not None
        scales = half.scales[pages, offsets]
        torch.testing.assert_close(scales, written.abs().amax(-1) / 127)
        error = (plain_values(half)[pages, offsets] - written).abs()
        assert bool((error <= 0.501 * scales[..., None]).all())


def test_rotation_turns_pairs_and_leaves_the_rest() -> None:
    x = torch.randn(1, 2, 6)
    quarter_turn = torch.tensor([[0.0, 0.0, 1.0, 1.0]])
    turned = rotate(x, quarter_turn)
    expected = torch.cat((-x[..., 2:4], x[..., :2], x[..., 4:]), dim=-1)
    torch.testing.assert_close(turned, expected)


def test_norms_return_the_sum_as_next_residual() -> None:
    x, residual, weight, bias = torch.randn(3, 16), torch.randn(3, 16), torch.randn(16), torch.randn(16)
    total = (x + residual).double()
    normed, summed = OPERATORS.rms_norm(x, weight, 1e-3, residual)
    expected = total / (total.pow(2).mean(-1, keepdim=True) + 1e-3).sqrt() * weight
    torch.testing.assert_close(summed, x + residual)
    torch.testing.assert_close(normed.double(), expected, atol=1e-5, rtol=0)
    normed, summed = OPERATORS.layer_norm(x, weight, bias, 1e-3, residual)
    centred = total - total.mean(-1, keepdim=True)
    expected = centred / (centred.pow(2).mean(-1, keepdim=True) + 1e-3).sqrt() * weight + bias
    torch.testing.assert_close(summed, x + residual)
    torch.testing.assert_close(normed.double(), expected, atol=1e-5, rtol=0)


def test_rms_norm_of_large_half_precision_values_does_not_overflow() -> None:
    normed, _ = OPERATORS.rms_norm(torch.full((1, 64), 300.0, dtype=torch.float16), torch.ones(64).half(), 1e-5)
    torch.testing.assert_close(normed, torch.ones(1, 64).half())


def test_activations_are_what_they_are_called() -> None:
    x = torch.randn(3, 10).double()
    torch.testing.assert_close(OPERATORS.activate(x, "silu"), x / (1 + (-x).exp()))
    torch.testing.assert_close(OPERATORS.activate(x, "gelu"), x * (1 + torch.erf(x / math.sqrt(2))) / 2)
    torch.testing.assert_close(OPERATORS.activate(x, "relu"), x.clamp(min=0))


def random_int4(rows: int, columns: int, group: int, *, zero: bool, order: bool) -> Int4Weight:
    return Int4Weight(
        packed=torch.randint(0, 256, (rows, columns // 2), dtype=torch.uint8),
        scale=torch.rand(rows, columns // group) / 8,
        zero=torch.randint(0, 16, (rows, columns // group), dtype=torch.uint8) if zero else None,
        order=torch.randperm(columns) if order else None,
    )


KINDS = ("dense", "int8", "int4", "int4 asymmetric, reordered", "int4a8")


def weights(rows: int, columns: int) -> dict[str, Weight]:
    return {
        "dense": torch.randn(rows, columns),
        "int8": Int8Weight(torch.randint(-127, 128, (rows, columns), dtype=torch.int8), torch.rand(rows) / 64),
        "int4": random_int4(rows, columns, 8, zero=False, order=False),
        "int4 asymmetric, reordered": random_int4(rows, columns, 4, zero=True, order=True),
        "int4a8": replace(random_int4(rows, columns, 4, zero=True, order=True), int8_activations=True),
    }


@pytest.mark.parametrize("kind", KINDS)
def test_linear_is_a_product_with_the_weight_as_defined(kind: str) -> None:
    weight = weights(10, 16)[kind]
    dense = (weight if isinstance(weight, torch.Tensor) else weight.dequantize()).double()
    x, bias = torch.randn(3, 16), torch.randn(10)
    seen = x.double()
    if kind == "int8":
        values, scale = quantize_rows(x)
        seen = values.double() * scale.double()
    if isinstance(weight, Int4Weight) and weight.int8_activations:
        assert weight.order is not None
        for group in weight.order.view(-1, weight.group):
            values, scale = quantize_rows(x[:, group])
            seen[:, group] = values.double() * scale.double()
    expected = seen @ dense.T + bias.double()
    torch.testing.assert_close(OPERATORS.linear(weight, bias)(x).double(), expected, atol=1e-4, rtol=1e-5)
    gate, up = expected.chunk(2, dim=-1)
    gated = OPERATORS.linear(weight, bias, gate="silu")(x)
    torch.testing.assert_close(gated.double(), gate / (1 + (-gate).exp()) * up, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_tied_embedding_gives_rows_of_the_head(kind: str) -> None:
    weight = weights(10, 16)[kind]
    dense = weight if isinstance(weight, torch.Tensor) else weight.dequantize()
    ids = torch.tensor([7, 0, 7, 9])
    head = OPERATORS.linear(weight, out_dtype=torch.float32)
    found = OPERATORS.tied_embedding(head, torch.bfloat16)(ids)
    torch.testing.assert_close(found, dense[ids].to(torch.bfloat16))


def test_out_dtype_is_the_dtype_of_the_result() -> None:
    weight = torch.randn(4, 8, dtype=torch.bfloat16)
    x = torch.randn(2, 8, dtype=torch.bfloat16)
    assert OPERATORS.linear(weight)(x).dtype == torch.bfloat16
    assert OPERATORS.linear(weight, out_dtype=torch.float32)(x).dtype == torch.float32


def test_quantized_rows_round_half_to_even_and_zero_rows_stay_zero() -> None:
    values, scale = quantize_rows(torch.tensor([[127.0, 0.5, 1.5, -2.5], [0.0, 0.0, 0.0, 0.0]]))
    assert values.tolist() == [[127, 0, 2, -2], [0, 0, 0, 0]]
    assert scale.tolist() == [[1.0], [0.0]]


@given(st.lists(st.integers(1, 500), min_size=1, max_size=40))
def test_decode_groups_hold_every_row_and_little_padding(pages: list[int]) -> None:
    groups = group_decodes(dict(enumerate(pages)))
    assert sorted(row for group in groups for row in group) == list(range(len(pages)))
    for group in groups:
        longest = max(pages[row] for row in group)
        assert longest <= 8 or 2 * min(pages[row] for row in group) >= longest
