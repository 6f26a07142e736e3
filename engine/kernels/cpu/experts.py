"""Mixtures of experts on the CPU: the table, rows in and out, sums. Owns shapes and scratch, and no product."""

import torch
from torch import Tensor

from engine.kernels.cpu.dtypes import DTYPES
from engine.kernels.cpu.linear import PackedLinear
from engine.kernels.cpu.program import StepArrays, Target
from engine.kernels.operators import Routing


class CpuExperts:
    """`engine.kernels.Experts` as five operations: table, rows in, two products of all experts, sums.

    Whatever the router says, T tokens have T * per_token rows at most: that is what the values in between are made for.
    """

    def __init__(self, target: Target, routing: Routing, inner: PackedLinear, outer: PackedLinear) -> None:
        if not 1 <= routing.per_token <= routing.experts:
            raise ValueError(f"{routing.per_token} experts a token of {routing.experts}")
        self._target = target
        self._routing = routing
        self._inner = inner
        self._outer = outer

    def __call__(self, x: Tensor, logits: Tensor) -> Tensor:
        """Neighbouring columns of x and of the logits are neighbours, and rows of the logits too."""
        table = CpuTable(self._target, self._routing, logits)
        results = self._outer(self._inner(table.gather(x), table.offsets), table.offsets)
        return table.sum(results, x.dtype)


class CpuTable:
    """The rows of the (token, expert) pairs of a step; see experts.h."""

    def __init__(self, target: Target, routing: Routing, logits: Tensor) -> None:
        """Emits the routing of [T, experts] float32 logits. Raises ValueError for others."""
        if logits.dtype != torch.float32 or logits.shape[1] != routing.experts or not logits.is_contiguous():
            raise ValueError(
                f"logits are {logits.dtype} {list(logits.shape)} with strides {logits.stride()}; the router's are "
                f"contiguous float32 [T, {routing.experts}]"
            )
        self.tokens, held = len(logits), len(routing.held)
        self._target = target
        self._routing = routing
        pairs = (self.tokens, routing.per_token)
        self.weights = target.empty(*pairs, dtype=torch.float32)
        """[T, per_token]."""
        self.rows = target.empty(*pairs, dtype=torch.int64)
        """[T, per_token] the row of each pair; -1 where its expert is not held."""
        self.offsets = target.empty(held + 1, dtype=torch.int64)
        """[held + 1] where the rows of each expert begin."""
        self.sources = target.empty(self.tokens * routing.per_token, dtype=torch.int64)
        """The token of each row; of the last ones nothing where pairs have no row."""
        target.emit(
            "route",
            StepArrays(self.tokens),
            logits=logits,
            experts=routing.experts,
            per_token=routing.per_token,
            renormalised=int(routing.renormalised),
            first=routing.held.start,
            held=held,
            weights=self.weights,
            rows=self.rows,
            offsets=self.offsets,
            sources=self.sources,
            tallies=target.empty(2, target.threads, held, dtype=torch.int64),
        )

    def gather(self, x: Tensor) -> Tensor:
        """[T, N] to [T * per_token, N]: the token of each row."""
        assert x.stride(1) == 1 or x.shape[1] == 1, "the values of a row are neighbours"
        y = self._target.empty(self.tokens * self._routing.per_token, x.shape[1], dtype=x.dtype)
        self._target.emit(
            "gather_rows",
            StepArrays(self.tokens),
            x=x,
            x_stride=x.stride(0) * x.element_size(),
            row_bytes=x.shape[1] * x.element_size(),
            sources=self.sources,
            offsets=self.offsets,
            held=len(self._routing.held),
            y=y,
        )
        return y

    def sum(self, results: Tensor, dtype: torch.dtype) -> Tensor:
        """[T * per_token, N] float32 results of the rows to [T, N]: each token's, by its weights."""
        assert results.dtype == torch.float32
        width = results.shape[1]
        y = self._target.empty(self.tokens, width, dtype=dtype)
        self._target.emit(
            "sum_experts",
            StepArrays(self.tokens),
            results=results,
            weights=self.weights,
            rows=self.rows,
            per_token=self._routing.per_token,
            width=width,
            y=y,
            dtype=DTYPES[dtype],
        )
        return y
