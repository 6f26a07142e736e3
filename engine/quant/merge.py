"""Quantized layers that a checkpoint holds apart (q, k, v; gate, up) as one weight. Knows no file and no model."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.quant.weights import Int4Weight, Int8Weight

RowRun = tuple[int, int, int]
"""First row in the part, first row in the merged weight, and how many rows."""


class Unmergeable(Exception):
    """Parts that cannot share one weight: says in what they differ."""


@dataclass(frozen=True, slots=True, eq=False)
class Part:
    """A quantized layer and where its rows go."""

    weight: Int8Weight | Int4Weight
    runs: Sequence[RowRun]


def merge(parts: Sequence[Part], rows: int) -> Int8Weight | Int4Weight:
    """One weight of `rows` rows, which the runs of the parts fill. Raises Unmergeable."""
    first = parts[0].weight
    if len(parts) == 1 and list(parts[0].runs) == [(0, 0, rows)]:
        return first
    place = _Placing([part.runs for part in parts], rows)
    eights = [part.weight for part in parts if isinstance(part.weight, Int8Weight)]
    fours = [part.weight for part in parts if isinstance(part.weight, Int4Weight)]
    if eights and fours:
        raise Unmergeable("8 bits and 4 bits")
    if eights:
        return Int8Weight(place([weight.values for weight in eights]), place([weight.scale for weight in eights]))
    return _merge_int4(fours, place)


@dataclass(frozen=True, slots=True, eq=False)
class _Placing:
    """Puts the rows of one tensor of each part where the runs say."""

    runs: Sequence[Sequence[RowRun]]
    rows: int

    def __call__(self, tensors: Sequence[Tensor]) -> Tensor:
        merged = tensors[0].new_empty((self.rows, *tensors[0].shape[1:]))
        for tensor, runs in zip(tensors, self.runs, strict=True):
            for source, target, count in runs:
                merged[target : target + count] = tensor[source : source + count]
        return merged


def _merge_int4(weights: Sequence[Int4Weight], place: _Placing) -> Int4Weight:
    first = weights[0]
    for weight in weights[1:]:
        if weight.group != first.group:
            raise Unmergeable(f"groups of {first.group} and of {weight.group} input channels")
        if not _is_same_order(weight.order, first.order):
            raise Unmergeable("input channels in different orders (act-order)")
    zero = None if all(weight.zero is None for weight in weights) else place([_zero(weight) for weight in weights])
    packed = place([weight.packed for weight in weights])
    return Int4Weight(packed, place([weight.scale for weight in weights]), zero, first.order)


def _zero(weight: Int4Weight) -> Tensor:
    return torch.full_like(weight.scale, 8, dtype=torch.uint8) if weight.zero is None else weight.zero


def _is_same_order(a: Tensor | None, b: Tensor | None) -> bool:
    return a is b or (a is not None and b is not None and torch.equal(a, b))
