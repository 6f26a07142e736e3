"""The tensors of a safetensors checkpoint, row by row or whole, without ever holding a whole file in memory.

Owns reading: memory-mapped files, row slices, and what can be wrong with them. Knows no family and no parameter.
"""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from engine.errors import ModelError
from engine.models.pieces import Run

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_MAPPED_SHARE = 20
"""A file is mapped anew after this fraction, 1 / _MAPPED_SHARE, of all bytes; within the two bounds that follow."""
_MIN_MAPPED_BYTES, _MAX_MAPPED_BYTES = 4 * 2**20, 64 * 2**20
_SLICE_BYTES = 4 * 2**20
_FLOATS = ("F64", "F32", "F16", "BF16")


class Checkpoint:
    """The safetensors files of one directory. Reads rows; never a whole file into memory."""

    def __init__(self, folder: Path) -> None:
        self._files = _locate(folder)
        """Tensor name -> its file."""
        self.origin = folder / (_SINGLE if (folder / _SINGLE).exists() else _INDEX)
        """The file that says which tensors there are."""
        self._handle: Any = None
        self._open_file: Path | None = None
        self._bytes_read = 0
        total = sum(file.stat().st_size for file in set(self._files.values()))
        self._mapped_bytes = min(max(total // _MAPPED_SHARE, _MIN_MAPPED_BYTES), _MAX_MAPPED_BYTES)

    @property
    def names(self) -> frozenset[str]:
        return frozenset(self._files)

    def check(self, name: str, *shapes: tuple[int, ...]) -> None:
        """Raises ModelError unless the tensor is there with one of these shapes, if any are given."""
        if name not in self._files:
            raise ModelError(f"{self.origin}: tensor {name!r} is missing; the model's config asks for it")
        found = tuple(self._slice(name).get_shape())
        if shapes and found not in shapes:
            expected = " or ".join(map(str, shapes))
            raise self.error(name, f"has shape {found}; the config asks for {expected}")

    def check_is_float(self, name: str) -> None:
        """Raises ModelError for integers, which are no weights unless the config says in what format."""
        dtype = self._slice(name).get_dtype()
        if dtype not in _FLOATS:
            raise self.error(name, f"holds {dtype}, yet config.json does not declare it as quantized")

    def error(self, name: str, reason: str) -> ModelError:
        return ModelError(f"{self._files[name]}: tensor {name!r} {reason}")

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._slice(name).get_shape())

    def dtype(self, name: str) -> torch.dtype:
        return self._slice(name)[:0].dtype

    def read(self, name: str, *shapes: tuple[int, ...]) -> Tensor:
        """The whole tensor, as `check` and `row_slices` would have it."""
        self.check(name, *shapes)
        shape = self.shape(name)
        if not shape:
            raise self.error(name, "is a single number; expected rows")
        whole = torch.empty(0)
        for start, rows in self.row_slices(name, Run(0, 0, shape[0])):
            if start == 0:
                whole = torch.empty(shape, dtype=rows.dtype)
            whole[start : start + len(rows)] = rows
        return whole

    def row_slices(self, name: str, run: Run) -> Iterator[tuple[int, Tensor]]:
        """Yields (row within the run, rows) in slices of a few MiB. A slice is valid until the next one is taken.

        Pages of a mapped file count as resident once read, so the file is mapped anew now and then: otherwise loading
        would peak at twice the weights. Raises ModelError at a value that is NaN or infinite.
        """
        shape = self._slice(name).get_shape()
        row_elements = max(1, int(torch.Size(shape[1:]).numel()))
        step = max(1, _SLICE_BYTES // (4 * row_elements))
        for start in range(0, run.rows, step):
            stop = min(start + step, run.rows)
            rows = self._slice(name)[run.source + start : run.source + stop]
            if not _is_finite(rows):
                bad = torch.isfinite(rows).reshape(len(rows), -1).all(dim=1).logical_not().nonzero()
                raise self.error(name, f"is NaN or infinite in row {run.source + start + int(bad[0])}")
            self._bytes_read += rows.numel() * rows.element_size()
            yield start, rows
            del rows
            if self._bytes_read >= self._mapped_bytes:
                self.close()

    def close(self) -> None:
        self._handle = self._open_file = None
        self._bytes_read = 0

    def _slice(self, name: str) -> Any:
        file = self._files[name]
        if file != self._open_file:
            self.close()
            self._handle, self._open_file = _open(file), file
        try:
            return self._handle.get_slice(name)
        except SafetensorError as error:
            raise ModelError(f"{file}: tensor {name!r} is missing, though {_INDEX} places it here") from error


def _locate(folder: Path) -> dict[str, Path]:
    """Which file holds each tensor; every file's header has been read and agrees with the file's length."""
    single, index = folder / _SINGLE, folder / _INDEX
    if single.exists():
        return dict.fromkeys(_open(single).keys(), single)
    if index.exists():
        return _read_index(index)
    raise ModelError(_nothing_to_load(folder))


def _read_index(index: Path) -> dict[str, Path]:
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        files = {str(name): index.parent / str(file) for name, file in weight_map.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f'{index}: expected JSON with a "weight_map" of tensor names to files ({error!r})') from error
    for file in sorted(set(files.values())):
        if not file.exists():
            raise ModelError(f"{file}: shard is missing, though {_INDEX} names it; download or copy it again")
        _open(file)
    return files


def _open(file: Path) -> Any:
    try:
        return safe_open(str(file), framework="pt", device="cpu")
    except (SafetensorError, OSError) as error:
        raise ModelError(
            f"{file}: not a complete safetensors file ({error}); it may be truncated: download or copy it again"
        ) from error


def _is_finite(rows: Tensor) -> bool:
    """One vectorised pass without temporaries: both extremes of values with a NaN among them are NaN."""
    if not rows.is_floating_point() or rows.numel() == 0:
        return True
    low, high = torch.aminmax(rows)
    return math.isfinite(low) and math.isfinite(high)


def _nothing_to_load(folder: Path) -> str:
    pickles = sorted(file.name for pattern in ("*.bin", "*.pt", "*.pth") for file in folder.glob(pattern))
    if pickles:
        return (
            f"{folder / pickles[0]}: pickled weights are not supported; convert the model once with transformers: "
            'AutoModelForCausalLM.from_pretrained(DIR).save_pretrained(DIR) writes "model.safetensors"'
        )
    return f"{folder}: no weights found; expected {_SINGLE}, or {_INDEX} and the shards that it names"
