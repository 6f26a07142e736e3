"""Mixtures of experts in torch: the table, and the way through it against pair after pair in float64."""

import pytest
import torch
from hypothesis import given, settings

from engine.kernels.operators import Routing
from engine.kernels.reference import ReferenceOperators
from engine.kernels.routing import route
from engine.quant.quantize import quantize_int4, quantize_int8
from engine.quant.weights import Int4Weight, Int8Weight, Weight, rows_of
from tests.engine.kernels.routing_cases import Case, cases, check_table, mixture, random_experts, stacked

HIDDEN, WIDTH = 16, 24
OPERATORS = ReferenceOperators()


def mixed(routing: Routing, inner: Weight, outer: Weight, x: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    count = len(routing.held)
    first = OPERATORS.expert_linear(inner, count, gate="silu")
    second = OPERATORS.expert_linear(outer, count, out_dtype=torch.float32)
    return OPERATORS.experts(routing, first, second)(x, logits)


@settings(max_examples=150)
@given(case=cases())
def test_every_pair_has_a_row_by_expert_and_then_by_token(case: Case) -> None:
    table = route(case.logits(), case.routing)
    check_table(case, table.weights, table.rows, table.offsets, table.sources, elsewhere=None)


@settings(max_examples=40)
@given(case=cases())
def test_a_mixture_is_the_weighted_sum_of_its_experts(case: Case) -> None:
    experts = random_experts(len(case.routing.held), HIDDEN, WIDTH)
    x = torch.randn(case.tokens, HIDDEN, generator=torch.Generator().manual_seed(case.seed))
    y = mixed(case.routing, *stacked(experts), x, case.logits())
    torch.testing.assert_close(y.double(), mixture(case, x, experts), rtol=1e-4, atol=1e-5)


def test_what_several_hold_adds_up_to_the_whole() -> None:
    inner, outer = stacked(random_experts(7, HIDDEN, WIDTH))
    x, logits = torch.randn(30, HIDDEN), torch.randn(30, 7)
    whole = mixed(Routing(7, 3, True, range(7)), inner, outer, x, logits)
    total = torch.zeros_like(whole)
    for held in (range(2), range(2, 3), range(3, 7)):
        first, second = (
            rows_of(weight, held.start * rows, held.stop * rows)
            for weight, rows in ((inner, 2 * WIDTH), (outer, HIDDEN))
        )
        total += mixed(Routing(7, 3, True, held), first, second, x, logits)
    torch.testing.assert_close(total, whole)


@pytest.mark.parametrize("bits", [8, 4])
def test_quantized_experts_are_those_that_they_stand_for(bits: int) -> None:
    """8 bits round the activations too."""
    inner, outer = stacked(random_experts(5, 64, 32))
    x, logits, routing = torch.randn(20, 64), torch.randn(20, 5), Routing(5, 2, True, range(5))
    weights: list[Int8Weight | Int4Weight] = [
        quantize_int8(weight) if bits == 8 else quantize_int4(weight, 32) for weight in (inner, outer)
    ]
    y = mixed(routing, weights[0], weights[1], x, logits)
    exact = mixed(routing, weights[0].dequantize(), weights[1].dequantize(), x, logits)
    assert (y - exact).norm() <= (0.03 if bits == 8 else 1e-5) * exact.norm()


def test_a_token_that_is_not_finite_leaves_the_others_alone() -> None:
    inner, outer = stacked(random_experts(5, HIDDEN, WIDTH))
    x, logits, routing = torch.randn(6, HIDDEN), torch.randn(6, 5), Routing(5, 2, False, range(5))
    expected = mixed(routing, inner, outer, x, logits)
    logits[1, 3], x[4, 0] = torch.nan, torch.inf
    y = mixed(routing, inner, outer, x, logits)
    assert not y[[1, 4]].isfinite().any(dim=1).all()
    torch.testing.assert_close(y[[0, 2, 3, 5]], expected[[0, 2, 3, 5]])
