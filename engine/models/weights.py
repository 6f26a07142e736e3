"""The tensors of a safetensors checkpoint, row by row or whole, without ever holding a whole file in memory.

Owns reading: the files' headers, rows into memory, and what can be wrong with them. Knows no family and no parameter.

Files are read, not mapped: from the page cache a copy costs about what mapping its pages does, but counts only once
towards the process, and a file that shrinks meanwhile is an error instead of a signal.
"""

import io
import json
import math
import os
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from engine.errors import ModelError
from engine.models.pieces import Run
from engine.parallel.slices import Run as Columns

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_SLICE_BYTES = 8 * 2**20
"""Of the file at a time: enough blocks for many threads, and checked and converted while caches still hold it."""
_LENGTH_BYTES = 8
"""Of the number, little endian, that a file begins with: the length of the JSON that follows."""
_FLOATS = ("F64", "F32", "F16", "BF16")
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True, slots=True)
class _Entry:
    """One tensor of a file, as its header has it."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    """Offset in the file."""

    @property
    def row_shape(self) -> tuple[int, ...]:
        return self.shape[1:][-1:]

    @property
    def rows(self) -> int:
        """Of a matrix, or of all the matrices that it holds one below the other; elements of a vector."""
        return math.prod(self.shape[: max(1, len(self.shape) - 1)])


class Checkpoint:
    """The safetensors files of one directory. A file is open only while some of it is read."""

    def __init__(self, folder: Path) -> None:
        """Reads the headers. Raises ModelError unless each agrees with its file's length."""
        self.origin = _origin(folder)
        """The file that says which tensors there are."""
        if self.origin.name == _SINGLE:
            self._entries = {self.origin: _read_header(self.origin)}
            self._files = dict.fromkeys(self._entries[self.origin], self.origin)
            """Tensor name -> its file."""
        else:
            self._files = _read_index(self.origin)
            self._entries = {file: _read_header(file) for file in sorted(set(self._files.values()))}
        self.names = frozenset(self._files)
        """Of all tensors."""
        self._idle: list[Tensor] = []
        """Buffers for slices that nobody iterates over now."""

    def check(self, name: str, *shapes: tuple[int, ...]) -> None:
        """Raises ModelError unless the tensor is there with one of these shapes, if any are given."""
        if name not in self._files:
            raise ModelError(f"{self.origin}: tensor {name!r} is missing; the model's config asks for it")
        found = self.shape(name)
        if shapes and found not in shapes:
            expected = " or ".join(map(str, shapes))
            raise self.error(name, f"has shape {found}; the config asks for {expected}")

    def check_is_float(self, name: str) -> None:
        """Raises ModelError for integers, which are no weights unless the config says in what format."""
        dtype = self._entry(name).dtype
        if dtype not in _FLOATS:
            raise self.error(name, f"holds {dtype}, yet config.json does not declare it as quantized")

    def error(self, name: str, reason: str) -> ModelError:
        return ModelError(f"{self._files[name]}: tensor {name!r} {reason}")

    def shape(self, name: str) -> tuple[int, ...]:
        return self._entry(name).shape

    def dtype(self, name: str) -> torch.dtype:
        """Raises ModelError for one that is no number here."""
        found = self._entry(name).dtype
        if found not in _DTYPES:
            raise self.error(name, f"holds {found}, which cannot be read; known are {', '.join(_DTYPES)}")
        return _DTYPES[found]

    def read(self, name: str, *shapes: tuple[int, ...]) -> Tensor:
        """The whole tensor, as `check` and `read_into` would have it."""
        self.check(name, *shapes)
        shape = self.shape(name)
        if not shape:
            raise self.error(name, "is a single number; expected rows")
        whole, entry = torch.empty(shape, dtype=self.dtype(name)), self._entry(name)
        self.read_into(name, Run(0, 0, entry.rows), whole.view(entry.rows, *entry.row_shape))
        return whole

    def read_window(self, name: str, window: Collection[Columns]) -> Tensor:
        """What lies in a run of each axis of a vector or matrix, as `read_into` would have it."""
        rows, *columns = window
        part = torch.empty([run.count for run in window], dtype=self.dtype(name))
        self.read_into(name, Run(rows.start, 0, rows.count), part, columns[0] if columns else None)
        return part

    def read_into(self, name: str, run: Run, rows: Tensor, columns: Columns | None = None) -> None:
        """Reads a run into `rows`, its place alone: contiguous, in host memory, of the tensor's own dtype.

        Of each row, these columns; None is all. Raises ModelError at a value that is NaN or infinite, and where the
        file cannot be read.
        """
        for _ in self._slices(name, run, columns, lambda start, stop: rows[start:stop]):
            pass

    def row_slices(self, name: str, run: Run, columns: Columns | None = None) -> Iterator[tuple[int, Tensor]]:
        """Yields (row within the run, rows) in slices of a few MiB. A slice is valid until the next one is taken.

        Raises ModelError as `read_into` does.
        """
        shape = self._entry(name).row_shape if columns is None else (columns.count,)
        dtype = self.dtype(name)
        num_bytes = self._rows_at_once(name) * _row_bytes(shape, dtype)
        buffer = self._idle.pop() if self._idle else torch.empty(0, dtype=torch.uint8)
        if len(buffer) < num_bytes:
            buffer = torch.empty(num_bytes, dtype=torch.uint8)
        held = buffer[:num_bytes].view(dtype).view(-1, *shape)
        try:
            yield from self._slices(name, run, columns, lambda start, stop: held[: stop - start])
        finally:
            self._idle.append(buffer)

    def _slices(
        self, name: str, run: Run, columns: Columns | None, place: Callable[[int, int], Tensor]
    ) -> Iterator[tuple[int, Tensor]]:
        """Reads each slice [start, stop) of a run to its place; yields (start, rows there)."""
        entry, dtype = self._entry(name), self.dtype(name)
        row_bytes, step = _row_bytes(entry.row_shape, dtype), self._rows_at_once(name)
        with _open(self._files[name]) as file:
            for start in range(0, run.rows, step):
                rows = place(start, min(start + step, run.rows))
                begin = entry.begin + (run.source + start) * row_bytes
                data = rows.flatten().view(torch.uint8).numpy().data
                if columns is None or _row_bytes((columns.count,), dtype) == row_bytes:
                    self._fill(name, file, begin, data)
                else:
                    begin, part = begin + columns.start * dtype.itemsize, columns.count * dtype.itemsize
                    for index in range(len(rows)):
                        self._fill(name, file, begin + index * row_bytes, data[index * part : (index + 1) * part])
                if not _is_finite(rows):
                    bad = torch.isfinite(rows).reshape(len(rows), -1).all(dim=1).logical_not().nonzero()
                    raise self.error(name, f"is NaN or infinite in row {run.source + start + int(bad[0])}")
                yield start, rows

    def _fill(self, name: str, file: io.FileIO, begin: int, left: memoryview) -> None:
        """Reads the bytes of the file from `begin` on."""
        while left:
            try:
                count = os.preadv(file.fileno(), [left], begin)
            except OSError as error:
                raise self.error(name, f"cannot be read ({error})") from error
            if not count:
                raise self.error(name, "is cut off: the file has become shorter; copy it again")
            left, begin = left[count:], begin + count

    def _rows_at_once(self, name: str) -> int:
        entry = self._entry(name)
        return min(max(1, _SLICE_BYTES // max(1, _row_bytes(entry.row_shape, self.dtype(name)))), entry.rows)

    def _entry(self, name: str) -> _Entry:
        file = self._files[name]
        entry = self._entries[file].get(name)
        if entry is None:
            raise ModelError(f"{file}: tensor {name!r} is missing, though {_INDEX} places it here")
        return entry


def _origin(folder: Path) -> Path:
    for name in (_SINGLE, _INDEX):
        if (folder / name).exists():
            return folder / name
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
    return files


def _read_header(file: Path) -> dict[str, _Entry]:
    try:
        with safe_open(str(file), framework="pt", device="cpu"):
            pass  # The library's own reader checks every offset and the file's length.
    except (SafetensorError, OSError) as error:
        raise ModelError(
            f"{file}: not a complete safetensors file ({error}); it may be truncated: download or copy it again"
        ) from error
    with _open(file) as opened:
        length = int.from_bytes(opened.read(_LENGTH_BYTES), "little")
        header: dict[str, Any] = json.loads(opened.read(length))
    header.pop("__metadata__", None)
    begin = _LENGTH_BYTES + length
    return {
        name: _Entry(tensor["dtype"], tuple(tensor["shape"]), begin + tensor["data_offsets"][0])
        for name, tensor in header.items()
    }


def _open(file: Path) -> io.FileIO:
    try:
        return io.FileIO(file)
    except OSError as error:
        raise ModelError(f"{file}: cannot be read ({error})") from error


def _row_bytes(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    return math.prod(shape) * dtype.itemsize


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
