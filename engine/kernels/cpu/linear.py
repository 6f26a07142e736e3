"""Linear layers of the CPU: weights packed once into the panels of linear.h, and the operations that multiply by them.

Owns which packed form a weight gets and the memory that it lies in. Knows nothing of how the products are computed.
"""

import ctypes
import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor

from engine.kernels.cpu.dtypes import DTYPES
from engine.kernels.cpu.library import ACTIVATIONS, NO_ACTIVATION
from engine.kernels.cpu.program import Field, StepArrays, Target
from engine.kernels.operators import Embedding
from engine.memory import reserve
from engine.models.spec import Activation
from engine.quant.weights import Int4Weight, Int8Weight, Weight

PANEL = 32
"""Columns of a panel, as in linear_tile.h."""
_GROUP_UNIT = 32
_MAX_INT8_CHANNELS = 2**17
_QUANTIZED_ROW_ALIGNMENT = 64


def pack_linear(
    target: Target,
    weight: Weight,
    bias: Tensor | None = None,
    *,
    gate: Activation | None = None,
    out_dtype: torch.dtype | None = None,
) -> "PackedLinear":
    """Packs a weight [out, in]; nothing of the original is kept. `out_dtype` None is the dtype of x.

    Raises ValueError for a shape and TypeError for a dtype that has no kernel.
    """
    return _pack(_Layer(target, weight, bias, gate, out_dtype), weight)


def pack_experts(
    target: Target,
    weight: Weight,
    experts: int,
    *,
    gate: Activation | None = None,
    out_dtype: torch.dtype | None = None,
) -> "PackedLinear":
    """As `pack_linear` of the weights of several experts, one below the other: the call takes `offsets`.

    Raises ValueError also for int4 weights whose input channels are in another order.
    """
    if isinstance(weight, Int4Weight) and weight.order is not None:
        raise ValueError("experts in 4 bits whose input channels are in another order (act-order) have no kernel")
    return _pack(_Layer(target, weight, None, gate, out_dtype, weights=experts), weight)


def _pack(layer: "_Layer", weight: Weight) -> "PackedLinear":
    if isinstance(weight, Int8Weight):
        return Int8Linear(layer, weight)
    if isinstance(weight, Int4Weight):
        return Int4Linear(layer, weight)
    return DenseLinear(layer, weight)


