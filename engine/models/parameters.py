"""From the tensors of a checkpoint to the parameters of a decoder, one parameter at a time.

Which tensor goes where is a family's knowledge (`Piece`); what the parameters are called and how large they are is the
spec's; how a quantized layer is spelled is its format's. This puts them together: dense rows are converted, or
quantized, slice by slice as they are read, and quantized layers that a checkpoint holds apart are merged. Nothing is
read before it is asked for: who packs each parameter before the next one never has the model in memory twice.
"""

import logging
import math
from collections.abc import Collection, Iterable, Iterator, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from engine.memory import Recycler
from engine.models.pieces import Piece, Run
from engine.models.spec import ModelSpec
from engine.models.weights import Checkpoint
from engine.quant.config import CheckpointFormat, Scheme
from engine.quant.formats import QuantizedLinear, is_quantized, read_linear, tensor_names
from engine.quant.merge import Part, Unmergeable, merge
from engine.quant.plan import Kind, group_obstacle, is_layer_linear, kind_of
from engine.quant.quantize import QUICK, Int4Rows, Int8Rows
from engine.quant.weights import Int4Weight, Int8Weight, Weight, weight_bytes
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

    def kind(self, parameter: str, spec: ModelSpec) -> Kind:
        if self.layout is not None and is_layer_linear(parameter):
            return "dense"
        return kind_of(parameter, spec, self.scheme)


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
    """Where a parameter comes from, and what is to become of it."""

    pieces: Sequence[Piece]
    shape: tuple[int, ...]
    kind: Kind


class Parameters(MutableMapping[str, Weight]):
    """Every parameter of `spec.parameter_shapes()`, read when it is first asked for.

    What is taken out at once (`pop`) is held by its taker alone; what is looked at stays until it is taken. What is
    wrong with a dense tensor's shape or dtype is found when this is made, so that a wrong checkpoint fails in
    milliseconds; what is wrong with values, or with a quantized layer, when it is read. Both raise ModelError.
    """

    def __init__(self, checkpoint: Checkpoint, spec: ModelSpec, pieces: Iterable[Piece], form: Form) -> None:
        by_target: dict[str, list[Piece]] = {name: [] for name in spec.parameter_shapes()}
        for piece in pieces:
            by_target[piece.target].append(piece)
        _check(checkpoint, spec, by_target, form)
        _warn_of_unused(checkpoint, by_target, form)
        shapes = spec.parameter_shapes()
        self._checkpoint = checkpoint
        self._form = form
        self._entries: dict[str, Weight | _Unread] = {
            name: _Unread(parts, shapes[name], form.kind(name, spec)) for name, parts in by_target.items()
        }
        self._memory = Recycler()
        self.bytes_read = 0
        """Of all parameters that have been read, as they are held."""

    def __getitem__(self, name: str) -> Weight:
        entry = self._entries[name]
        if isinstance(entry, _Unread):
            entry = self._entries[name] = _read_parameter(self._checkpoint, entry, self._form, self._memory)
            self.bytes_read += weight_bytes(entry)
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
            return _read_quantized(checkpoint, unread.pieces, unread.shape[0], form.layout, form.device)
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
                _fill(checkpoint, piece, rows)
    return rows.weight


def _rows(kind: Literal["int8", "int4"], shape: tuple[int, ...], form: Form, workers: Workers) -> Rows:
    if kind == "int8":
        return Int8Rows.empty(shape, form.device, workers)
    return Int4Rows.empty(shape, form.group, form.shares, form.device, workers)


def _read_dense(checkpoint: Checkpoint, unread: _Unread, weight: Tensor) -> Tensor:
    """Into `weight`, which may hold anything."""
    for piece in unread.pieces:
        if piece.transposed:
            _fill_columns(checkpoint, piece, weight)
        elif weight.device.type == "cpu" and checkpoint.dtype(piece.source) == weight.dtype:
            for run in piece.runs:
                checkpoint.read_into(piece.source, run, weight[run.target : run.target + run.rows])
        else:
            _fill(checkpoint, piece, DenseRows(weight))
    return weight


def _fill(checkpoint: Checkpoint, piece: Piece, rows: Rows) -> None:
    for run in piece.runs:
        for start, found in checkpoint.row_slices(piece.source, run):
            rows.put(run.target + start, found)


def _fill_columns(checkpoint: Checkpoint, piece: Piece, weight: Tensor) -> None:
    for run in piece.runs:
        for start, found in checkpoint.row_slices(piece.source, run):
            weight[:, run.target + start :][:, : len(found)].copy_(found.T)


def _read_quantized(
    checkpoint: Checkpoint, pieces: Sequence[Piece], rows: int, layout: CheckpointFormat, device: torch.device | str
) -> Weight:
    parts = []
    for piece in pieces:
        linear = _linear(piece)
        # Quantizers turn [in, out] layers around: their tensors have a layer's outputs as rows whatever it was before.
        runs = (Run(0, 0, linear.rows),) if piece.transposed else piece.runs
        parts.append(Part(read_linear(layout, checkpoint, linear), runs))
    try:
        return _to_device(merge(parts, rows), device)
    except Unmergeable as error:
        names = ", ".join(repr(_linear(piece).module) for piece in pieces)
        raise checkpoint.error(
            next(iter(tensor_names(checkpoint.names, _linear(pieces[0]).module))),
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
