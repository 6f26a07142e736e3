"""What follows attention in a layer: one MLP, or a mixture of them. Knows no names of parameters and no arithmetic."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from engine.kernels.operators import Experts, Linear, Operators
from engine.models.spec import Activation

MLP = Callable[[Tensor], Tensor]
"""[T, hidden] to [T, hidden]."""


@dataclass(frozen=True, slots=True, eq=False)
class DenseMLP:
    """One for every token."""

    operators: Operators
    inner: Linear
    activation: Activation | None
    """None where `inner` is gated, which applies it."""
    outer: Linear

    def __call__(self, x: Tensor) -> Tensor:
        inner = self.inner(x)
        return self.outer(inner if self.activation is None else self.operators.activate(inner, self.activation))


@dataclass(frozen=True, slots=True, eq=False)
class MixtureMLP:
    """Those that a router chooses for each token, and one more for every token where the model has it."""

    operators: Operators
    router: Linear
    experts: Experts
    shared: DenseMLP | None
    shared_gate: Linear | None
    """Weighs the result of `shared`."""

    def __call__(self, x: Tensor) -> Tensor:
        y = self.experts(x, self.router(x))
        if self.shared is None:
            return y
        if self.shared_gate is None:
            return self.operators.add(y, self.shared(x))
        return self.operators.add_gated(y, self.shared(x), self.shared_gate(x))
