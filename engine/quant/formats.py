"""How checkpoints spell a quantized linear layer: from its tensors to an `Int8Weight` or `Int4Weight`, without loss.

Owns the layouts of GPTQ, AWQ and compressed-tensors. Knows no file (tensors come from a `TensorSource`) and no model.
Every integer word has 32 bits, little endian, and holds eight nibbles, the first in its lowest bits unless told.
"""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from engine.errors import ModelError
from engine.quant.config import Awq, CheckpointFormat, CompressedTensors, Gptq
from engine.quant.quantize import pack_nibbles
from engine.quant.weights import Int4Weight, Int8Weight

NIBBLES = 8
"""Of one word."""
_SYMMETRIC_ZERO = 8
_ONE_IN_EVERY_NIBBLE = 0x11111111
_AWQ_NIBBLE = (0, 4, 1, 5, 2, 6, 3, 7)
"""Which nibble of an AWQ word holds each of its eight output channels."""

Shape = tuple[int, ...]


class TensorSource(Protocol):
    """The tensors of a checkpoint by name."""

    @property
    def names(self) -> Collection[str]: ...

    def read(self, name: str, *shapes: Shape) -> Tensor:
        """The whole tensor. Raises ModelError unless it is there, in one of these shapes, and finite."""

    def error(self, name: str, reason: str) -> ModelError:
        """What is wrong with a tensor, with the file that it is in."""


@dataclass(frozen=True, slots=True)
class QuantizedLinear:
    """One linear layer of [rows, columns] in a checkpoint, under the name that its tensors begin with."""

    module: str
    rows: int
    columns: int

    def tensor(self, suffix: str) -> str:
        return f"{self.module}.{suffix}"


def is_quantized(layout: CheckpointFormat, names: Collection[str], module: str) -> bool:
    """Whether the checkpoint holds this layer quantized; the layers that a recipe ignored are dense."""
    marks = ("weight_packed", "weight_scale") if isinstance(layout, CompressedTensors) else ("qweight",)
    return any(f"{module}.{mark}" in names for mark in marks)


def tensor_names(names: Collection[str], module: str) -> set[str]:
    """Those of the checkpoint's tensors that describe the quantized weight of a layer."""
    suffixes = ("qweight", "qzeros", "scales", "g_idx", "weight", "weight_packed", "weight_scale", "weight_zero_point")
    described = (f"{module}.{suffix}" for suffix in (*suffixes, "weight_shape", "weight_g_idx"))
    return {name for name in described if name in names}


def read_linear(layout: CheckpointFormat, source: TensorSource, linear: QuantizedLinear) -> Int8Weight | Int4Weight:
    """Raises ModelError naming the tensor that is missing, misshapen, or says what cannot be run."""
    match layout:
        case Gptq():
            return _read_gptq(layout, source, linear)
        case Awq():
            return _read_awq(layout, source, linear)
        case CompressedTensors():
            if linear.tensor("weight_packed") in source.names:
                return _read_packed(source, linear)
            return _read_int8(source, linear)


