"""From floating-point rows to 8 and 4 bits. Pure arithmetic on blocks of rows: knows no file and no model.

Rows are independent of each other in both forms, so that a weight can be quantized as it is read, some rows at a time.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.memory import empty
from engine.quant.weights import Int4Weight, Int8Weight
from engine.quant.workers import Workers

INT8_MAX = 127
INT4_MAX = 15
_BLOCK_ELEMENTS = 2**18
"""Elements at a time: a handful of float32 temporaries of a block stay in a core's second-level cache."""

QUICK = (1.0, 0.9)
"""Shares of a group's range that are tried when a model is loaded: seconds for a thousand million weights."""
THOROUGH = tuple(1.0 - 0.02 * step for step in range(20))
"""Shares that are tried when a checkpoint is written once, to be loaded often."""


@dataclass(frozen=True, slots=True, eq=False)
class Int8Rows:
    """An 8-bit weight that is being filled."""

    weight: Int8Weight
    workers: Workers | None = None

    @staticmethod
    def empty(shape: tuple[int, ...], device: torch.device | str = "cpu", workers: Workers | None = None) -> "Int8Rows":
        """`shape` is [out, in]."""
        rows, columns = shape
        values = empty((rows, columns), torch.int8, device)
        return Int8Rows(Int8Weight(values, torch.empty(rows, dtype=torch.float32, device=device)), workers)

    def put(self, start: int, rows: Tensor) -> None:
        """Quantizes [n, in] rows of any floating type into place: round to nearest, scale = max |w| / 127."""
        _for_each_block(rows, self.workers, lambda at, block: self._put_block(start + at, block))

    def _put_block(self, start: int, block: Tensor) -> None:
        largest = block.abs().amax(dim=1)
        scale = torch.where(largest > torch.finfo(torch.float32).tiny * INT8_MAX, largest / INT8_MAX, 1.0)
        self.weight.scale[start : start + len(block)] = scale
        self.weight.values[start : start + len(block)] = block.mul_((1 / scale)[:, None]).round_()


@dataclass(frozen=True, slots=True, eq=False)
class Int4Rows:
    """A 4-bit weight that is being filled."""

    weight: Int4Weight
    shares: Sequence[float]
    """Of each group's range, tried in turn; what lies outside is clipped."""
    workers: Workers | None = None

    @staticmethod
    def empty(
        shape: tuple[int, ...],
        group: int,
        shares: Sequence[float] = QUICK,
        device: torch.device | str = "cpu",
        workers: Workers | None = None,
    ) -> "Int4Rows":
        """`shape` is [out, in]; `group` must be even and divide the latter."""
        rows, columns = shape
        assert columns % group == 0 and group % 2 == 0, f"{columns} columns in groups of {group}"
        groups = (rows, columns // group)
        weight = Int4Weight(
            packed=empty((rows, columns // 2), torch.uint8, device),
            scale=empty(groups, torch.float32, device),
            zero=empty(groups, torch.uint8, device),
        )
        return Int4Rows(weight, shares, workers)

    def put(self, start: int, rows: Tensor) -> None:
        """Quantizes [n, in] rows of any floating type into place."""
        _for_each_block(rows, self.workers, lambda at, block: self._put_block(start + at, block))

    def _put_block(self, start: int, block: Tensor) -> None:
        assert self.weight.zero is not None
        end = start + len(block)
        groups = block.view(len(block), -1, self.weight.group)
        scale, zero = _fit_groups(groups, self.shares)
        self.weight.scale[start:end] = scale.squeeze(2)
        self.weight.zero[start:end] = zero.squeeze(2)
        self.weight.packed[start:end] = pack_nibbles(_codes(groups, scale, zero).to(torch.uint8).flatten(1))


def quantize_int8(weight: Tensor) -> Int8Weight:
    """[out, in] of any floating type, symmetric with a scale per row."""
    rows = Int8Rows.empty(weight.shape, device=weight.device)
    rows.put(0, weight)
    return rows.weight


def quantize_int4(weight: Tensor, group: int, shares: Sequence[float] = QUICK) -> Int4Weight:
    """[out, in] of any floating type, asymmetric in groups of `group` columns (see `_fit_groups`)."""
    rows = Int4Rows.empty(weight.shape, group, shares, device=weight.device)
    rows.put(0, weight)
    return rows.weight


def pack_nibbles(values: Tensor) -> Tensor:
    """[rows, columns] uint8 in [0, 15] to [rows, columns / 2]: even columns in the low four bits."""
    return values[:, 0::2] | (values[:, 1::2] << 4)


def _fit_groups(groups: Tensor, shares: Sequence[float]) -> tuple[Tensor, Tensor]:
    """Scale and zero [rows, groups, 1] in float32 for [rows, groups, group], with a small squared error.

    Each share of the group's range gives codes q; of all scales, s = <w, q> / <q, q> leaves them the least squared
    error, |w|^2 - <w, q>^2 / <q, q>. So the share with the largest <w, q>^2 / <q, q> wins, and its s is the scale.
    Scales are rounded to bfloat16, so that a checkpoint in 16 bits holds them exactly.
    """
    low = groups.amin(dim=2, keepdim=True).clamp_(max=0)
    width = groups.amax(dim=2, keepdim=True).clamp_(min=0).sub_(low)
    is_empty = width < torch.finfo(torch.float32).tiny * INT4_MAX**2
    width = torch.where(is_empty, 1.0, width)
    best = torch.full_like(width, -1.0)
    scale, zero = torch.ones_like(width), torch.zeros_like(width)
    for share in shares:
        tried = width * (share / INT4_MAX)
        tried_zero = low.neg().div_(width).mul_(INT4_MAX).round_()
        codes = _codes(groups, tried, tried_zero).sub_(tried_zero)
        product = torch.linalg.vecdot(groups, codes).unsqueeze(2)
        square = torch.linalg.vecdot(codes, codes).unsqueeze(2)
        gain = product * product / square.clamp_(min=1)
        is_better = gain > best
        best = torch.where(is_better, gain, best)
        scale = torch.where(is_better, product / square, scale)
        zero = torch.where(is_better, tried_zero, zero)
    scale = torch.where(is_empty | (scale <= 0), 1.0, scale)
    return scale.to(torch.bfloat16).to(torch.float32), zero


def _codes(groups: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """The nearest of the 16 values, as float32 in [0, 15]."""
    return (groups * (1 / scale)).round_().add_(zero).clamp_(0, INT4_MAX)


def _for_each_block(rows: Tensor, workers: Workers | None, work: Callable[[int, Tensor], None]) -> None:
    """Calls `work` with the first row and a float32 copy of some rows, until it has had them all."""
    step = max(1, _BLOCK_ELEMENTS // rows.shape[1])

    def copy_and_work(start: int) -> None:
        work(start, rows[start : start + step].to(torch.float32, copy=True).contiguous())

    starts = range(0, len(rows), step)
    if workers is not None:
        workers.run(copy_and_work, starts)
        return
    for start in starts:
        copy_and_work(start)
