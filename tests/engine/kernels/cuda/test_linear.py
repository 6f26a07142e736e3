"""Linear layers in every form against the reference; the form that a GPU's 4-bit kernel wants, decoded by its rules."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from engine.kernels import ReferenceOperators
from engine.kernels.cuda.fused import Fused
from engine.kernels.cuda.linear import (
    INT4_GROUPS,
    DenseProduct,
    Fp8Product,
    Int4Product,
    Int8Product,
    fp8_obstacle,
    int4_obstacle,
    int4pack_scales,
    make_product,
    swap_nibbles,
)
from engine.kernels.cuda.operators import CudaOperators
from engine.quant.quantize import quantize_int4, quantize_int8
from engine.quant.weights import Int4Weight, Int8Weight, Weight
from tests.engine.kernels.cuda.device import DEVICE, FUSED, make_fused, needs_gpu, skip_wrong_float8

CAPABILITY = (9, 0)


@pytest.fixture(params=FUSED)
def fused(request: pytest.FixtureRequest) -> Fused:
    return make_fused(request.param)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def near(found: torch.Tensor, expected: torch.Tensor, share: float) -> bool:
    """Within a share of the spread of what is expected."""
    return float((found.float() - expected.float()).abs().max()) <= share * float(expected.float().std())


@pytest.mark.parametrize("rows", [1, 17, 40])
@pytest.mark.parametrize("gate", [None, "silu"])
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize(("out", "into"), [(64, 96), (70, 20)])
def test_8_bit_integers_are_the_reference_for_any_size(
    fused: Fused, rows: int, gate: str | None, has_bias: bool, out: int, into: int
) -> None:
    """Sizes and row counts that `torch._int_mm` takes on a GPU, and others, which are padded."""
    weight = quantize_int8(random(out, into))
    bias = random(out, seed=1) if has_bias else None
    x = random(rows, into, seed=2)
    found = CudaOperators(torch.float32, fused, CAPABILITY).linear(weight, bias, gate=gate)(x)  # type: ignore[arg-type]
    expected = ReferenceOperators().linear(weight, bias, gate=gate)(x)  # type: ignore[arg-type]
    assert found.shape == expected.shape and found.is_contiguous()
    assert torch.allclose(found, expected, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("form", ["dense", "int8", "int4"])
def test_a_head_is_float32_and_its_rows_are_the_embedding(fused: Fused, form: str) -> None:
    dense = random(72, 64).to(torch.bfloat16)
    weights: dict[str, Weight] = {"dense": dense, "int8": quantize_int8(dense), "int4": quantize_int4(dense, 32)}
    operators, reference = CudaOperators(torch.bfloat16, fused, CAPABILITY, fp8=True), ReferenceOperators()
    x, ids = random(5, 64, seed=1).to(torch.bfloat16), torch.tensor([0, 71, 3], device=DEVICE)
    heads = [each.linear(weights[form], out_dtype=torch.float32) for each in (operators, reference)]
    found, expected = (head(x) for head in heads)
    assert found.dtype == torch.float32 and near(found, expected, 0.02)
    rows = operators.tied_embedding(heads[0], torch.bfloat16)(ids)
    assert torch.equal(rows, reference.tied_embedding(heads[1], torch.bfloat16)(ids))


def test_8_bit_floats_are_near_the_dense_product(fused: Fused) -> None:
    """Three bits of mantissa on both sides leave about 4 % of a random product's spread."""
    skip_wrong_float8(fused)
    weight, bias, x = random(64, 512), random(64, seed=1), random(9, 512, seed=2)
    dtype = torch.bfloat16
    product = make_product(weight.to(dtype), bias.to(dtype), dtype, fused, fp8=True, has_rows=False)
    assert isinstance(product, Fp8Product) and product.values.dtype == torch.float8_e4m3fn
    assert near(product(x.to(dtype), dtype), x @ weight.T + bias, 0.2)
    ids = torch.tensor([5, 0], device=DEVICE)
    assert near(product.rows(ids, torch.float32), weight[ids], 0.3)


