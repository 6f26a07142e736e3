"""4-bit weights on a GPU: torch's int4pack form, its product for few rows, and the unpacked weight's for many.

The kernel unpacks a weight anew for every few rows, which is as good as free while reading it takes longest, and takes
several times as long as a dense product for a prompt. From how many rows on to unpack once is measured, not known.
"""

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from engine.quant.weights import Int4Weight

INT4_GROUPS = (32, 64, 128, 256)
"""Groups that `torch._weight_int4pack_mm` knows; it computes on bfloat16 alone."""
INNER_TILES = 8
"""16 input channels each, side by side in its packed form; its shape must divide evenly."""
INT4_OUT_MULTIPLE = 8
TILE = (INT4_OUT_MULTIPLE, 16 * INNER_TILES)
"""[out, in] of the values that lie together in the packed form."""
MEASURED_ROWS = (16, 32, 64, 128, 256, 512, 1024)
_UNPACKED_VALUES = 2**24
"""Of a weight that is unpacked at a time: what that needs beside it stays below some 150 MB."""

log = logging.getLogger(__name__)

Pack = Callable[[Tensor], Tensor]
"""[out, in / 2] uint8, even channels in the high four bits, to the packed form."""
Work = Callable[[], object]


@dataclass(frozen=True, slots=True, eq=False)
class Unpacking:
    """How a weight is unpacked, and when."""

    order: Tensor
    """See `tile_order`."""
    from_rows: int
    """The fewest rows for which it is worth it."""


