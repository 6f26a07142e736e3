"""Linear layers in every form against the reference."""

import logging

import pytest
import torch

from engine.kernels.cuda.fused import Fused, TorchFused
from engine.kernels.cuda.linear import DenseProduct, Fp8Product, Int8Product, fp8_obstacle, make_product
from engine.kernels.cuda.operators import CudaOperators
from engine.kernels.reference import ReferenceOperators
from engine.quant.quantize import quantize_int4, quantize_int8
from engine.quant.weights import Int8Weight, Weight
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


class Refusing(TorchFused):
    """As a device whose library has no kernel for few rows of many channels."""

    def quantize_rows(
        self, x: torch.Tensor, dtype: torch.dtype, rows: int, columns: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if rows <= 16 and columns >= 512:
            raise RuntimeError("CUDA error: CUBLAS_STATUS_NOT_SUPPORTED\nand more")
        return super().quantize_rows(x, dtype, rows, columns)


def test_8_bit_floats_that_the_device_refuses_stay_dense_with_one_warning(caplog: pytest.LogCaptureFixture) -> None:
    operators = CudaOperators(torch.bfloat16, Refusing(), CAPABILITY, fp8=True)
    weight = random(32, 512).to(torch.bfloat16)
    layers = [operators.linear(weight) for _ in range(3)]
    x = random(1, 512, seed=1).to(torch.bfloat16)
    assert all(near(layer(x), x.float() @ weight.float().T, 0.02) for layer in layers)
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "weights of 32 x 512 stay as they are" in record.getMessage()
    assert record.getMessage().endswith("1 rows fails with CUDA error: CUBLAS_STATUS_NOT_SUPPORTED")
    assert isinstance(operators.linear(random(32, 256).to(torch.bfloat16)).product, Fp8Product)  # type: ignore[attr-defined]


@needs_gpu
@pytest.mark.parametrize("rows", [1, 16, 300])
def test_8_bit_floats_of_many_channels_run_on_the_device_or_stay_dense(rows: int) -> None:
    """So many that cuBLAS has no kernel for few rows on some devices."""
    weight, x = random(4096, 14336), random(rows, 14336, seed=1).to(torch.bfloat16)
    linear = CudaOperators(torch.bfloat16, make_fused("torch"), CAPABILITY, fp8=True).linear(weight.to(torch.bfloat16))
    assert near(linear(x), x.float() @ weight.T, 0.2)


def test_8_bit_padding_is_not_seen(fused: Fused) -> None:
    weight = Int8Weight(torch.full((3, 5), 127, dtype=torch.int8, device=DEVICE), torch.ones(3, device=DEVICE))
    product = Int8Product.of(weight, None, fused)
    assert product.values.shape == (8, 8) and not product.values[3:].any() and not product.values[:, 5:].any()
    assert product(torch.ones(2, 5, device=DEVICE), torch.float32).tolist() == [[635.0] * 3] * 2
