"""A safetensors file written from front to back, one tensor in memory at a time. Knows no model."""

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
from torch import Tensor

_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int8: "I8",
    torch.uint8: "U8",
}
_ALIGNMENT = 8


@dataclass(frozen=True, slots=True)
class Entry:
    """A tensor to come."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


class SafetensorsWriter:
    """The header first, so all names, shapes and types are known from the start; then every tensor, in that order."""

    def __init__(self, path: Path, entries: Mapping[str, Entry]) -> None:
        self._left = list(entries.items())[::-1]
        self._rows_left = 0
        self._file = path.open("wb")
        header = _header(entries)
        self._file.write(struct.pack("<Q", len(header)) + header)

    def begin(self, name: str) -> None:
        """The next tensor's rows follow."""
        expected, entry = self._left.pop()
        assert expected == name and not self._rows_left, f"{name} is written where {expected} belongs"
        self._entry = entry
        self._rows_left = entry.shape[0]

    def rows(self, rows: Tensor) -> None:
        """The tensor's next rows."""
        entry = self._entry
        assert rows.dtype == entry.dtype and rows.shape[1:] == entry.shape[1:], f"{rows.shape} {rows.dtype}: {entry}"
        self._rows_left -= len(rows)
        self._file.write(rows.flatten().view(torch.uint8).numpy().data)

    def write(self, name: str, tensor: Tensor) -> None:
        """A whole tensor."""
        self.begin(name)
        self.rows(tensor)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._file.close()
        assert error is not None or not (self._left or self._rows_left), f"not written: {self._left}"


def _header(entries: Mapping[str, Entry]) -> bytes:
    fields: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, entry in entries.items():
        begin, end = end, end + entry.num_bytes
        fields[name] = {"dtype": _NAMES[entry.dtype], "shape": entry.shape, "data_offsets": [begin, end]}
    text = json.dumps(fields).encode()
    return text + b" " * (-len(text) % _ALIGNMENT)
