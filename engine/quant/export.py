"""Writes a quantized copy of a model directory, in the compressed-tensors format that other servers read too.

Tensor by tensor: what is in memory is one slice of rows and one layer's result. The linear layers of the blocks are
quantized; embeddings, head and everything else are copied. Owns the copy's files and their names; what the numbers are
is `engine.quant.quantize`'s.
"""

import json
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine.errors import ModelError
from engine.models.directory import CONFIG, find_family, find_quantization, load_spec, read_json
from engine.models.parameters import check_groups, is_saved_constant
from engine.models.pieces import Piece, Run
from engine.models.weights import Checkpoint
from engine.quant.config import Scheme
from engine.quant.formats import NIBBLES
from engine.quant.plan import is_layer_linear
from engine.quant.quantize import THOROUGH, Int4Rows, Int8Rows, pack_nibbles
from engine.quant.smooth import Scaling
from engine.quant.weights import Int4Weight, Int8Weight
from engine.quant.workers import Workers
from engine.quant.writer import Entry, SafetensorsWriter

WEIGHTS = "model.safetensors"
_COPIED = ("*.json", "*.jinja", "*.txt", "*.model", "LICENSE*")
_NOT_COPIED = (CONFIG, "model.safetensors.index.json")
_DENSE_LINEARS = ("head.weight", "project_in.weight", "project_out.weight", "router.weight", "shared_gate.weight")
_NO_SCALING = Scaling()


@dataclass(slots=True)
class Report:
    """What was written. Bytes are of tensors."""

    bytes_before: int = 0
    bytes_after: int = 0
    num_quantized: int = 0
    squared_error: float = 0.0
    squared_weights: float = 0.0
    errors: dict[str, float] = field(default_factory=dict)
    """Of each quantized layer, as `error`."""

    @property
    def error(self) -> float:
        """Root mean square of what quantization changed, as a share of the weights' own (after smoothing)."""
        return math.sqrt(self.squared_error / self.squared_weights) if self.squared_weights else 0.0


@dataclass(frozen=True, slots=True)
class Target:
    """Into what the layers are quantized."""

    scheme: Scheme
    group: int = 64
    """Input channels to a scale in "w4a16"."""


