"""Reductions over the vocabulary axis, exact and blind to the batch: no row's result depends on the rows beside it.

Maxima and sums go through blocks of `BLOCK` neighbouring tokens: one vectorised pass over the row, then a search inside
the one block that matters. Knows nothing of sampling parameters.

`Reductions` names those that a device may have faster ways for; this module is the implementation in torch.
"""

from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import pad

BLOCK = 64


class Reductions(Protocol):
    """Over rows of float32 logits. A row's results do not depend on the rows beside it."""

    def largest(self, x: Tensor) -> tuple[list[float], list[int]]:
        """See `largest`."""

    def k_largest(self, x: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """See `k_largest`."""

    def log_sum_exp(self, x: Tensor) -> Tensor:
        """See `log_sum_exp`."""


def largest(x: Tensor) -> tuple[list[float], list[int]]:
    """The largest value of each row and the lowest id that has it: [R, V] -> R values, R ids.

    The value is NaN where the row has a NaN anywhere, so a test of it is a test of the row for NaN and +inf.
    """
    values, ids = _largest(x)
    return values.tolist(), ids.tolist()


def k_largest(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The `k` largest values of each row, largest first, equal values by rising id: [R, V] -> values, ids [R, k].

    Rows hold no NaN. Where a row has fewer than `k` values above -inf, the ids of its -inf entries are unspecified.
    """
    vocabulary = x.shape[1]
    if 2 * k >= vocabulary:
        values, ids = x.sort(dim=-1, descending=True, stable=True)
        return values[:, :k], ids[:, :k]
    values, ids = x.topk(k + 1, dim=-1)
    # One value more than asked shows whether equal values straddle the cut, where topk promises nothing about ids.
    straddles = (values[:, k] == values[:, k - 1]) & (values[:, k] > -torch.inf)
    values, ids = values[:, :k], ids[:, :k]
    if straddles.any():
        rows = straddles.nonzero().squeeze(1)
        ids = ids.index_copy(0, rows, _with_lowest_tied(x[rows], values[rows], ids[rows]))
    ids, by_id = ids.sort(dim=-1)
    values, by_value = values.gather(1, by_id).sort(dim=-1, descending=True, stable=True)
    return values, ids.gather(1, by_value)


def log_sum_exp(x: Tensor) -> Tensor:
    """Logarithm of each row's sum of exponentials: [R, V] -> [R] float64, equal to the last bit in any batch."""
    best = _largest(x)[0][:, None]
    weights = x.new_zeros(len(x), padded_length(x.shape[1]))
    torch.sub(x, best, out=weights[:, : x.shape[1]]).exp_()
    return best.squeeze(1).double() + block_total(weights).squeeze(1).log()


def first_above(weights: Tensor, share: Tensor) -> Tensor:
    """Inverse CDF in index order: the first index whose cumulative weight exceeds `share` of the row's total.

    weights [R, N] >= 0 with a positive total, share [R, 1] float64 in [0, 1) -> [R, 1] int64. The weight at the
    result is never zero.
    """
    cumulative = weights.cumsum(-1, dtype=torch.float64)
    return _search(cumulative, share * cumulative[:, -1:])


def first_above_in_blocks(weights: Tensor, share: Tensor) -> Tensor:
    """`first_above` for long rows [R, n * BLOCK] float32: sums the blocks and searches inside one. Returns [R]."""
    blocks = weights.unflatten(1, (-1, BLOCK))
    cumulative = blocks.sum(-1).cumsum(-1, dtype=torch.float64)
    target = share * cumulative[:, -1:]
    block = _search(cumulative, target)
    inside = blocks.gather(1, block[..., None].expand(-1, 1, BLOCK)).squeeze(1)
    reached = pad(cumulative, (1, 0)).gather(1, block)
    # A block's float32 sum and its float64 cumulative weights differ by rounding; `_search` clips at the latter.
    token = _search(inside.cumsum(-1, dtype=torch.float64), target - reached)
    return (block * BLOCK + token).squeeze(1)


def block_total(weights: Tensor) -> Tensor:
    """Row sums of [R, n * BLOCK] float32 weights as float64 [R, 1], equal to the last bit in any batch."""
    return weights.unflatten(1, (-1, BLOCK)).sum(-1).cumsum(-1, dtype=torch.float64)[:, -1:]


def padded_length(vocabulary: int) -> int:
    """The vocabulary rounded up to whole blocks."""
    return -(-vocabulary // BLOCK) * BLOCK


def _largest(x: Tensor) -> tuple[Tensor, Tensor]:
    """`largest` where `x` is: values [R], ids [R] int64."""
    # argmax returns the first of equal maxima: documented by torch, and true of the blocks and inside one.
    block = _block_maxima(x).argmax(-1, keepdim=True)
    ids = _tokens_of(block, x.shape[1])
    values = x.gather(1, ids)
    inside = values.argmax(-1, keepdim=True)
    return values.gather(1, inside).squeeze(1), ids.gather(1, inside).squeeze(1)


def _search(cumulative: Tensor, target: Tensor) -> Tensor:
    """First index of each row of [R, N] with cumulative > target [R, 1]; a target past the total counts as below it."""
    below_total = cumulative[:, -1:].nextafter(cumulative.new_zeros(()))
    return torch.searchsorted(cumulative, torch.minimum(target, below_total), right=True)


def _block_maxima(x: Tensor) -> Tensor:
    """[R, V] -> [R, ceil(V / BLOCK)]; a NaN makes its block's maximum NaN."""
    whole = x.shape[1] // BLOCK
    maxima = x[:, : whole * BLOCK].unflatten(1, (whole, BLOCK)).amax(-1)
    if x.shape[1] % BLOCK:
        maxima = torch.cat((maxima, x[:, whole * BLOCK :].amax(-1, keepdim=True)), dim=1)
    return maxima


def _tokens_of(blocks: Tensor, vocabulary: int) -> Tensor:
    """Token ids of blocks [R, n] -> [R, n * BLOCK]; ids past the vocabulary repeat its last token."""
    offsets = torch.arange(BLOCK, device=blocks.device)
    return (blocks[..., None] * BLOCK + offsets).flatten(1).clamp_(max=vocabulary - 1)


def _with_lowest_tied(x: Tensor, values: Tensor, ids: Tensor) -> Tensor:
    """`ids` [R, k] with those of the smallest value replaced by the lowest ids in `x` [R, V] that have this value."""
    k, vocabulary = ids.shape[1], x.shape[1]
    cut = values[:, -1:]
    # Negated ids as float32 make "lowest id" a search for the largest; exact below 2**24.
    assert vocabulary < 2**24, vocabulary
    negated = -torch.arange(vocabulary, device=x.device, dtype=torch.float32)
    tied = torch.where(x == cut, negated, -torch.inf).topk(k, dim=-1).indices
    place = torch.arange(k, device=x.device) - (values > cut).sum(-1, keepdim=True)
    return torch.where(place >= 0, tied.gather(1, place.clamp(min=0)), ids)
