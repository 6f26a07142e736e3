"""From the tensors of a checkpoint to the parameters of a decoder, one parameter at a time.

Which tensor goes where is a family's knowledge (`Piece`); what the parameters are called and how large they are is the
spec's; how a quantized layer is spelled is its format's. This puts them together: dense rows are converted, or
quantized, slice by slice as they are read, and quantized layers that a checkpoint holds apart are merged. Nothing is
read before it is asked for: who packs each parameter before the next one never has the model in memory twice. Of a
model that several ranks share, each reads its own rows and columns.
"""

import logging
import math
from collections.abc import Collection, Iterable, Iterator, MutableMapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, Protocol

import torch
from torch import Tensor

from engine.memory import Recycler
from engine.models.pieces import Piece, Run, keep
from engine.models.spec import ModelSpec
from engine.models.weights import Checkpoint
from engine.parallel import slices
from engine.parallel.part import Part
from engine.parallel.slices import Slice
from engine.quant.config import CheckpointFormat, Scheme
from engine.quant.formats import QuantizedLinear, is_quantized, read_linear, tensor_names
from engine.quant.merge import Part as QuantizedPart
from engine.quant.merge import Unmergeable, merge
from engine.quant.plan import Kind, group_obstacle, head_group, is_layer_linear, kind_of
from engine.quant.quantize import QUICK, Int4Rows, Int8Rows
from engine.quant.weights import Int4Weight, Int8Weight, Weight, weight_bytes
from engine.quant.window import read_window
from engine.quant.workers import Workers

_CONSTANT_SUFFIXES = (".inv_freq", ".attn.bias", ".attn.masked_bias", ".attention.bias", ".attention.masked_bias")
"""Constants that old checkpoints saved among the weights: rotary frequencies and causal masks."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Form:
    """What the parameters are to be."""

    dtype: torch.dtype
    """Of everything that is not quantized."""
    device: torch.device | str = "cpu"
    scheme: Scheme | None = None
    """What full weights are turned into; None leaves them."""
    group: int = 64
    """Input channels to a scale in 4 bits."""
    shares: Sequence[float] = QUICK
    """See `engine.quant.quantize`."""
    layout: CheckpointFormat | None = None
    """How the checkpoint holds the layers that it has quantized. Those that it left alone stay so."""
    int8_activations: bool = False
    """Whether activations that meet weights of 4 bits are quantized too."""

    def kind(self, parameter: str, spec: ModelSpec) -> Kind:
        if self.layout is not None and is_layer_linear(parameter):
            return "dense"
        group = head_group(self.scheme, self.group, torch.device(self.device).type)
        return kind_of(parameter, spec, self.scheme, group)


class Rows(Protocol):
    """A parameter that is being filled."""

    @property
    def weight(self) -> Weight: ...

    def put(self, start: int, rows: Tensor) -> None:
        """Takes floating-point rows as the parameter's rows from `start` on."""


@dataclass(frozen=True, slots=True, eq=False)
class DenseRows:
    weight: Tensor

    def put(self, start: int, rows: Tensor) -> None:
        self.weight[start : start + len(rows)].copy_(rows)


@dataclass(frozen=True, slots=True)
class _Unread:
    """Where a parameter comes from, what is held of it, and what is to become of that."""

    pieces: Sequence[Piece]
    slice: Slice
    kind: Kind

    @property
    def shape(self) -> tuple[int, ...]:
        return self.slice.shape

    def kept_columns(self, columns: int) -> slices.Run | None:
        """Of so many in the whole parameter; None for all."""
        if self.slice.columns is None:
            return None
        (kept,) = self.slice.columns
        return None if kept.count == columns else kept