class Exporter:
    """One model directory and what is to become of it. Everything that can be wrong is found when it is made."""

    def __init__(self, source: Path, target: Target, smoothing: Mapping[str, Scaling] | None = None) -> None:
        """`smoothing` are factors by parameter name. Raises ModelError."""
        if find_quantization(source) is not None:
            raise ModelError(f"{source / CONFIG}: the checkpoint is quantized already; quantize the full one")
        self._source, self._target = source, target
        self._smoothing = smoothing or {}
        self._checkpoint = Checkpoint(source)
        self._names = sorted(name for name in self._checkpoint.names if not is_saved_constant(name))
        spec = load_spec(source)
        pieces = list(find_family(source).pieces(spec, self._checkpoint.names))
        for piece in pieces:
            self._checkpoint.check(piece.source, piece.shape)
        self._pieces = {piece.source: piece for piece in pieces}
        self._linears = {name: piece for name, piece in self._pieces.items() if is_layer_linear(piece.target)}
        for piece in self._linears.values():
            if piece.transposed:
                raise ModelError(
                    f"{source}: {piece.source!r} is stored as [in, out], which compressed-tensors does not know; "
                    f"quantize such a model as it is loaded: --quantization {target.scheme}"
                )
            if len(piece.shape) != 2:
                raise ModelError(
                    f"{source}: {piece.source!r} holds all experts at once, which compressed-tensors does not know; "
                    f"quantize such a model as it is loaded: --quantization {target.scheme}"
                )
        if target.scheme == "w4a16":
            check_groups(self._checkpoint, self._linears.values(), target.group)

    @property
    def num_tensors(self) -> int:
        return len(self._names)

    def write(self, out: Path, *, force: bool = False, advance: Callable[[], None] = lambda: None) -> Report:
        """Writes the directory `out`; calls `advance` after each tensor of the source.

        An interrupted run leaves nothing under that name. Raises ModelError if it exists, unless `force` replaces it.
        """
        check_is_free(out, force=force)
        out.parent.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
        try:
            report = self._write_weights(aside / WEIGHTS, advance)
            self._write_config(aside)
            self._copy_files(aside)
            aside.chmod(0o755)
            replace_directory(aside, out)
        except BaseException:
            shutil.rmtree(aside, ignore_errors=True)
            raise
        return report

    def _write_weights(self, path: Path, advance: Callable[[], None]) -> Report:
        entries = {name: entry for source in self._names for name, entry in self._entries(source)}
        report = Report(bytes_after=sum(entry.num_bytes for entry in entries.values()))
        with SafetensorsWriter(path, entries) as writer, Workers() as workers:
            for name in self._names:
                if name in self._linears:
                    self._write_linear(writer, name, report, workers)
                else:
                    self._copy_tensor(writer, name, report)
                advance()
        return report

    def _entries(self, name: str) -> Iterator[tuple[str, Entry]]:
        """What a tensor of the source becomes."""
        shape, dtype = self._checkpoint.shape(name), self._checkpoint.dtype(name)
        if name not in self._linears:
            yield name, Entry(shape, dtype)
            return
        module, (rows, columns) = name.removesuffix(".weight"), shape
        if self._target.scheme == "w8a8":
            yield f"{module}.weight", Entry(shape, torch.int8)
            yield f"{module}.weight_scale", Entry((rows, 1), torch.float32)
            return
        groups = columns // self._target.group
        yield f"{module}.weight_packed", Entry((rows, columns // 8), torch.int32)
        yield f"{module}.weight_scale", Entry((rows, groups), dtype)
        yield f"{module}.weight_zero_point", Entry((-(-rows // 8), groups), torch.int32)
        yield f"{module}.weight_shape", Entry((2,), torch.int64)

    def _write_linear(self, writer: SafetensorsWriter, name: str, report: Report, workers: Workers) -> None:
        shape, module = self._checkpoint.shape(name), name.removesuffix(".weight")
        error, norm = 0.0, 0.0
        rows: Int8Rows | Int4Rows
        if self._target.scheme == "w8a8":
            rows = Int8Rows.empty(shape, workers=workers)
        else:
            rows = Int4Rows.empty(shape, self._target.group, THOROUGH, workers=workers)
        for start, full in self._scaled_rows(name):
            rows.put(start, full)
            error += float((_rows_of(rows.weight, start, len(full)).dequantize() - full).square().sum())
            norm += float(full.square().sum())
        for suffix, tensor in _spelled(rows.weight, self._checkpoint.dtype(name)):
            writer.write(f"{module}.{suffix}", tensor)
        report.bytes_before += Entry(shape, self._checkpoint.dtype(name)).num_bytes
        report.num_quantized += 1
        report.squared_error += error
        report.squared_weights += norm
        report.errors[module] = math.sqrt(error / norm) if norm else 0.0

    def _copy_tensor(self, writer: SafetensorsWriter, name: str, report: Report) -> None:
        entry = Entry(self._checkpoint.shape(name), self._checkpoint.dtype(name))
        report.bytes_before += entry.num_bytes
        writer.begin(name)
        if self._scaling(name) is _NO_SCALING:
            for _, rows in self._checkpoint.row_slices(name, _all(entry.shape)):
                writer.rows(rows)
        else:
            for _, rows in self._scaled_rows(name):
                writer.rows(rows.to(entry.dtype))

    def _scaled_rows(self, name: str) -> Iterator[tuple[int, Tensor]]:
        """(first row, rows in float32) of a tensor with its smoothing factors."""
        shape, scaling = self._checkpoint.shape(name), self._scaling(name)
        row_factors = _in_source_order(scaling.rows, self._pieces.get(name), shape[0])
        for start, rows in self._checkpoint.row_slices(name, _all(shape)):
            full = rows.to(torch.float32)
            if row_factors is not None:
                full = full * row_factors[start : start + len(rows)].view(-1, *[1] * (full.dim() - 1))
            if scaling.columns is not None:
                full = full * scaling.columns
            yield start, full

    def _scaling(self, name: str) -> Scaling:
        piece = self._pieces.get(name)
        return _NO_SCALING if piece is None else self._smoothing.get(piece.target, _NO_SCALING)

    def _write_config(self, out: Path) -> None:
        config = read_json(self._source / CONFIG)
        # Others hold these as linear layers, which they would take for quantized; a tied head has no tensor to tell it.
        dense = (name for name, piece in self._pieces.items() if piece.target.endswith(_DENSE_LINEARS))
        ignored = {name.removesuffix(".weight") for name in dense}
        config["quantization_config"] = quantization_config(self._target, sorted({"lm_head", *ignored}))
        (out / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")

    def _copy_files(self, out: Path) -> None:
        for file in {file for pattern in _COPIED for file in self._source.glob(pattern)}:
            if file.is_file() and file.name not in _NOT_COPIED:
                shutil.copyfile(file, out / file.name)


def check_is_free(out: Path, *, force: bool) -> None:
    """Raises ModelError if something is there that may not be replaced."""
    if not out.exists():
        return
    if not force:
        raise ModelError(f"{out}: exists; --force replaces it")
    if not (out / CONFIG).is_file():
        raise ModelError(f"{out}: is no model directory (it has no {CONFIG}), so it is not replaced")


def replace_directory(new: Path, out: Path) -> None:
    """Renames `new` to `out`. What was there before is removed last, so that there always is a whole one."""
    if not out.exists():
        new.rename(out)
        return
    old = out.with_name(f".{out.name}-{os.getpid()}-old")
    out.rename(old)
    new.rename(out)
    shutil.rmtree(old)


def quantization_config(target: Target, ignored: list[str]) -> dict[str, Any]:
    """What config.json says of the weights, in the words of compressed-tensors."""
    weights: dict[str, Any]
    inputs: dict[str, Any] | None = None
    if target.scheme == "w8a8":
        weights = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel", "dynamic": False}
        inputs = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
    else:
        weights = {"num_bits": 4, "type": "int", "symmetric": False, "strategy": "group", "dynamic": False}
        weights["group_size"] = target.group
    layout = "int-quantized" if target.scheme == "w8a8" else "pack-quantized"
    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs, "output_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": layout,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group | {"format": layout}},
        "ignore": ignored,
        "kv_cache_scheme": None,
    }


def _rows_of(weight: Int8Weight | Int4Weight, start: int, count: int) -> Int8Weight | Int4Weight:
    part = slice(start, start + count)
    if isinstance(weight, Int8Weight):
        return Int8Weight(weight.values[part], weight.scale[part])
    return Int4Weight(weight.packed[part], weight.scale[part], None if weight.zero is None else weight.zero[part])


def _spelled(weight: Int8Weight | Int4Weight, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """The tensors of one layer in compressed-tensors' words; scales of 4-bit groups in the model's own type."""
    if isinstance(weight, Int8Weight):
        yield "weight", weight.values
        yield "weight_scale", weight.scale[:, None]
        return
    assert weight.zero is not None
    yield "weight_packed", weight.packed.view(torch.int32)
    yield "weight_scale", weight.scale.to(dtype)
    yield "weight_zero_point", _packed_down(weight.zero)
    yield "weight_shape", torch.tensor(weight.shape)


def _packed_down(zero: Tensor) -> Tensor:
    """[rows, groups] uint8 to [rows / 8, groups] int32: eight rows to a word, the first in its lowest bits."""
    padded = torch.nn.functional.pad(zero, (0, 0, 0, -len(zero) % NIBBLES)).T
    # Flat, for the strides of a single row or column are no guide to how bytes follow each other.
    return pack_nibbles(padded).flatten().view(torch.int32).view(zero.shape[1], -1).T.contiguous()


def _in_source_order(factors: Tensor | None, piece: Piece | None, rows: int) -> Tensor | None:
    """Factors of a parameter's rows, for the rows of one of its pieces."""
    if factors is None or piece is None:
        return None
    ordered = torch.ones(rows)
    for run in piece.runs:
        ordered[run.source : run.source + run.rows] = factors[run.target : run.target + run.rows]
    return ordered


def _all(shape: tuple[int, ...]) -> Run:
    return Run(0, 0, shape[0])
