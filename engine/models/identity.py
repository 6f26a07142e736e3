"""Which model a directory holds, told by what is in it: wherever the same files lie, they have the same name.

Pages of keys and values outlive processes, so two models must never be taken for one.
"""

import hashlib
import json
from itertools import chain
from pathlib import Path
from typing import BinaryIO

from engine.errors import ModelError

PIECE_BYTES = 4096
LEAST_PIECES = 8
"""Of a tensor: enough for each part of one that several were merged into."""
STRIDE_BYTES = 4 * 2**20
"""Of a large tensor one piece is read for so many bytes."""
_LENGTH_BYTES = 8
"""Of the number, little endian, that a safetensors file begins with: the length of the JSON that follows."""

_Spans = list[tuple[int, int]]
"""Parts of a file: begin and end."""


def model_identity(folder: Path) -> bytes:
    """A digest (32 bytes) of the configuration and the weights.

    Of safetensors it covers the header and pieces of every tensor, spread over all of it; all of any other file.
    Training changes all of a tensor, but not always all tensors; to read all of every one would take as long as to load
    the model. Raises ModelError.
    """
    digest = hashlib.blake2b(digest_size=32)
    try:
        for path in sorted(folder.iterdir()):
            if path.suffix in (".json", ".safetensors"):
                digest.update(len(path.name.encode()).to_bytes(8, "little") + path.name.encode())
                digest.update(_file_digest(path))
    except OSError as error:
        raise ModelError(f"{folder}: {error.strerror or error}") from error
    return digest.digest()


def pieces(begin: int, end: int) -> _Spans:
    """What is read of a tensor that lies there: all of a small one, else its first and last bytes and some between."""
    length = end - begin
    if length <= LEAST_PIECES * PIECE_BYTES:
        return [(begin, end)]
    gaps = max(LEAST_PIECES, length // STRIDE_BYTES) - 1
    places = (begin + index * (length - PIECE_BYTES) // gaps for index in range(gaps + 1))
    return [(place, place + PIECE_BYTES) for place in places]


def _file_digest(path: Path) -> bytes:
    digest = hashlib.blake2b(digest_size=32)
    with path.open("rb") as file:
        length = file.seek(0, 2)
        digest.update(length.to_bytes(8, "little"))
        spans = _tensors(file, length) if path.suffix == ".safetensors" else [(0, length)]
        for begin, end in spans:
            file.seek(begin)
            digest.update(file.read(end - begin))
    return digest.digest()


def _tensors(file: BinaryIO, length: int) -> _Spans:
    """What is read of a safetensors file; one that is none, which no loader takes, is read like a single tensor."""
    file.seek(0)
    data = _LENGTH_BYTES + int.from_bytes(file.read(_LENGTH_BYTES), "little")
    if data > length:
        return pieces(0, length)
    try:
        header = json.loads(file.read(data - _LENGTH_BYTES))
        offsets = [tensor["data_offsets"] for name, tensor in header.items() if name != "__metadata__"]
        spans = sorted((data + int(begin), data + int(end)) for begin, end in offsets)
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError):
        return pieces(0, length)
    if not all(data <= begin <= end <= length for begin, end in spans):
        return pieces(0, length)
    return [(0, data), *chain.from_iterable(pieces(begin, end) for begin, end in spans)]