@dataclass(frozen=True, slots=True, eq=False)
class Int4Product:
    """W4A16: `cuda.linear.Product` of a weight that stays packed."""

    packed: Tensor
    """As `torch.ops.aten._convert_weight_to_int4pack` lays it out: [out / 8, in / 128, ...] of whole tiles."""
    scale_and_zero: Tensor
    """See `int4pack_scales`."""
    group: int
    order: Tensor | None
    bias: Tensor | None
    unpacking: Unpacking | None = None
    """None: never."""

    @staticmethod
    def of(weight: Int4Weight, bias: Tensor | None) -> "Int4Product":
        """From a weight without an `int4_obstacle`."""
        packed = pack(swap_nibbles(weight.packed))
        return Int4Product(packed, int4pack_scales(weight), weight.group, weight.order, bias)

    @property
    def shape(self) -> tuple[int, int]:
        return self.scale_and_zero.shape[1], self.scale_and_zero.shape[0] * self.group

    def __call__(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        x = x if self.order is None else x.index_select(1, self.order)
        if self.unpacking is not None and len(x) >= self.unpacking.from_rows:
            y = self.multiply_unpacked(x, self.unpacking.order)
        else:
            y = self.multiply_packed(x)
        return (y if self.bias is None else y + self.bias).to(dtype)

    def multiply_packed(self, x: Tensor) -> Tensor:
        """[T, in] bfloat16, channels in the order of storage, to [T, out]."""
        return torch.ops.aten._weight_int4pack_mm(x, self.packed, self.group, self.scale_and_zero)

    def multiply_unpacked(self, x: Tensor, order: Tensor) -> Tensor:
        """As `multiply_packed`; of the weight some rows at a time are unpacked."""
        rows, columns = self.shape
        step = max(1, _UNPACKED_VALUES // columns // TILE[0]) * TILE[0]
        blocks = (range(first, min(first + step, rows)) for first in range(0, rows, step))
        products = [torch.mm(x, self.unpacked(block, order).T) for block in blocks]
        return products[0] if len(products) == 1 else torch.cat(products, dim=1)

    def unpacked(self, block: range, order: Tensor) -> Tensor:
        """[block, in] bfloat16: these rows of the weight, whole tiles; columns in the order of storage."""
        rows, columns = len(block), self.shape[1]
        tiles = self.packed[block.start // TILE[0] : block.stop // TILE[0]]
        values = nibbles(tiles.reshape(rows // TILE[0], columns // TILE[1], -1)).index_select(2, order)
        values = values.view(-1, columns // TILE[1], *TILE).transpose(1, 2).reshape(rows, -1, self.group)
        scale, zero = self.scale_and_zero[:, block.start : block.stop].transpose(0, 1).unsqueeze(3).unbind(2)
        values = values.to(scale.dtype) - 8
        return torch.addcmul(zero, values, scale, out=torch.empty_like(values)).view(rows, columns)

    def rows(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        raise TypeError("the packed form of a 4-bit weight has no rows: an embedding is dense or of 8 bits")


class Timing(NamedTuple):
    """Seconds of a product with so many rows, either way."""

    rows: int
    packed: float
    unpacked: float


def crossover(timings: Iterable[Timing]) -> int | None:
    """The fewest rows from which on unpacking is never slower; None if it is at the most rows that were measured."""
    best = None
    for timing in sorted(timings, reverse=True):
        if timing.unpacked > timing.packed:
            break
        best = timing.rows
    return best


class Crossovers:
    """Gives each product its `Unpacking`; every shape is measured once, which takes some milliseconds."""

    def __init__(self, seconds: Callable[[Work], float], pack: Pack) -> None:
        """`seconds` of a piece of device work."""
        self._seconds = seconds
        self._pack = pack
        self._order: Tensor | None = None
        self._found: dict[tuple[int, int, int], int | None] = {}

    def unpacking(self, product: Int4Product) -> Unpacking | None:
        key = (*product.shape, product.group)
        if self._order is None:
            self._order = tile_order(self._pack, product.packed.device)
        if key not in self._found:
            self._found[key] = found = crossover(self._measured(product, self._order))
            rows, columns, _ = key
            when = "in no step" if found is None else f"in steps of {found} tokens and more"
            log.info("4-bit weights of %d x %d are unpacked for a dense product %s", rows, columns, when)
        from_rows = self._found[key]
        return None if from_rows is None else Unpacking(self._order, from_rows)

    def _measured(self, product: Int4Product, order: Tensor) -> Iterable[Timing]:
        for rows in MEASURED_ROWS:
            x = torch.zeros((rows, product.shape[1]), dtype=torch.bfloat16, device=product.packed.device)
            packed = self._seconds(lambda x=x: product.multiply_packed(x))  # type: ignore[misc]
            unpacked = self._seconds(lambda x=x: product.multiply_unpacked(x, order))  # type: ignore[misc]
            yield Timing(rows, packed, unpacked)


def device_seconds(work: Work) -> float:
    """Of some work on the current CUDA device: the fastest of a few runs after one that sets libraries up."""
    work()
    found = []
    for _ in range(3):
        begun, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begun.record()
        work()
        ended.record()
        ended.synchronize()
        found.append(begun.elapsed_time(ended) / 1000)
    return min(found)


def pack(values: Tensor) -> Tensor:
    """`Pack` of this device."""
    return torch.ops.aten._convert_weight_to_int4pack(values, INNER_TILES)


def tile_order(pack: Pack, device: torch.device) -> Tensor:
    """[8 * 128] int64: where in a packed tile, as `nibbles` reads it, each of its values is, row by row.

    Learned from the converter, by packing the values' own numbers four bits at a time: the layout is the kernel's
    affair and documented nowhere.
    """
    rows, columns = TILE
    numbers = torch.arange(rows * columns, device=device).view(rows, columns)
    found = torch.zeros(rows * columns, dtype=torch.int64, device=device)
    for shift in (0, 4, 8):
        digits = (numbers >> shift & 15).to(torch.uint8)
        packed = pack((digits[:, ::2] << 4 | digits[:, 1::2]).contiguous())
        found |= nibbles(packed.reshape(-1)).to(torch.int64) << shift
    assert torch.equal(found.sort().values, numbers.flatten()), "a packed tile holds each of its values once"
    return found.argsort()


def nibbles(packed: Tensor) -> Tensor:
    """[..., n] int32 to [..., 8 n] uint8 of four bits each, the low ones first."""
    flat = packed.contiguous().view(torch.uint8)
    return torch.stack((flat & 15, flat >> 4), dim=-1).flatten(-2)


def int4_obstacle(weight: Int4Weight, dtype: torch.dtype) -> str | None:
    """Why torch's int4pack kernel cannot multiply by this weight, in words; None if it can."""
    rows, columns = weight.shape
    if dtype != torch.bfloat16:
        return f"activations of {str(dtype).removeprefix('torch.')}, and it knows bfloat16 alone"
    if weight.group not in INT4_GROUPS:
        return f"groups of {weight.group} channels, and it knows {', '.join(map(str, INT4_GROUPS))}"
    if rows % TILE[0] or columns % TILE[1]:
        return f"shape {rows} x {columns}, and it needs multiples of {TILE[0]} x {TILE[1]}"
    return None


def swap_nibbles(packed: Tensor) -> Tensor:
    """Even channels in the high four bits, as the converter reads them; `Int4Weight` has them in the low ones."""
    return ((packed & 15) << 4) | (packed >> 4)


def int4pack_scales(weight: Int4Weight) -> Tensor:
    """[in / group, out, 2] bfloat16 of (s, z) with which the kernel computes weight = (value - 8) * s + z."""
    middle = 8.0 if weight.zero is None else weight.zero.to(torch.float32)
    shift = (8.0 - middle) * weight.scale
    return torch.stack((weight.scale, shift), dim=2).transpose(0, 1).contiguous().to(torch.bfloat16)
