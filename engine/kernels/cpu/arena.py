"""Where the intermediate values of a program lie in one block of memory. Pure: knows neither tensors nor operations."""

from collections.abc import Sequence
from typing import NamedTuple

ALIGNMENT = 64
"""Bytes; a cache line, and a vector of AVX-512."""


class Lifetime(NamedTuple):
    """A value's size, and the first and last operation that touch it, both included."""

    num_bytes: int
    first: int
    last: int


class Arena(NamedTuple):
    offsets: list[int]
    """Bytes from the begin of the block, for each value."""
    num_bytes: int


def plan_arena(values: Sequence[Lifetime]) -> Arena:
    """Gives every value a place that no other value has while it lives; large values first, each as low as it fits."""
    offsets = [0] * len(values)
    placed: list[tuple[int, int, Lifetime]] = []
    for index in sorted(range(len(values)), key=lambda index: (-values[index].num_bytes, values[index].first)):
        value = values[index]
        offset = 0
        for begin, end, other in sorted(placed):
            if other.last < value.first or value.last < other.first or end <= offset:
                continue
            if begin - offset >= value.num_bytes:
                break
            offset = end
        offsets[index] = offset
        placed.append((offset, offset + -(-value.num_bytes // ALIGNMENT) * ALIGNMENT, value))
    return Arena(offsets, max((end for _, end, _ in placed), default=0))