def _read_gptq(layout: Gptq, source: TensorSource, linear: QuantizedLinear) -> Int4Weight:
    """qweight [in / 8, out], qzeros [groups, out / 8], scales [groups, out], g_idx [in]: the group of each channel."""
    groups = _num_groups(layout.group, source, linear, "qweight")
    words = _words(source, linear, "qweight", (_num_words(linear.columns), linear.rows)).T
    packed = _octets(words)[:, : linear.columns // 2].contiguous()
    scale = source.read(linear.tensor("scales"), (groups, linear.rows)).to(torch.float32).T.contiguous()
    stored = _words(source, linear, "qzeros", (groups, _num_words(linear.rows)))
    # Writers of the first version take 1 from every nibble of a word at once, so that a zero point of 0 borrows from
    # the next one: only the whole word gives it back.
    zero = _unpack(stored + layout.zero_offset * _ONE_IN_EVERY_NIBBLE)[:, : linear.rows]
    return _weight(source, linear, packed, scale, zero.T.contiguous(), "g_idx")


def _read_awq(layout: Awq, source: TensorSource, linear: QuantizedLinear) -> Int4Weight:
    """qweight [in, out / 8], qzeros [groups, out / 8], scales [groups, out]; nibbles in AWQ's own order."""
    groups = _num_groups(layout.group, source, linear, "qweight")
    row = torch.arange(linear.rows)
    order = row // NIBBLES * NIBBLES + torch.tensor(_AWQ_NIBBLE)[row % NIBBLES]
    values = _unpack(_words(source, linear, "qweight", (linear.columns, _num_words(linear.rows))))[:, order]
    scale = source.read(linear.tensor("scales"), (groups, linear.rows)).to(torch.float32).T.contiguous()
    zero = _unpack(_words(source, linear, "qzeros", (groups, _num_words(linear.rows))))[:, order].T.contiguous()
    return _weight(source, linear, pack_nibbles(values.T.contiguous()), scale, zero, None)


def _read_packed(source: TensorSource, linear: QuantizedLinear) -> Int4Weight:
    """weight_packed [out, in / 8], weight_scale [out, groups], weight_zero_point [out / 8, groups] packed down columns.

    Values and zero points are signed in the file's arithmetic and stored with 8 added, which is our form.
    """
    words = _words(source, linear, "weight_packed", (linear.rows, _num_words(linear.columns)))
    packed = _octets(words)[:, : linear.columns // 2].contiguous()
    name = linear.tensor("weight_scale")
    scale = source.read(name).to(torch.float32)
    groups = scale.shape[-1]
    if scale.shape != (linear.rows, groups) or linear.columns % groups or linear.columns // groups % 2:
        raise source.error(
            name, f"has shape {tuple(scale.shape)}, which does not divide [{linear.rows}, {linear.columns}] into groups"
        )
    return _weight(source, linear, packed, scale.contiguous(), _packed_zero(source, linear, groups), "weight_g_idx")


def _packed_zero(source: TensorSource, linear: QuantizedLinear, groups: int) -> Tensor | None:
    name = linear.tensor("weight_zero_point")
    if name not in source.names:
        return None
    stored = source.read(name, (_num_words(linear.rows), groups), (linear.rows, groups))
    if stored.dtype == torch.int32:
        return _unpack(stored.T).T[: linear.rows].contiguous()
    if stored.dtype == torch.int8:  # older writers did not pack them
        return (stored + _SYMMETRIC_ZERO).to(torch.uint8)
    raise source.error(name, f"holds {stored.dtype}; expected int32, or int8 where it is not packed")


def _read_int8(source: TensorSource, linear: QuantizedLinear) -> Int8Weight:
    """weight [out, in] int8 and weight_scale [out, 1]."""
    values = source.read(linear.tensor("weight"), (linear.rows, linear.columns))
    if values.dtype != torch.int8:
        raise source.error(linear.tensor("weight"), f"holds {values.dtype}; expected int8, for it has a weight_scale")
    zero = linear.tensor("weight_zero_point")
    if zero in source.names and bool(source.read(zero).any()):
        raise source.error(zero, "is not zero everywhere; 8-bit weights must be symmetric")
    scale = source.read(linear.tensor("weight_scale"), (linear.rows, 1), (linear.rows,))
    # A symmetric range leaves -128 unused, which kernels that negate values rely on.
    return Int8Weight(values.clamp_(min=-127), scale.to(torch.float32).reshape(linear.rows))


def _weight(
    source: TensorSource,
    linear: QuantizedLinear,
    packed: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    group_index: str | None,
) -> Int4Weight:
    """Zero points of 8 everywhere become the symmetric form; channels that are out of order are sorted by group."""
    zero = None if zero is None or bool((zero == _SYMMETRIC_ZERO).all()) else zero
    weight = Int4Weight(packed, scale, zero)
    if group_index is None or linear.tensor(group_index) not in source.names:
        return weight
    name = linear.tensor(group_index)
    index = source.read(name, (linear.columns,)).to(torch.int64)
    num_groups = scale.shape[1]
    if bool((index == torch.arange(linear.columns) // weight.group).all()) or bool((index == -1).all()):
        return weight
    is_group = bool(((index >= 0) & (index < num_groups)).all())
    if not is_group or not bool((index.bincount(minlength=num_groups) == weight.group).all()):
        raise source.error(name, f"does not give {weight.group} input channels to each of {num_groups} groups")
    order = index.argsort(stable=True)
    return Int4Weight(pack_nibbles(weight.values()[:, order]), scale, zero, order)


def _num_groups(group: int, source: TensorSource, linear: QuantizedLinear, suffix: str) -> int:
    if group == -1:
        return 1
    if linear.columns % group:
        raise source.error(
            linear.tensor(suffix), f"has {linear.columns} input channels, which groups of {group} do not divide"
        )
    return linear.columns // group


def _num_words(values: int) -> int:
    return -(-values // NIBBLES)


def _words(source: TensorSource, linear: QuantizedLinear, suffix: str, shape: Shape) -> Tensor:
    words = source.read(linear.tensor(suffix), shape)
    if words.dtype != torch.int32:
        raise source.error(linear.tensor(suffix), f"holds {words.dtype}; expected int32 words of eight values")
    return words


def _unpack(words: Tensor) -> Tensor:
    """[rows, n] int32 to [rows, 8 n] uint8 in [0, 15]."""
    octets = _octets(words)
    return torch.stack((octets & 15, octets >> 4), dim=2).flatten(1)


def _octets(words: Tensor) -> Tensor:
    """[rows, n] int32 to [rows, 4 n] uint8. Flat in between: a single row or column has strides that mislead views."""
    return words.flatten().view(torch.uint8).view(len(words), -1)
