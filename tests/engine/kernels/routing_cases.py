"""Routers' logits, and what a mixture of experts makes of them, pair by pair in plain Python and float64."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor

from engine.kernels.operators import Routing

Expert = tuple[Tensor, Tensor]
"""[gate; up] and down."""


@dataclass(frozen=True)
class Case:
    tokens: int
    routing: Routing
    has_ties: bool
    seed: int

    def logits(self) -> Tensor:
        """[tokens, experts] float32."""
        generator = torch.Generator().manual_seed(self.seed)
        logits = 2 * torch.randn(self.tokens, self.routing.experts, generator=generator)
        return logits.round() if self.has_ties else logits

    def chosen(self) -> list[list[int]]:
        """Each token's experts: the largest logits first, of equal ones the first."""
        return [
            sorted(range(self.routing.experts), key=lambda expert: (-row[expert], expert))[: self.routing.per_token]
            for row in self.logits().tolist()
        ]

    def weights(self) -> list[list[float]]:
        """Of `chosen`."""
        found = []
        for row, experts in zip(self.logits().double().softmax(dim=1).tolist(), self.chosen(), strict=True):
            total = sum(row[expert] for expert in experts) if self.routing.renormalised else 1.0
            found.append([row[expert] / total for expert in experts])
        return found


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Few experts and many, of which all or some are held; no token at all, and many."""
    experts = draw(st.one_of(st.integers(1, 20), st.sampled_from([64, 130])))
    per_token = draw(st.integers(1, min(experts, 18)))
    first = draw(st.integers(0, experts - 1))
    some = range(first, draw(st.integers(first + 1, experts)))
    routing = Routing(experts, per_token, draw(st.booleans()), draw(st.sampled_from([range(experts), some])))
    return Case(draw(st.integers(0, 50)), routing, draw(st.booleans()), draw(st.integers(0, 1000)))


def check_table(
    case: Case, weights: Tensor, rows: Tensor, offsets: Tensor, sources: Tensor, *, elsewhere: int | None
) -> None:
    """Every pair with a held expert has a row of its own, by expert and then by token, and nobody else has one.

    `elsewhere` is the row of pairs with other experts; None is any behind the last one.
    """
    held = case.routing.held
    pairs = sorted(
        (expert - held.start, token)
        for token, experts in enumerate(case.chosen())
        for expert in experts
        if expert in held
    )
    assert offsets.tolist() == [sum(expert < index for expert, _ in pairs) for index in range(len(held) + 1)]
    assert sources[: len(pairs)].tolist() == [token for _, token in pairs]
    row_of = {pair: row for row, pair in enumerate(pairs)}
    for token, experts in enumerate(case.chosen()):
        for index, expert in enumerate(experts):
            row = int(rows[token, index])
            if expert in held:
                assert row == row_of[expert - held.start, token]
            else:
                assert row >= len(pairs) if elsewhere is None else row == elsewhere
    expected = torch.tensor(case.weights(), dtype=torch.float64).view(weights.shape)
    assert weights.dtype == torch.float32
    torch.testing.assert_close(weights.double(), expected, rtol=2e-6, atol=1e-9)


def mixture(case: Case, x: Tensor, experts: Sequence[Expert]) -> Tensor:
    """[tokens, hidden] float64: the sum over the pairs with held experts, of which `experts` are the weights."""
    x = x.double()
    y = torch.zeros_like(x)
    for token, (chosen, weights) in enumerate(zip(case.chosen(), case.weights(), strict=True)):
        for expert, weight in zip(chosen, weights, strict=True):
            if expert in case.routing.held:
                inner, outer = experts[expert - case.routing.held.start]
                gate, up = (inner.double() @ x[token]).chunk(2)
                y[token] += weight * (outer.double() @ (F.silu(gate) * up))
    return y


def random_experts(count: int, hidden: int, width: int, dtype: torch.dtype = torch.float32) -> list[Expert]:
    generator = torch.Generator().manual_seed(11)
    return [
        (
            (torch.randn(2 * width, hidden, generator=generator) * hidden**-0.5).to(dtype),
            (torch.randn(hidden, width, generator=generator) * width**-0.5).to(dtype),
        )
        for _ in range(count)
    ]


def stacked(experts: Sequence[Expert]) -> tuple[Tensor, Tensor]:
    """The experts' matrices one below the other, as parameters hold them."""
    return torch.cat([inner for inner, _ in experts]), torch.cat([outer for _, outer in experts])
