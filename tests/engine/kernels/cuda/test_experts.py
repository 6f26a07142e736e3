"""Mixtures of experts on the CUDA path, which gives what the reference gives."""

import pytest
import torch

from engine.kernels.cuda.fused import TorchFused
from engine.kernels.cuda.operators import CudaOperators
from engine.kernels.operators import Operators, Routing
from engine.kernels.reference import ReferenceOperators
from engine.quant.quantize import quantize_int4, quantize_int8
from engine.quant.weights import Weight
from tests.engine.kernels.cuda.device import DEVICE
from tests.engine.kernels.routing_cases import random_experts, stacked

HIDDEN, WIDTH = 64, 32


def operators(dtype: torch.dtype = torch.bfloat16) -> CudaOperators:
    return CudaOperators(dtype, TorchFused(), (9, 0))


def mixed(
    chosen: Operators, routing: Routing, weights: tuple[Weight, Weight], x: torch.Tensor, logits: torch.Tensor
) -> torch.Tensor:
    inner = chosen.expert_linear(weights[0], len(routing.held), gate="silu")
    outer = chosen.expert_linear(weights[1], len(routing.held), out_dtype=torch.float32)
    return chosen.experts(routing, inner, outer)(x, logits)


@pytest.mark.parametrize("held", [range(6), range(2, 5)], ids=["all", "some"])
@pytest.mark.parametrize("tokens", [1, 3, 40])
def test_a_mixture_is_that_of_the_reference(held: range, tokens: int) -> None:
    inner, outer = (each.to(DEVICE) for each in stacked(random_experts(len(held), HIDDEN, WIDTH, torch.bfloat16)))
    x, logits = torch.randn(tokens, HIDDEN).to(DEVICE, torch.bfloat16), torch.randn(tokens, 6).to(DEVICE)
    routing = Routing(6, 3, True, held)
    y = mixed(operators(), routing, (inner, outer), x, logits)
    expected = mixed(ReferenceOperators(), routing, (inner, outer), x, logits)
    torch.testing.assert_close(y, expected, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("bits", [8, 4])
def test_quantized_experts_are_run_in_bfloat16(bits: int) -> None:
    inner, outer = (each.to(DEVICE) for each in stacked(random_experts(4, HIDDEN, WIDTH)))
    weights = tuple(quantize_int8(each) if bits == 8 else quantize_int4(each, 32) for each in (inner, outer))
    x, logits = torch.randn(9, HIDDEN).to(DEVICE, torch.bfloat16), torch.randn(9, 4).to(DEVICE)
    routing = Routing(4, 2, False, range(4))
    y = mixed(operators(), routing, (weights[0], weights[1]), x, logits)
    dense = tuple(weight.dequantize().to(torch.bfloat16) for weight in weights)
    expected = mixed(ReferenceOperators(), routing, (dense[0], dense[1]), x, logits)
    torch.testing.assert_close(y, expected, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("form", ["fp8", "int8"])
def test_experts_that_cannot_be_of_8_bits_are_warned_of_once(form: str, caplog: pytest.LogCaptureFixture) -> None:
    chosen = CudaOperators(torch.bfloat16, TorchFused(), (9, 0), fp8=form == "fp8")
    weight = torch.randn(4 * 32, 64).bfloat16()
    for _ in range(3):
        chosen.expert_linear(quantize_int8(weight) if form == "int8" else weight, 4)
    (record,) = caplog.records
    assert record.getMessage().startswith("the weights of experts run in bfloat16")
    caplog.clear()
    operators().expert_linear(weight, 4)
    assert not caplog.records


def test_what_has_no_kernel_is_refused_with_what_has() -> None:
    weight = torch.randn(4 * 32, 64)
    with pytest.raises(ValueError, match='choose dtype "bfloat16"'):
        operators(torch.float16).expert_linear(weight.half(), 4)
    with pytest.raises(ValueError, match="experts of 32 x 60 have no CUDA kernel"):
        operators().expert_linear(weight[:, :60].bfloat16(), 4)
