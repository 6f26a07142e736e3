"""How values are written in messages between a group and its ranks, and how they are checked when they are read.

A message is a msgpack array of its kind and its fields; arrays of numbers are their bytes, little-endian, of a type
that the field fixes. Nothing is pickled. Knows no message.
"""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import msgpack
import numpy as np
from numpy.typing import NDArray

from cluster.kv.wire import WireError, open_message

MAX_BYTES = 256 * 2**20
"""Of a message: 4,096 sequences with 16,384 pages each."""
MAX_TEXT = 4096
_LARGEST = 2**63 - 1

I64, I32, U8 = np.dtype("<i8"), np.dtype("<i4"), np.dtype("u1")
F64, F32 = np.dtype("<f8"), np.dtype("<f4")
Array = NDArray[Any]
M = TypeVar("M")
B = TypeVar("B", bytes, bytearray, bytes | bytearray)
Kind = tuple[str, int, Callable[..., M]]
"""A message's name, how many fields it has, and what reads them."""


def pack(name: str, content: list[Any]) -> bytes:
    """The bytes of a message: its kind, then its fields. Raises WireError."""
    try:
        data: bytes = msgpack.packb(content)
    except (ValueError, TypeError, OverflowError) as error:
        raise WireError(f"a {name} that cannot be written: {error}") from None
    return bounded(name, data)


def bounded(name: str, data: B) -> B:
    """The bytes of a message. Raises WireError for too many."""
    if len(data) > MAX_BYTES:
        raise WireError(f"a {name} of {len(data)} bytes; {MAX_BYTES} are the most")
    return data


def unpack(data: bytes | bytearray, kinds: Sequence[Kind[M]]) -> M:
    """The message, by the kind that is its place among `kinds`. Raises WireError for anything that is not one."""
    (name, count, read), values = open_message(bounded("message", data), kinds)
    if len(values) != count:
        raise WireError(f"a {name} has {count} fields, got {len(values)}")
    try:
        return read(*values)
    except WireError as error:
        raise WireError(f"{name}: {error}") from None


def bytes_of(numbers: Array, dtype: np.dtype[Any]) -> bytes:
    """The bytes of an array of this type. Raises WireError for another type, as all that follow do for other values."""
    if numbers.dtype != dtype:
        raise WireError(f"an array of {numbers.dtype}; the field is one of {dtype}")
    return numbers.tobytes()


def array(value: Any, dtype: np.dtype[Any], length: int | None = None) -> Array:
    """The numbers of a field. A copy, which may be written to: torch warns of tensors that may not."""
    if type(value) is not bytes or len(value) % dtype.itemsize:
        raise WireError(f"expected the bytes of numbers of {dtype.itemsize} bytes each, got {value!r:.40}")
    if length is not None and len(value) != length * dtype.itemsize:
        raise WireError(f"expected {length} numbers, got {len(value) // dtype.itemsize}")
    return np.frombuffer(value, dtype).copy()


def items(value: Any) -> list[Any]:
    """A field that is a list."""
    if type(value) is not list:
        raise WireError(f"expected an array, got {value!r:.40}")
    return value


def record(value: Any, count: int) -> list[Any]:
    """A list of so many fields."""
    if len(items(value)) != count:
        raise WireError(f"expected {count} fields, got {len(value)}")
    return list(value)


def whole(value: Any, most: int = _LARGEST) -> int:
    """An integer that is not negative."""
    # bool is an int to Python, and not to anyone else.
    if type(value) is not int or not 0 <= value <= most:
        raise WireError(f"expected an integer from 0 to {most}, got {value!r:.40}")
    return value


def index_in(value: Any, count: int) -> int:
    """An index of one of `count`."""
    if whole(value) >= count:
        raise WireError(f"index {value} of {count}")
    return int(value)


def real(value: Any) -> float:
    if type(value) is not float:
        raise WireError(f"expected a real number, got {value!r:.40}")
    return value


def truth(value: Any) -> bool:
    if type(value) is not bool:
        raise WireError(f"expected true or false, got {value!r:.40}")
    return value


def text(value: Any) -> str:
    if type(value) is not str or len(value) > MAX_TEXT:
        raise WireError(f"expected a text of at most {MAX_TEXT} characters, got {value!r:.40}")
    return value


def distinct(pairs: list[tuple[int, Any]]) -> dict[int, Any]:
    """By index; none is given twice."""
    found = dict(pairs)
    if len(found) != len(pairs):
        raise WireError("an index is given twice")
    return found
