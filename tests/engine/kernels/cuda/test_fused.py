"""The fused operators against arithmetic written out in float64, in torch and in Triton."""

import pytest
import torch

from engine.kernels.cuda.fused import LARGEST, Fused
from engine.kernels.operators import QKNorm
from engine.kernels.reference import quantize_rows
from engine.kv.cache import KVPages
from engine.models.spec import Activation
from tests.engine.kernels.cuda.device import DEVICE, FUSED, make_fused, skip_wrong_float8
from tests.engine.kernels.cuda.layouts import make_layout

EPS = 1e-5
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2**-6, torch.float16: 2**-9}
"""Triton's interpreter cuts bfloat16 off where a GPU rounds it: a whole unit, in a sum and again in the result."""
WIDTHS = (8, 24, 100)


@pytest.fixture(params=FUSED)
def fused(request: pytest.FixtureRequest) -> Fused:
    return make_fused(request.param)


def close(found: torch.Tensor, expected: torch.Tensor) -> bool:
    error = (found.double() - expected.double()).abs()
    return bool((error <= TOLERANCE[found.dtype] * (1 + expected.double().abs())).all())


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("has_residual", [False, True])
def test_norms_are_those_of_the_sum_and_return_it(
    fused: Fused, dtype: torch.dtype, width: int, has_residual: bool
) -> None:
    x = random(3, width, dtype=dtype)
    weight, bias = random(width, dtype=dtype, seed=1), random(width, dtype=dtype, seed=2)
    residual = random(3, width, dtype=dtype, seed=3) if has_residual else None
    total = x if residual is None else x + residual
    wide = total.double()
    normed, found_total = fused.rms_norm(x, weight, EPS, residual)
    assert close(normed, wide * (wide.square().mean(1, keepdim=True) + EPS).rsqrt() * weight.double())
    assert close(found_total, total)
    normed, found_total = fused.layer_norm(x, weight, bias, EPS, residual)
    assert close(normed, torch.nn.functional.layer_norm(wide, (width,), weight.double(), bias.double(), EPS))
    assert close(found_total, total)


@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh", "relu"])
@pytest.mark.parametrize("width", [24, 1100])
def test_gates(fused: Fused, activation: Activation, width: int) -> None:
    x = random(3, 2 * width) * 3
    gate, up = x.double().chunk(2, dim=1)
    expected = {
        "silu": gate * gate.sigmoid(),
        "gelu": torch.nn.functional.gelu(gate),
        "gelu_tanh": torch.nn.functional.gelu(gate, approximate="tanh"),
        "relu": gate.clamp(min=0),
    }
    assert close(fused.gate(x, activation), expected[activation] * up)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "rotary_dim"),
    [(4, 2, 16, 16), (9, 3, 64, 64), (2, 2, 12, 12), (4, 1, 16, 8), (3, 3, 8, None)],
)
@pytest.mark.parametrize("has_norm", [False, True])
def test_heads_are_turned_and_keys_and_values_stored(
    fused: Fused, heads: int, kv_heads: int, head_dim: int, rotary_dim: int | None, has_norm: bool
) -> None:
    """Pages of one layer among others: what lies between them is not touched."""
    layout = make_layout((3, 1), (7, 5), page_tokens=4)
    qkv = random(4, (heads + 2 * kv_heads) * head_dim)
    norm = QKNorm(random(head_dim, seed=1), random(head_dim, seed=2), EPS) if has_norm else None
    cos_sin = None if rotary_dim is None else random(4, rotary_dim, seed=3)
    memory = torch.zeros(8, 3, 2, 4, kv_heads, head_dim, device=DEVICE)
    k, v = KVPages(memory[:, 1, 0]), KVPages(memory[:, 1, 1])
    queries, keys, values = qkv.double().view(4, -1, head_dim).split((heads, kv_heads, kv_heads), dim=1)

    found = fused.write(qkv.clone(), cos_sin, k, v, norm, layout)

    assert close(found, turned(queries, cos_sin, None if norm is None else norm.q_weight))
    expected = torch.zeros_like(memory)
    for token, slot in enumerate(layout.slots.tolist()):
        expected[slot // 4, 1, 0, slot % 4] = turned(keys, cos_sin, None if norm is None else norm.k_weight)[token]
        expected[slot // 4, 1, 1, slot % 4] = values[token]
    assert close(memory, expected)


def turned(heads: torch.Tensor, cos_sin: torch.Tensor | None, weight: torch.Tensor | None) -> torch.Tensor:
    """Pair by pair, in float64."""
    out = heads.clone()
    if weight is not None:
        out = out * (out.square().mean(2, keepdim=True) + EPS).rsqrt() * weight.double()
    if cos_sin is None:
        return out
    half = cos_sin.shape[1] // 2
    plain = out.clone()
    for i in range(half):
        cos, sin = cos_sin[:, None, i].double(), cos_sin[:, None, half + i].double()
        out[:, :, i] = plain[:, :, i] * cos - plain[:, :, half + i] * sin
        out[:, :, half + i] = plain[:, :, half + i] * cos + plain[:, :, i] * sin
    return out


@pytest.mark.parametrize("width", [24, 5000])
def test_int8_rows_are_those_of_the_reference(fused: Fused, width: int) -> None:
    x = random(3, width, dtype=torch.bfloat16)
    x[1] = 0
    columns = width + 8
    values, scale = fused.quantize_rows(x, torch.int8, 5, columns)
    expected, expected_scale = quantize_rows(x)
    assert values.shape == (5, columns) and scale.shape == (5, 1)
    assert torch.equal(values[:3, :width], expected)
    assert not values[:3, width:].any()
    assert torch.allclose(scale[:3], expected_scale, rtol=1e-6) and scale[1] == 0


def test_fp8_rows_are_within_its_rounding(fused: Fused) -> None:
    skip_wrong_float8(fused)
    x = random(4, 96) * torch.tensor([[1e-3], [1.0], [1e3], [0.0]], device=DEVICE)
    values, scale = fused.quantize_rows(x, torch.float8_e4m3fn, 4, 96)
    assert values.dtype == torch.float8_e4m3fn
    assert torch.allclose(values.float().abs().amax(1)[:3], torch.tensor(LARGEST[values.dtype], device=DEVICE))
    # Three bits of mantissa: half a unit in the last place is 2^-4 of the value; near zero, 2^-10 of the scale.
    error = (values.float() * scale - x).abs()
    assert bool((error <= 2**-4 * x.abs() + 2**-10 * scale + 1e-12).all())


@pytest.mark.parametrize("has_bias", [False, True])
def test_sums_are_scaled_and_rounded_once(fused: Fused, has_bias: bool) -> None:
    sums = torch.randint(-(2**20), 2**20, (3, 1100), dtype=torch.int32, device=DEVICE)
    rows, columns = random(3, 1).abs(), random(1100, seed=1).abs()
    bias = random(1100, seed=2) if has_bias else None
    expected = sums.double() * rows.double() * columns.double() + (0 if bias is None else bias.double())
    assert close(fused.scale_sums(sums, rows, columns, bias, torch.float32), expected)
    assert close(fused.scale_sums(sums, rows, columns, bias, torch.bfloat16), expected)
