"""A linear layer's weight in 16, 8 or 4 bits: what the numbers mean. Knows no kernel's packing and no file format."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Int8Weight:
    """Symmetric 8-bit weight, a scale for each output channel; runs with activations quantized per token (W8A8)."""

    values: Tensor
    """[out, in] int8 in [-127, 127]."""
    scale: Tensor
    """[out] float32: weight[o, i] = values[o, i] * scale[o]."""

    @property
    def shape(self) -> tuple[int, int]:
        return self.values.shape[0], self.values.shape[1]

    @property
    def num_bytes(self) -> int:
        return self.values.nbytes + self.scale.nbytes

    def dequantize(self) -> Tensor:
        """[out, in] float32."""
        return self.values.to(torch.float32) * self.scale[:, None]


@dataclass(frozen=True, slots=True, eq=False)
class Int4Weight:
    """4-bit weight in groups of consecutive input channels; activations stay as they are (W4A16), or are quantized per
    token and group (W4A8).

    weight[o, i] = (value[o, i] - zero[o, g]) * scale[o, g] with g = i // group and values in [0, 15].
    """

    packed: Tensor
    """[out, in / 2] uint8: input channel 2 j in the low four bits of byte j, 2 j + 1 in the high ones."""
    scale: Tensor
    """[out, in / group] float32."""
    zero: Tensor | None
    """[out, in / group] uint8 in [0, 15]; None is the symmetric form, 8 everywhere."""
    order: Tensor | None = None
    """[in] int64 for weights whose groups are not consecutive channels (GPTQ's act-order): column i of this weight
    multiplies input channel order[i]. None is the identity."""
    int8_activations: bool = False
    """Whether x becomes int8 in [-127, 127] with a scale, max|x| / 127, for each token and group."""

    @property
    def shape(self) -> tuple[int, int]:
        return self.packed.shape[0], 2 * self.packed.shape[1]

    @property
    def group(self) -> int:
        return self.shape[1] // self.scale.shape[1]

    @property
    def num_bytes(self) -> int:
        held = (self.packed, self.scale, self.zero, self.order)
        return sum(tensor.nbytes for tensor in held if tensor is not None)

    def values(self) -> Tensor:
        """[out, in] uint8 in [0, 15], columns in the order of storage."""
        return torch.stack((self.packed & 15, self.packed >> 4), dim=2).flatten(1)

    def dequantize(self) -> Tensor:
        """[out, in] float32, columns in the order of the input channels."""
        rows, columns = self.shape
        values = self.values().to(torch.float32).view(rows, -1, self.group)
        zero = 8.0 if self.zero is None else self.zero.to(torch.float32)[:, :, None]
        weight = ((values - zero) * self.scale[:, :, None]).view(rows, columns)
        if self.order is None:
            return weight
        restored = torch.empty_like(weight)
        restored[:, self.order] = weight
        return restored


Weight = Tensor | Int8Weight | Int4Weight
"""A linear layer's weight [out, in]: dense in the run's dtype, or quantized."""


def weight_bytes(weight: Weight) -> int:
    """Bytes that it is held in."""
    return weight.nbytes if isinstance(weight, Tensor) else weight.num_bytes


def rows_of(weight: Weight, first: int, last: int) -> Weight:
    """Rows [first, last) of a weight; nothing is copied."""
    if isinstance(weight, Tensor):
        return weight[first:last]
    if isinstance(weight, Int8Weight):
        return Int8Weight(weight.values[first:last], weight.scale[first:last])
    zero = None if weight.zero is None else weight.zero[first:last]
    return replace(weight, packed=weight.packed[first:last], scale=weight.scale[first:last], zero=zero)