class _Layer:
    """What is the same for every form of a weight."""

    def __init__(
        self,
        target: Target,
        weight: Weight,
        bias: Tensor | None,
        gate: Activation | None,
        out_dtype: torch.dtype | None,
        weights: int = 1,
    ) -> None:
        """`weights` lie in `weight` one below the other."""
        rows, self.columns = weight.shape
        if rows % weights:
            raise ValueError(f"{rows} rows are not {weights} weights of one height")
        self.weights = weights
        self.out = rows // weights
        if gate is not None and self.out % 2:
            raise ValueError(f"a gated weight is [gate; up] of equal heights; this one has {self.out} rows")
        self.target = target
        self.gate = gate
        self.out_dtype = out_dtype
        self.bias = None if bias is None else self.in_panels(bias)

    @property
    def gated(self) -> bool:
        return self.gate is not None

    @property
    def panels(self) -> int:
        """Of each weight."""
        return math.ceil(self.out // 2 / (PANEL // 2)) if self.gated else math.ceil(self.out / PANEL)

    def in_panels(self, columns: Tensor) -> Tensor:
        """One float32 for each row of the weights, in the order of `panel_order`, weight after weight."""
        parts = columns.to(torch.float32).reshape(self.weights, self.out)
        return torch.cat([panel_order(part, gated=self.gated) for part in parts])

    def multiply(self, operation: str, x: Tensor, offsets: Tensor | None, **fields: Field) -> Tensor:
        """Emits a product; `fields` are those that only this operation has."""
        assert offsets is not None or self.weights == 1, "several weights, and nothing says whose rows are whose"
        if x.dtype not in DTYPES or x.shape[1] != self.columns or (self.columns > 1 and x.stride(1) != 1):
            raise ValueError(
                f"x is {x.dtype} {list(x.shape)} with strides {x.stride()}; the weight takes float32 or bfloat16 "
                f"[T, {self.columns}] with neighbouring columns"
            )
        dtype = self.out_dtype or x.dtype
        y = self.target.empty(x.shape[0], self.out // 2 if self.gated else self.out, dtype=dtype)
        gate = NO_ACTIVATION if self.gate is None else ACTIVATIONS[self.gate]
        self.target.emit(
            operation,
            StepArrays(x.shape[0]),
            x=x,
            x_stride=x.stride(0),
            dtype=DTYPES[x.dtype],
            bias=self.bias,
            out=self.out,
            weights=self.weights,
            offsets=offsets,
            gate=gate,
            y=y,
            y_dtype=DTYPES[dtype],
            **{"in": self.columns},
            **fields,
        )
        return y

    def rows(self, operation: str, y_dtype: torch.dtype, held: range | None, **fields: Field) -> Embedding:
        """A lookup of rows that `operation` does; `fields` are those that only it has."""
        if self.gated or self.weights > 1:
            raise ValueError("a gated weight, or several, are no table of embeddings")
        ids = range(self.out) if held is None else held
        fields = {"first": ids.start, "rows": len(ids), "in": self.columns, **fields}

        def embed(ids: Tensor) -> Tensor:
            y = self.target.empty(len(ids), self.columns, dtype=y_dtype)
            step = StepArrays(len(ids), token_ids=None if ids.is_meta else ids)
            self.target.emit(operation, step, y=y, y_dtype=DTYPES[y_dtype], **fields)
            return y

        return embed

    def pack_bytes(self, values: Tensor) -> Tensor:
        """Panels of a weight whose elements are whole bytes."""
        values = values.contiguous()
        row_bytes = self.columns * values.element_size()
        size = self.panels * PANEL * 4 * math.ceil(row_bytes / 4)
        packed = reserve(self.weights * size)
        pack = self.target.library.function("pack_dense")
        pack.restype = None
        pack.argtypes = [ctypes.c_void_p, *[ctypes.c_int64] * 4, ctypes.c_void_p]
        for index in range(self.weights):
            rows = values.data_ptr() + index * self.out * row_bytes
            pack(rows, row_bytes, self.out, self.gated, self.target.threads, packed.data_ptr() + index * size)
        return packed


class PackedLinear(ABC):
    """`x @ weight.T + bias` with a packed weight; see `engine.kernels.Operators.linear`."""

    @property
    @abstractmethod
    def num_bytes(self) -> int:
        """Of the packed weight with its scales."""

    @abstractmethod
    def __call__(self, x: Tensor, offsets: Tensor | None = None) -> Tensor:
        """[R, in] to [R, out], or with a gate to [R, out / 2]. Rows of x may lie apart. Raises ValueError.

        Where there are several weights, rows [offsets[i], offsets[i + 1]) meet weight i: [weights + 1] int64.
        """

    @abstractmethod
    def rows(self, dtype: torch.dtype, held: range | None = None) -> Embedding:
        """Rows of the weight, dequantized, by the step's token ids: [T] int64 to [T, in].

        With `held`, the first rows are those of these ids, and all others have zeros. Raises ValueError with a gate.
        """


class DenseLinear(PackedLinear):
    """A float32 or bfloat16 weight; x has the same dtype."""

    def __init__(self, layer: _Layer, weight: Tensor) -> None:
        if weight.dtype not in DTYPES:
            raise TypeError(f"a dense weight is float32 or bfloat16, not {weight.dtype}")
        self._layer = layer
        self._dtype = weight.dtype
        self._weight = layer.pack_bytes(weight)

    @property
    def num_bytes(self) -> int:
        return self._weight.numel()

    def __call__(self, x: Tensor, offsets: Tensor | None = None) -> Tensor:
        if x.dtype != self._dtype:
            raise ValueError(f"x is {x.dtype}, the weight {self._dtype}")
        return self._layer.multiply("linear_dense", x, offsets, weight=self._weight)

    def rows(self, dtype: torch.dtype, held: range | None = None) -> Embedding:
        return self._layer.rows("embed_dense", dtype, held, weight=self._weight, dtype=DTYPES[self._dtype])


class Int8Linear(PackedLinear):
    """An int8 weight; rows of x are quantized as they come (W8A8)."""

    def __init__(self, layer: _Layer, weight: Int8Weight) -> None:
        if layer.columns > _MAX_INT8_CHANNELS:
            raise ValueError(
                f"{layer.columns} input channels: sums of int8 products are exact up to {_MAX_INT8_CHANNELS}"
            )
        self._layer = layer
        self._weight = layer.pack_bytes(weight.values)
        self._scales = layer.in_panels(weight.scale)
        self._column_sums = self._sum_columns()

    @property
    def num_bytes(self) -> int:
        return self._weight.numel() + self._scales.nbytes + self._column_sums.nbytes

    def __call__(self, x: Tensor, offsets: Tensor | None = None) -> Tensor:
        tokens, target = x.shape[0], self._layer.target
        width = _QUANTIZED_ROW_ALIGNMENT * math.ceil(self._layer.columns / _QUANTIZED_ROW_ALIGNMENT)
        return self._layer.multiply(
            "linear_int8",
            x,
            offsets,
            weight=self._weight,
            scales=self._scales,
            column_sums=self._column_sums,
            x_values=target.empty(tokens, width, dtype=torch.uint8),
            x_scales=target.empty(tokens, dtype=torch.float32),
        )

    def rows(self, dtype: torch.dtype, held: range | None = None) -> Embedding:
        return self._layer.rows("embed_int8", dtype, held, weight=self._weight, scales=self._scales)

    def _sum_columns(self) -> Tensor:
        layer, target = self._layer, self._layer.target
        panels = layer.weights * layer.panels
        sums = torch.empty(panels * PANEL, dtype=torch.int32)
        add = target.library.function("sum_int8_columns")
        add.restype = None
        add.argtypes = [ctypes.c_void_p, *[ctypes.c_int64] * 3, ctypes.c_void_p]
        add(self._weight.data_ptr(), layer.columns, panels, target.threads, sums.data_ptr())
        return sums


class Int4Linear(PackedLinear):
    """An int4 weight in groups; x stays as it is (W4A16), or its rows are quantized as they come (W4A8)."""

    def __init__(self, layer: _Layer, weight: Int4Weight) -> None:
        self._group = weight.group
        if self._group % _GROUP_UNIT or self._group * weight.scale.shape[1] != layer.columns:
            raise ValueError(
                f"{layer.columns} input channels in groups of {self._group}: groups are multiples of {_GROUP_UNIT} "
                "that divide them"
            )
        if weight.int8_activations and self._group > _MAX_INT8_CHANNELS:
            raise ValueError(
                f"groups of {self._group} input channels: sums of int8 products are exact up to {_MAX_INT8_CHANNELS}"
            )
        self._layer = layer
        self._zeros = weight.zero is not None
        self._int8_activations = weight.int8_activations
        self._order = None if weight.order is None else weight.order.to(torch.int64).contiguous()
        self._weight = self._pack(weight)

    @property
    def num_bytes(self) -> int:
        return self._weight.numel() + (0 if self._order is None else self._order.nbytes)

    def __call__(self, x: Tensor, offsets: Tensor | None = None) -> Tensor:
        x = self._ordered(x)
        rows, groups, target = x.shape[0], self._layer.columns // self._group, self._layer.target
        x_values = x_sums = None
        if self._int8_activations:
            x_values = target.empty(rows, self._layer.columns, dtype=torch.int8)
            x_sums = target.empty(rows, groups, 2, dtype=torch.float32)
        elif self._zeros:
            x_sums = target.empty(rows, groups, dtype=torch.float32)
        return self._layer.multiply(
            "linear_int4",
            x,
            offsets,
            weight=self._weight,
            group=self._group,
            zeros=int(self._zeros),
            x_values=x_values,
            x_sums=x_sums,
        )

    def rows(self, dtype: torch.dtype, held: range | None = None) -> Embedding:
        return self._layer.rows(
            "embed_int4",
            dtype,
            held,
            weight=self._weight,
            group=self._group,
            zeros=int(self._zeros),
            order=self._order,
        )

    def _ordered(self, x: Tensor) -> Tensor:
        """x with its columns in the order of the weight's storage."""
        if self._order is None:
            return x
        y = self._layer.target.empty(*x.shape, dtype=x.dtype)
        self._layer.target.emit(
            "gather_columns",
            StepArrays(x.shape[0]),
            x=x,
            x_stride=x.stride(0),
            dtype=DTYPES[x.dtype],
            order=self._order,
            y=y,
            **{"in": self._layer.columns},
        )
        return y

    def _pack(self, weight: Int4Weight) -> Tensor:
        layer, library = self._layer, self._layer.target.library
        size = library.function("packed_int4_bytes")
        size.restype = ctypes.c_int64
        size.argtypes = [ctypes.c_int64] * 5
        num_bytes = size(layer.columns, self._group, layer.out, layer.gated, self._zeros)
        packed = reserve(layer.weights * num_bytes)
        values, scale = weight.packed.contiguous(), _half(weight.scale)
        zero = None if weight.zero is None else weight.zero.contiguous()
        pack = library.function("pack_int4")
        pack.restype = None
        pack.argtypes = [*[ctypes.c_void_p] * 3, *[ctypes.c_int64] * 5, ctypes.c_void_p]
        groups = layer.columns // self._group
        for index in range(layer.weights):
            first = index * layer.out
            pack(
                values.data_ptr() + first * layer.columns // 2,
                scale.data_ptr() + first * groups * scale.element_size(),
                None if zero is None else zero.data_ptr() + first * groups,
                layer.columns,
                self._group,
                layer.out,
                layer.gated,
                layer.target.threads,
                packed.data_ptr() + index * num_bytes,
            )
        return packed


def _half(scale: Tensor) -> Tensor:
    """Scales in float16, as the checkpoints' own are; those of bfloat16 are exact above 6e-5. Raises ValueError."""
    half = scale.to(torch.float16).contiguous()
    if not bool(torch.isfinite(half).all()):
        raise ValueError(f"a scale of an int4 weight is {scale.abs().max():g}: at most 65,504 is held")
    return half


def panel_order(columns: Tensor, *, gated: bool) -> Tensor:
    """[out] values, one for each row of a weight, as its panels have them: [panels * PANEL], zeros for the padding."""
    if not gated:
        return torch.nn.functional.pad(columns, (0, -len(columns) % PANEL)).contiguous()
    half = PANEL // 2
    pair = columns.view(2, -1)
    return torch.nn.functional.pad(pair, (0, -pair.shape[1] % half)).view(2, -1, half).transpose(0, 1).flatten()
