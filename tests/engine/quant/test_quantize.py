"""Full weights into 8 and 4 bits: how far off they may be, and what must come out exactly."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from engine.quant.quantize import QUICK, THOROUGH, Int4Rows, Int8Rows, quantize_int4, quantize_int8
from engine.quant.weights import Int4Weight, weight_bytes

SHAPES = st.tuples(st.integers(1, 9), st.sampled_from([32, 64, 96]))
MAGNITUDES = st.sampled_from([1e-38, 1e-20, 1e-3, 1.0, 1e4, 1e30])


@st.composite
def weights(draw: Callable[..., object]) -> Tensor:
    """Rows of very different sizes, some all zero, some of one sign."""
    rows, columns = draw(SHAPES)  # type: ignore[misc]
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))  # type: ignore[arg-type]
    weight = torch.randn(rows, columns, generator=generator)
    for row in weight:
        row *= draw(MAGNITUDES)
        match draw(st.sampled_from(["both", "both", "positive", "negative", "zero", "constant"])):
            case "positive":
                row.abs_()
            case "negative":
                row.abs_().neg_()
            case "zero":
                row.zero_()
            case "constant":
                row.fill_(row[0])
    return weight


@given(weights())
@settings(max_examples=150)
def test_8_bits_are_within_half_a_step_of_every_value(weight: Tensor) -> None:
    quantized = quantize_int8(weight)
    assert int(quantized.values.min()) >= -127
    step = weight.abs().amax(dim=1, keepdim=True) / 127
    negligible = 127 * torch.finfo(torch.float32).tiny
    assert bool(((quantized.dequantize() - weight).abs() <= 0.501 * step + negligible).all())
    assert bool((quantized.scale > 0).all())


@given(weights(), st.sampled_from([QUICK, THOROUGH, (1.0,)]))
@settings(max_examples=150)
def test_4_bits_lose_no_more_than_rounding_over_the_whole_range_would(
    weight: Tensor, shares: tuple[float, ...]
) -> None:
    """The search may clip, but only where the squared error of the group gets smaller by it."""
    quantized = quantize_int4(weight, 32, shares)
    assert bool((quantized.scale > 0).all())
    assert bool(quantized.scale.isfinite().all())
    groups = weight.view(len(weight), -1, 32).double()
    width = groups.amax(2, keepdim=True).clamp(min=0) - groups.amin(2, keepdim=True).clamp(max=0)
    error = quantized.dequantize().view_as(groups).double() - groups
    # Half a step of rounding, half a step for the zero point's own, and the scale's 8 bits.
    bound = 32 * (1.05 * width / 15) ** 2 + 1e-70
    assert bool((error.square().sum(2, keepdim=True) <= bound).all())


def rms_error(weight: Tensor, quantized: Int4Weight) -> float:
    return float((quantized.dequantize() - weight).norm() / weight.norm())


def test_the_search_pays_and_smaller_groups_too() -> None:
    weight = torch.randn(64, 1024, generator=torch.Generator().manual_seed(0))
    plain, quick, thorough = (
        rms_error(weight, quantize_int4(weight, 64, shares)) for shares in ((1.0,), QUICK, THOROUGH)
    )
    assert thorough < quick < plain < 0.1
    by_group = [rms_error(weight, quantize_int4(weight, group)) for group in (32, 64, 128)]
    assert by_group == sorted(by_group)


def test_values_on_the_grid_come_back_exactly() -> None:
    """Whoever quantizes a weight that was quantized before loses nothing."""
    codes = torch.randint(0, 16, (32, 128), generator=torch.Generator().manual_seed(1))
    codes[:, 0::32], codes[:, 1::32] = 0, 15
    weight = ((codes - 5) * 0.25).float()
    assert torch.equal(quantize_int4(weight, 32, THOROUGH).dequantize(), weight)
    eight = torch.randint(-127, 128, (16, 64), generator=torch.Generator().manual_seed(2))
    eight[:, 0] = 127
    assert torch.equal(quantize_int8(eight * 0.5).values, eight.to(torch.int8))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rows_may_come_in_pieces_of_any_type(dtype: torch.dtype) -> None:
    weight = torch.randn(50, 64).to(dtype)
    eight, four = Int8Rows.empty((50, 64)), Int4Rows.empty((50, 64), 32)
    for start in range(0, 50, 7):
        eight.put(start, weight[start : start + 7])
        four.put(start, weight[start : start + 7])
    assert torch.equal(eight.weight.dequantize(), quantize_int8(weight).dequantize())
    assert torch.equal(four.weight.dequantize(), quantize_int4(weight, 32).dequantize())
    assert torch.equal(weight, weight.clone())


def test_scales_of_4_bits_survive_16_bit_files() -> None:
    scale = quantize_int4(torch.randn(8, 64), 32).scale
    assert torch.equal(scale.to(torch.bfloat16).float(), scale)


def test_an_order_only_moves_columns() -> None:
    plain = quantize_int4(torch.randn(4, 64), 32)
    order = torch.randperm(64)
    moved = Int4Weight(plain.packed, plain.scale, plain.zero, order)
    assert torch.equal(moved.dequantize()[:, order], plain.dequantize())


def test_bytes_are_those_of_all_parts() -> None:
    weight = torch.randn(16, 128)
    assert weight_bytes(weight) == 16 * 128 * 4
    assert weight_bytes(quantize_int8(weight)) == 16 * 128 + 16 * 4
    assert weight_bytes(quantize_int4(weight, 64)) == 16 * 64 + 16 * 2 * 5