def test_what_8_bit_floats_cannot_hold_stays_dense(fused: Fused) -> None:
    for weight, has_rows in ((random(64, 40), False), (random(40, 64), False), (random(64, 64), True)):
        assert isinstance(make_product(weight, None, torch.bfloat16, fused, fp8=True, has_rows=has_rows), DenseProduct)
    assert fp8_obstacle((8, 9)) is None and fp8_obstacle((9, 0)) is None
    assert "8.6" in (fp8_obstacle((8, 6)) or "")


@pytest.mark.parametrize("is_symmetric", [False, True])
def test_the_4_bit_kernel_is_given_the_weight_that_is_meant(is_symmetric: bool) -> None:
    """Its rules: even channels in the high nibble; weight = (value - 8) * s + z with (s, z) [in / group, out, 2]."""
    weight = quantize_int4(random(16, 256), 64)
    if is_symmetric:
        weight = type(weight)(weight.packed, weight.scale, None)
    packed, scales = swap_nibbles(weight.packed), int4pack_scales(weight).float()
    values = torch.stack((packed >> 4, packed & 15), dim=2).flatten(1).float()
    scale, zero = (part.repeat_interleave(64, dim=0).T for part in scales.unbind(2))
    assert scales.shape == (4, 16, 2)
    found = (values - 8) * scale + zero
    # z = (8 - zero) * s has 11 bits and is kept in 8: at most 2^-9 of 8 steps.
    steps = weight.scale.repeat_interleave(64, dim=1)
    assert bool(((found - weight.dequantize()).abs() <= steps * 2**-6).all())


def test_4_bit_weights_that_the_kernel_cannot_read_are_dense_and_told_why(fused: Fused) -> None:
    weight = quantize_int4(random(16, 96), 32)
    assert "shape 16 x 96" in (int4_obstacle(weight, torch.bfloat16) or "")
    assert "float16" in (int4_obstacle(quantize_int4(random(16, 128), 32), torch.float16) or "")
    assert "groups of 16" in (int4_obstacle(quantize_int4(random(16, 128), 16), torch.bfloat16) or "")
    assert int4_obstacle(quantize_int4(random(16, 128), 32), torch.bfloat16) is None
    product = make_product(weight, None, torch.bfloat16, fused, fp8=False, has_rows=False)
    assert isinstance(product, DenseProduct)
    assert torch.equal(product.weight, weight.dequantize().to(torch.bfloat16))


@pytest.mark.parametrize("group", INT4_GROUPS)
def test_torch_itself_takes_the_4_bit_form(group: int) -> None:
    """Its converter and its product, on tensors without contents."""
    with FakeTensorMode():
        weight = Int4Weight(torch.empty(64, 128, dtype=torch.uint8), torch.empty(64, 256 // group), None)
        product = Int4Product.of(weight, torch.empty(64, dtype=torch.bfloat16))
        y = product(torch.empty(3, 256, dtype=torch.bfloat16), torch.bfloat16)
    assert int4_obstacle(weight, torch.bfloat16) is None
    assert (y.shape, y.dtype) == ((3, 64), torch.bfloat16)


@needs_gpu
@pytest.mark.parametrize("rows", [1, 16, 100])
@pytest.mark.parametrize("has_order", [False, True])
def test_4_bit_products_on_the_device(rows: int, has_order: bool) -> None:
    weight = quantize_int4(random(64, 512), 64)
    if has_order:
        order = torch.randperm(512, generator=torch.Generator().manual_seed(0)).to(DEVICE)
        weight = type(weight)(weight.packed, weight.scale, weight.zero, order)
    bias, x = random(64, seed=1).to(torch.bfloat16), random(rows, 512, seed=2).to(torch.bfloat16)
    product = make_product(weight, bias, torch.bfloat16, make_fused("torch"), fp8=False, has_rows=False)
    assert isinstance(product, Int4Product)
    expected = x.float() @ weight.dequantize().T + bias.float()
    assert near(product(x, torch.bfloat16), expected, 0.03)


def test_8_bit_padding_is_not_seen(fused: Fused) -> None:
    weight = Int8Weight(torch.full((3, 5), 127, dtype=torch.int8, device=DEVICE), torch.ones(3, device=DEVICE))
    product = Int8Product.of(weight, None, fused)
    assert product.values.shape == (8, 8) and not product.values[3:].any() and not product.values[:, 5:].any()
    assert product(torch.ones(2, 5, device=DEVICE), torch.float32).tolist() == [[635.0] * 3] * 2
