"""4-bit weights on a GPU: the form that its kernel wants, decoded by its rules, and when a weight is unpacked."""

import logging
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from engine.kernels.cuda.fused import TorchFused
from engine.kernels.cuda.int4 import (
    INT4_GROUPS,
    TILE,
    Crossovers,
    Int4Product,
    Timing,
    Unpacking,
    crossover,
    int4_obstacle,
    int4pack_scales,
    pack,
    swap_nibbles,
    tile_order,
)
from engine.kernels.cuda.linear import DenseProduct, make_product
from engine.kernels.cuda.operators import CudaOperators
from engine.quant.quantize import quantize_int4
from engine.quant.weights import Int4Weight
from tests.engine.kernels.cuda.device import DEVICE, FUSED, make_fused, needs_gpu
from tests.engine.kernels.cuda.test_linear import near, random


def shuffled_pack(values: torch.Tensor) -> torch.Tensor:
    """Stands in for the converter: whole tiles, with the values of each in some order."""
    order = torch.randperm(TILE[0] * TILE[1], generator=torch.Generator().manual_seed(5))
    flat = torch.stack((values >> 4, values & 15), dim=2).flatten(1)
    rows, columns = flat.shape
    tiles = flat.view(rows // TILE[0], TILE[0], columns // TILE[1], TILE[1]).transpose(1, 2).flatten(2)[:, :, order]
    packed = tiles[:, :, ::2] | tiles[:, :, 1::2] << 4
    return packed.contiguous().view(torch.int32).view(*packed.shape[:2], 32, 4)


def packed_product(weight: Int4Weight, pack: Callable[[torch.Tensor], torch.Tensor]) -> Int4Product:
    return Int4Product(pack(swap_nibbles(weight.packed)), int4pack_scales(weight), weight.group, weight.order, None)


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


@pytest.mark.parametrize("name", FUSED)
def test_4_bit_weights_that_the_kernel_cannot_read_are_dense_and_told_why(name: str) -> None:
    weight = quantize_int4(random(16, 96), 32)
    assert "shape 16 x 96" in (int4_obstacle(weight, torch.bfloat16) or "")
    assert "float16" in (int4_obstacle(quantize_int4(random(16, 128), 32), torch.float16) or "")
    assert "groups of 16" in (int4_obstacle(quantize_int4(random(16, 128), 16), torch.bfloat16) or "")
    assert int4_obstacle(quantize_int4(random(16, 128), 32), torch.bfloat16) is None
    product = make_product(weight, None, torch.bfloat16, make_fused(name), fp8=False, has_rows=False)
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


@pytest.mark.parametrize("group", [32, 256])
@pytest.mark.parametrize("is_symmetric", [False, True])
def test_an_unpacked_weight_is_the_weight(group: int, is_symmetric: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever the converter puts a tile's values, and however many rows are unpacked at a time."""
    weight = quantize_int4(random(24, 512).cpu(), group)
    if is_symmetric:
        weight = Int4Weight(weight.packed, weight.scale, None)
    product, order = packed_product(weight, shuffled_pack), tile_order(shuffled_pack, torch.device("cpu"))
    steps = weight.scale.repeat_interleave(group, dim=1)
    assert bool(((product.unpacked(range(24), order).float() - weight.dequantize()).abs() <= steps * 2**-3).all())
    x = torch.eye(512, dtype=torch.bfloat16)
    whole = product.multiply_unpacked(x, order)
    monkeypatch.setattr("engine.kernels.cuda.int4._UNPACKED_VALUES", 16 * 512)
    assert torch.equal(product.multiply_unpacked(x, order), whole)
    assert torch.equal(whole.T, product.unpacked(range(24), order))


def test_many_rows_are_multiplied_unpacked_in_the_order_of_the_groups() -> None:
    weight = quantize_int4(random(16, 256).cpu(), 64)
    order = torch.randperm(256, generator=torch.Generator().manual_seed(0))
    weight = Int4Weight(weight.packed, weight.scale, weight.zero, order)
    unpacking = Unpacking(tile_order(shuffled_pack, torch.device("cpu")), from_rows=7)
    product = replace(packed_product(weight, shuffled_pack), unpacking=unpacking)
    x = random(7, 256, seed=1).cpu().to(torch.bfloat16)
    assert near(product(x, torch.bfloat16), x.float() @ weight.dequantize().T, 0.03)


@pytest.mark.parametrize(
    ("timings", "rows"),
    [
        ([(16, 1.0, 3.0), (64, 2.0, 3.0), (256, 5.0, 3.0), (1024, 9.0, 4.0)], 256),
        ([(16, 4.0, 3.0), (64, 4.0, 3.0)], 16),
        ([(16, 1.0, 3.0), (64, 2.0, 3.0)], None),
        ([(16, 3.1, 3.0), (64, 2.0, 3.0), (256, 5.0, 3.0)], 256),
        ([(256, 5.0, 3.0), (16, 1.0, 3.0)], 256),
    ],
    ids=["later", "always", "never", "a lucky run is no crossover", "in any order"],
)
def test_unpacking_begins_where_it_stays_faster(timings: list[tuple[int, float, float]], rows: int | None) -> None:
    assert crossover(Timing(*timing) for timing in timings) == rows


def test_each_shape_is_measured_once(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    monkeypatch.setattr(Int4Product, "multiply_packed", lambda self, x: calls.append("packed") or len(x))
    monkeypatch.setattr(Int4Product, "multiply_unpacked", lambda self, x, order: calls.append("unpacked") or 100)
    crossovers = Crossovers(lambda work: float(work()), shuffled_pack)  # type: ignore[arg-type]
    products = [packed_product(quantize_int4(random(16, 256).cpu(), 64), shuffled_pack) for _ in range(2)]
    other = packed_product(quantize_int4(random(8, 256).cpu(), 64), shuffled_pack)
    with caplog.at_level(logging.INFO):
        found = [crossovers.unpacking(product) for product in (*products, other)]
    assert [each.from_rows for each in found if each] == [128] * 3
    assert len(calls) == 2 * 2 * 7
    assert [record.getMessage() for record in caplog.records] == [
        "4-bit weights of 16 x 256 are unpacked for a dense product in steps of 128 tokens and more",
        "4-bit weights of 8 x 256 are unpacked for a dense product in steps of 128 tokens and more",
    ]


def test_weights_that_are_made_dense_are_warned_of_once(caplog: pytest.LogCaptureFixture) -> None:
    operators = CudaOperators(torch.float16, TorchFused(), (9, 0))
    for _ in range(3):
        operators.linear(quantize_int4(random(16, 128), 32))
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "made dense" in record.getMessage() and "float16, and it knows bfloat16 alone" in record.getMessage()


@needs_gpu
def test_the_order_that_is_learned_is_that_of_the_device() -> None:
    weight = quantize_int4(random(64, 512), 64)
    product = packed_product(weight, pack)
    x = random(100, 512, seed=1).to(torch.bfloat16)
    assert near(product.multiply_unpacked(x, tile_order(pack, DEVICE)), product.multiply_packed(x), 0.03)
