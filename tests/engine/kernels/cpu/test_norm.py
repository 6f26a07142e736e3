"""RMSNorm and LayerNorm agree with float64 for any width, and store the sum that they normalised."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from engine.kernels.cpu.dtypes import DTYPES
from engine.kernels.cpu.library import Library
from engine.kernels.cpu.program import Immediate, StepArrays

EPS = 1e-5
NORMS = ["rms_norm", "layer_norm"]
TOLERANCE = {torch.float32: 4e-6, torch.bfloat16: 2.0**-8}

norms = pytest.mark.parametrize("name", NORMS)
dtypes = pytest.mark.parametrize("dtype", list(DTYPES), ids=["float32", "bfloat16"])


def run(
    library: Library, name: str, x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, total: Tensor | None
) -> Tensor:
    y = torch.full_like(x, torch.nan)
    fields = {"x": x, "residual": residual, "weight": weight, "eps": EPS, "y": y, "total": total}
    fields |= {"width": x.shape[1], "dtype": DTYPES[x.dtype]} | ({"bias": bias} if name == "layer_norm" else {})
    Immediate(library, 2).emit(name, StepArrays(len(x)), **fields)
    return y


def exact(name: str, total: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    total, weight, bias = total.double(), weight.double(), bias.double()
    if name == "rms_norm":
        return F.rms_norm(total, total.shape[1:], weight, EPS)
    return F.layer_norm(total, total.shape[1:], weight, bias, EPS)


@norms
@dtypes
@given(rows=st.integers(1, 5), width=st.integers(1, 200), offset=st.floats(-30, 30), seed=st.integers(0, 2**32))
@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
def test_norms_agree_with_float64(
    library: Library, name: str, dtype: torch.dtype, rows: int, width: int, offset: float, seed: int
) -> None:
    random = torch.Generator().manual_seed(seed)
    x, residual, weight, bias = (
        torch.randn(shape, generator=random).to(dtype) for shape in [(rows, width), (rows, width), (width,), (width,)]
    )
    x = (x + offset).to(dtype)
    total = torch.full_like(x, torch.nan)
    y = run(library, name, x, weight, bias, residual, total)
    assert torch.equal(total, (x.float() + residual.float()).to(dtype))
    expected = exact(name, total, weight, bias)
    # A variance that is small beside the mean's square is lost to the rounding of the mean; float32 can do no better.
    spread = total.double().std(-1, unbiased=False, keepdim=True) if name == "layer_norm" else 1.0
    lost = total.double().abs().amax(-1, keepdim=True) * 2.0**-22 / (spread + EPS**0.5)
    scale = weight.double().abs() + bias.double().abs()
    assert ((y.double() - expected).abs() <= TOLERANCE[dtype] * (expected.abs() + scale) + lost * scale).all()


@norms
@dtypes
def test_without_a_residual_the_input_is_normalised(library: Library, name: str, dtype: torch.dtype) -> None:
    x, weight, bias = torch.randn(3, 100).to(dtype), torch.randn(100).to(dtype), torch.randn(100).to(dtype)
    y = run(library, name, x, weight, bias, None, None)
    zero = run(library, name, x, weight, bias, torch.zeros_like(x), torch.empty_like(x))
    assert torch.equal(y, zero)
    assert torch.allclose(y.double(), exact(name, x, weight, bias), rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@norms
@dtypes
@pytest.mark.parametrize("over", ["x", "residual"])
def test_the_sum_may_replace_what_it_sums(library: Library, name: str, dtype: torch.dtype, over: str) -> None:
    x, residual, weight, bias = (torch.randn(shape).to(dtype) for shape in [(4, 77), (4, 77), (77,), (77,)])
    total = torch.empty_like(x)
    expected = run(library, name, x, weight, bias, residual, total)
    place = x if over == "x" else residual
    assert torch.equal(run(library, name, x, weight, bias, residual, place), expected)
    assert torch.equal(place, total)


@norms
def test_a_rows_result_does_not_depend_on_the_rows_beside_it(library: Library, name: str) -> None:
    x, weight, bias = torch.randn(9, 300), torch.randn(300), torch.randn(300)
    together = run(library, name, x, weight, bias, None, None)
    for row in range(9):
        assert torch.equal(run(library, name, x[row : row + 1], weight, bias, None, None)[0], together[row])


def test_rms_norm_is_that_of_torch(native_library: Library) -> None:
    """bfloat16 rounds once, at the end, as torch does: all but a few results are the same to the last bit."""
    x, weight = torch.randn(50, 1000).bfloat16(), torch.randn(1000).bfloat16()
    y = run(native_library, "rms_norm", x, weight, weight, None, None)
    assert (y == F.rms_norm(x, (1000,), weight, EPS)).double().mean() > 0.999


@norms
def test_nan_stays_in_its_row(library: Library, name: str) -> None:
    x = torch.randn(3, 40)
    x[1, 5] = torch.nan
    y = run(library, name, x, torch.ones(40), torch.zeros(40), None, None)
    assert y[1].isnan().all()
    assert not y[[0, 2]].isnan().any()
