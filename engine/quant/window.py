"""Some rows and columns of a quantized layer, read as if its checkpoint held no more. Knows no model.

Owns which axis of each of a format's tensors are the layer's rows, its columns, or the groups of these.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from engine.errors import ModelError
from engine.parallel.slices import Run
from engine.quant.config import Awq, CheckpointFormat, CompressedTensors, Gptq
from engine.quant.formats import NIBBLES, QuantizedLinear, Shape, TensorSource, read_linear
from engine.quant.weights import Int4Weight, Int8Weight


class Axis(NamedTuple):
    of: Literal["rows", "columns", "groups"]
    packed: int = 1
    """So many lie in one element."""


_ROWS, _COLUMNS, _GROUPS = Axis("rows"), Axis("columns"), Axis("groups")
_PACKED_ROWS, _PACKED_COLUMNS = Axis("rows", NIBBLES), Axis("columns", NIBBLES)
_GPTQ = {
    "qweight": (_PACKED_COLUMNS, _ROWS),
    "qzeros": (_GROUPS, _PACKED_ROWS),
    "scales": (_GROUPS, _ROWS),
    "g_idx": (_COLUMNS,),
}
_AWQ = {"qweight": (_COLUMNS, _PACKED_ROWS), "qzeros": (_GROUPS, _PACKED_ROWS), "scales": (_GROUPS, _ROWS)}
_COMPRESSED = {
    "weight": (_ROWS, _COLUMNS),
    "weight_packed": (_ROWS, _PACKED_COLUMNS),
    "weight_scale": (_ROWS, _GROUPS),
    "weight_zero_point": (_PACKED_ROWS, _GROUPS),
    "weight_g_idx": (_COLUMNS,),
}
_ORDERS = ("g_idx", "weight_g_idx")


class RunSource(TensorSource, Protocol):
    """A checkpoint that reads a part of a tensor."""

    def shape(self, name: str) -> Shape: ...

    def dtype(self, name: str) -> torch.dtype: ...

    def read_window(self, name: str, window: Collection[Run]) -> Tensor:
        """The part of a tensor that lies in a run of each of its axes."""


class WindowRead(NamedTuple):
    weight: Int8Weight | Int4Weight
    first_row: int
    """Of the layer's, that the weight begins with: rows that share a word with those asked for come along."""


def read_window(
    layout: CheckpointFormat, source: RunSource, linear: QuantizedLinear, rows: Run, columns: Run
) -> WindowRead:
    """As `read_linear`, of these rows and columns. Raises ModelError, also for columns that cannot be parted."""
    first = rows.start // NIBBLES * NIBBLES
    last = min(-(-rows.end // NIBBLES) * NIBBLES, linear.rows)
    window = _Window(layout, source, linear, Run(first, last - first), columns)
    part = QuantizedLinear(linear.module, last - first, columns.count)
    return WindowRead(read_linear(layout, window, part), first)


@dataclass(frozen=True, slots=True)
class _Window:
    """A `TensorSource` of the part."""

    layout: CheckpointFormat
    source: RunSource
    linear: QuantizedLinear
    rows: Run
    columns: Run

    @property
    def names(self) -> Collection[str]:
        return self.source.names

    def error(self, name: str, reason: str) -> ModelError:
        return self.source.error(name, reason)

    def read(self, name: str, *shapes: Shape) -> Tensor:
        suffix = name.removeprefix(f"{self.linear.module}.")
        if name not in self.source.names:
            return self.source.read(name, *shapes)
        whole = self.source.shape(name)
        axes = _axes(self.layout)[suffix][: len(whole)]
        if axes[0] is _PACKED_ROWS and suffix == "weight_zero_point" and self.source.dtype(name) != torch.int32:
            axes = (_ROWS, *axes[1:])
        if suffix in _ORDERS and self.columns.count < self.linear.columns:
            return self._order(name)
        window = [self._run(name, axis, size) for axis, size in zip(axes, whole, strict=True)]
        found = self.source.read_window(name, window)
        if shapes and tuple(found.shape) not in shapes:
            raise self.error(
                name, f"has shape {whole}; the layer has {self.linear.rows} rows, {self.linear.columns} columns"
            )
        return found

    def _run(self, name: str, axis: Axis, size: int) -> Run:
        """What is read of an axis of so many elements."""
        if axis.of == "groups":
            return self._group_run(name, size)
        whole, kept = (self.linear.rows, self.rows) if axis.of == "rows" else (self.linear.columns, self.columns)
        if size != -(-whole // axis.packed):
            raise self.error(name, f"has an axis of {size}; expected {-(-whole // axis.packed)}")
        if kept.start % axis.packed:
            raise self.error(name, f"packs {axis.packed} channels in a word, and channel {kept.start} is inside of one")
        return Run(kept.start // axis.packed, -(-kept.end // axis.packed) - kept.start // axis.packed)

    def _group_run(self, name: str, groups: int) -> Run:
        columns = self.linear.columns
        if groups == 1 or self.columns.count == columns:
            return Run(0, groups)
        first, last = self.columns.start * groups, self.columns.end * groups
        if first % columns or last % columns:
            raise self.error(
                name,
                f"has {groups} groups of {columns} input channels; {self.columns.start} to {self.columns.end - 1} are "
                "not whole ones, so that tensor parallel ranks cannot share the layer",
            )
        return Run(first // columns, (last - first) // columns)

    def _order(self, name: str) -> Tensor:
        """The group of each column, counted from the first of these. Raises ModelError unless they are in order."""
        index = self.source.read(name, (self.linear.columns,)).to(torch.int64)
        part = index[self.columns.start : self.columns.end]
        if bool((index[1:] < index[:-1]).any()):
            raise self.error(
                name,
                "gives groups of channels that are not consecutive (act-order), which tensor parallel ranks cannot "
                "share; cut the model into pipeline stages instead",
            )
        return part - part[0]


def _axes(layout: CheckpointFormat) -> Mapping[str, tuple[Axis, ...]]:
    match layout:
        case Gptq():
            return _GPTQ
        case Awq():
            return _AWQ
        case CompressedTensors():
            return _COMPRESSED