class Parameters(MutableMapping[str, Weight]):
    """Every parameter of a part of a model, by its name there, read when it is first asked for.

    What is taken out at once (`pop`) is held by its taker alone; what is looked at stays until it is taken. What is
    wrong with a dense tensor's shape or dtype is found when this is made, so that a wrong checkpoint fails in
    milliseconds; what is wrong with values, or with a quantized layer, when it is read. Both raise ModelError.
    """

    def __init__(self, checkpoint: Checkpoint, part: Part, pieces: Iterable[Piece], form: Form) -> None:
        """`pieces` are those of the whole model."""
        spec = part.whole
        by_target: dict[str, list[Piece]] = {name: [] for name in spec.parameter_shapes()}
        for piece in pieces:
            by_target[piece.target].append(piece)
        _check(checkpoint, spec, by_target, form)
        _warn_of_unused(checkpoint, by_target, form)
        self._checkpoint = checkpoint
        self._form = form
        self._entries: dict[str, Weight | _Unread] = {
            name: _Unread(by_target[held.name], held.slice, form.kind(held.name, spec))
            for name, held in part.parameters()
        }
        self._memory = Recycler()
        self.bytes_read = 0
        """Of all parameters that have been read, as they are held."""

    def __getitem__(self, name: str) -> Weight:
        entry = self._entries[name]
        if isinstance(entry, _Unread):
            weight = _read_parameter(self._checkpoint, entry, self._form, self._memory)
            if self._form.int8_activations and isinstance(weight, Int4Weight):
                weight = replace(weight, int8_activations=True)
            entry = self._entries[name] = weight
            self.bytes_read += weight_bytes(weight)
        return entry

    def __setitem__(self, name: str, weight: Weight) -> None:
        self._entries[name] = weight

    def __delitem__(self, name: str) -> None:
        del self._entries[name]

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)


def _read_parameter(checkpoint: Checkpoint, unread: _Unread, form: Form, memory: Recycler) -> Weight:
    if form.layout is not None:
        quantized = [_is_quantized(checkpoint, piece, form.layout) for piece in unread.pieces]
        if all(quantized):
            return _read_quantized(checkpoint, unread, form.layout, form.device)
        if any(quantized):
            raise checkpoint.error(
                unread.pieces[quantized.index(False)].source,
                f"is not quantized, yet {unread.pieces[quantized.index(True)].source!r} is; they are one layer here",
            )
    if unread.kind == "dense":
        return _read_dense(checkpoint, unread, memory.empty(unread.shape, form.dtype, form.device))
    with Workers() as workers:
        rows = _rows(unread.kind, unread.shape, form, workers)
        if any(piece.transposed for piece in unread.pieces):
            # A row's scale needs the whole row, and the file's rows are our columns.
            rows.put(0, _read_dense(checkpoint, unread, memory.empty(unread.shape, torch.float32)))
        else:
            for piece in unread.pieces:
                _fill(checkpoint, piece, unread, rows)
            rows.put(unread.shape[0] - unread.slice.padding, _padding(unread))
    return rows.weight


def _rows(kind: Literal["int8", "int4"], shape: tuple[int, ...], form: Form, workers: Workers) -> Rows:
    if kind == "int8":
        return Int8Rows.empty(shape, form.device, workers)
    return Int4Rows.empty(shape, form.group, form.shares, form.device, workers)


def _read_dense(checkpoint: Checkpoint, unread: _Unread, weight: Tensor) -> Tensor:
    """Into `weight`, which may hold anything."""
    for piece in unread.pieces:
        if piece.transposed:
            _fill_columns(checkpoint, piece, unread, weight)
        elif weight.device.type == "cpu" and checkpoint.dtype(piece.source) == weight.dtype:
            columns = unread.kept_columns(piece.shape[-1])
            for run in keep(piece.runs, unread.slice.rows):
                checkpoint.read_into(piece.source, run, weight[run.target : run.target + run.rows], columns)
        else:
            _fill(checkpoint, piece, unread, DenseRows(weight))
    weight[len(weight) - unread.slice.padding :] = 0
    return weight


def _padding(unread: _Unread) -> Tensor:
    return torch.zeros(unread.slice.padding, *unread.shape[1:])


def _fill(checkpoint: Checkpoint, piece: Piece, unread: _Unread, rows: Rows) -> None:
    columns = unread.kept_columns(piece.shape[-1])
    for run in keep(piece.runs, unread.slice.rows):
        for start, found in checkpoint.row_slices(piece.source, run, columns):
            rows.put(run.target + start, found)


def _fill_columns(checkpoint: Checkpoint, piece: Piece, unread: _Unread, weight: Tensor) -> None:
    """Of a piece that is stored the other way round: its rows are the parameter's columns."""
    assert unread.slice.columns is not None
    first = 0
    for columns in unread.slice.rows:
        for run in keep(piece.runs, unread.slice.columns):
            for start, found in checkpoint.row_slices(piece.source, run, columns):
                begin = run.target + start
                weight[first : first + columns.count, begin : begin + len(found)].copy_(found.T)
        first += columns.count


