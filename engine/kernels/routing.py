"""Mixtures of experts in plain torch: the table of (token, expert) pairs, and the way of rows through it.

The table takes the place of one-hot matrices (Rajbhandari et al., 2022): each pair has a row, by expert and then by
token. All shapes follow from the number of tokens, and nothing here waits for a device.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.kernels.operators import ExpertLinear, Routing


class Table(NamedTuple):
    """The pairs of T tokens and their K experts each, sorted. Pairs with experts that are not held come last."""

    weights: Tensor
    """[T, K] float32, the largest first."""
    rows: Tensor
    """[T, K] int64 the row of each pair; from `offsets[-1]` on, its expert is not held."""
    offsets: Tensor
    """[held + 1] int64 where the rows of each expert begin."""
    sources: Tensor
    """[T * K] int64 the token of each row, ascending within an expert."""


def route(logits: Tensor, routing: Routing) -> Table:
    """The table of [T, experts] logits. NaN counts as -inf when experts are chosen, and makes the weights NaN."""
    logits = logits.to(torch.float32)
    comparable = logits.masked_fill(logits.isnan(), -torch.inf)
    chosen = comparable.sort(dim=1, descending=True, stable=True).indices[:, : routing.per_token]
    weights = logits.softmax(dim=1).gather(1, chosen)
    if routing.renormalised:
        weights = weights / weights.sum(dim=1, keepdim=True)
    held = len(routing.held)
    own = chosen - routing.held.start
    group = torch.where((own >= 0) & (own < held), own, held).flatten()
    order = group.sort(stable=True).indices
    counts = torch.zeros(held + 1, dtype=torch.int64, device=logits.device)
    counts.scatter_add_(0, group, torch.ones_like(group))
    rows = torch.empty_like(order)
    rows[order] = torch.arange(len(order), device=logits.device)
    return Table(
        weights=weights,
        rows=rows.view(chosen.shape),
        offsets=F.pad(counts[:held].cumsum(0), (1, 0)),
        sources=torch.div(order, routing.per_token, rounding_mode="floor"),
    )


def sum_by_weight(results: Tensor, table: Table) -> Tensor:
    """[T * K, width] results of the rows to [T, width] float32: each token's in its own order, one after the other."""
    tokens, per_token = table.rows.shape
    total = torch.zeros(tokens, results.shape[1], device=results.device)
    is_elsewhere = table.rows >= table.offsets[-1]
    for index in range(per_token):
        picked = results.index_select(0, table.rows[:, index]).to(torch.float32)
        total.addcmul_(picked.masked_fill_(is_elsewhere[:, index, None], 0.0), table.weights[:, index, None])
    return total


class TableExperts:
    """`engine.kernels.Experts` of any two expert linears."""

    def __init__(self, routing: Routing, inner: ExpertLinear, outer: ExpertLinear) -> None:
        self._routing = routing
        self._inner = inner
        self._outer = outer

    def __call__(self, x: Tensor, logits: Tensor) -> Tensor:
        table = route(logits, self._routing)
        inner = self._inner(x.index_select(0, table.sources), table.offsets)
        return sum_by_weight(self._outer(inner, table.offsets), table).to(x.dtype)