def _read_quantized(
    checkpoint: Checkpoint, unread: _Unread, layout: CheckpointFormat, device: torch.device | str
) -> Weight:
    parts = []
    for piece in unread.pieces:
        linear = _linear(piece)
        # Quantizers turn [in, out] layers around: their tensors have a layer's outputs as rows whatever it was before.
        whole = (Run(0, 0, linear.rows),) if piece.transposed else piece.runs
        runs, columns = keep(whole, unread.slice.rows), unread.kept_columns(linear.columns)
        if columns is None and runs == whole:
            parts.append(QuantizedPart(read_linear(layout, checkpoint, linear), runs))
            continue
        for run in runs:
            rows = slices.Run(run.source, run.rows)
            read = read_window(layout, checkpoint, linear, rows, columns or slices.Run(0, linear.columns))
            parts.append(QuantizedPart(read.weight, (Run(run.source - read.first_row, run.target, run.rows),)))
    try:
        return _to_device(merge(parts, unread.shape[0]), device)
    except Unmergeable as error:
        names = ", ".join(repr(_linear(piece).module) for piece in unread.pieces)
        raise checkpoint.error(
            next(iter(tensor_names(checkpoint.names, _linear(unread.pieces[0]).module))),
            f"cannot share a layer: {names} are one weight here, but have {error}",
        ) from error


def _to_device(weight: Int8Weight | Int4Weight, device: torch.device | str) -> Weight:
    if torch.device(device).type == "cpu":
        return weight
    if isinstance(weight, Int8Weight):
        return Int8Weight(weight.values.to(device), weight.scale.to(device))
    zero = None if weight.zero is None else weight.zero.to(device)
    order = None if weight.order is None else weight.order.to(device)
    return Int4Weight(weight.packed.to(device), weight.scale.to(device), zero, order)


def _check(checkpoint: Checkpoint, spec: ModelSpec, by_target: dict[str, list[Piece]], form: Form) -> None:
    grouped = []
    for target, piece in _dense_pieces(checkpoint, by_target, form):
        checkpoint.check(piece.source, piece.shape)
        checkpoint.check_is_float(piece.source)
        if form.kind(target, spec) == "int4":
            grouped.append(piece)
    check_groups(checkpoint, grouped, form.group)


def check_groups(checkpoint: Checkpoint, pieces: Collection[Piece], group: int) -> None:
    """Raises ModelError, naming the groups that would do, unless these divide the input channels of every layer."""
    columns = {piece.source: _linear(piece).columns for piece in pieces}
    for piece in pieces:
        if obstacle := group_obstacle(group, columns[piece.source], columns.values()):
            raise checkpoint.error(piece.source, f"has shape {piece.shape}: {obstacle}")


def is_saved_constant(name: str) -> bool:
    """Whether a tensor is none of the weights: a table that the model's code makes for itself."""
    return name.endswith(_CONSTANT_SUFFIXES)


def _warn_of_unused(checkpoint: Checkpoint, by_target: dict[str, list[Piece]], form: Form) -> None:
    used: set[str] = set()
    for piece in (piece for pieces in by_target.values() for piece in pieces):
        used.add(piece.source)
        if form.layout is not None and _is_quantized(checkpoint, piece, form.layout):
            used |= tensor_names(checkpoint.names, _linear(piece).module)
    unexpected = sorted(name for name in checkpoint.names - used if not is_saved_constant(name))
    if unexpected:
        logger.warning("%s: %d tensors are not used: %s", checkpoint.origin, len(unexpected), ", ".join(unexpected[:5]))


def _dense_pieces(checkpoint: Checkpoint, by_target: dict[str, list[Piece]], form: Form) -> Iterator[tuple[str, Piece]]:
    for target, pieces in by_target.items():
        for piece in pieces:
            if form.layout is None or not _is_quantized(checkpoint, piece, form.layout):
                yield target, piece


def _is_quantized(checkpoint: Checkpoint, piece: Piece, layout: CheckpointFormat) -> bool:
    if len(piece.shape) != 2 or not piece.source.endswith(".weight"):
        return False
    return is_quantized(layout, checkpoint.names, _linear(piece).module)


def _linear(piece: Piece) -> QuantizedLinear:
    *rows, columns = reversed(piece.shape) if piece.transposed else piece.shape
    return QuantizedLinear(piece.source.removesuffix(".weight"), math.prod(rows), columns)
