"""Sums over the ranks of one host, through memory that they share. Owns shapes and addresses.

Knows neither where the memory comes from nor which model the ranks share.
"""

import ctypes
import re
from functools import cache
from typing import Protocol

import torch
from torch import Tensor

from engine.errors import RanksLost
from engine.kernels.cpu.dtypes import DTYPES
from engine.kernels.cpu.library import SOURCE, Library
from engine.kernels.cpu.program import Immediate, StepArrays, Target
from engine.kernels.operators import RanksSum

_ALIGNMENT = 64
"""Of a place in the segment: no cache line is written by two ranks."""


class CpuRanks(Protocol):
    """How a program adds up what its ranks have."""

    def sum(self, target: Target, x: Tensor) -> Tensor:
        """Emits the sum of a contiguous [T, N] over all ranks."""


class CalledRanks:
    """Sums outside of C, which returns for each: between hosts, where they take longer than that."""

    def __init__(self, ranks: RanksSum) -> None:
        self._ranks = ranks

    def sum(self, target: Target, x: Tensor) -> Tensor:
        y = target.empty(*x.shape, dtype=x.dtype)
        target.call("sum_ranks", self._sum, x, y)
        return y

    def _sum(self, x: Tensor, y: Tensor) -> None:
        if len(x):
            y.copy_(self._ranks(x))


class SharedRanks:
    """Sums, and gathered rows, in a segment that every rank has mapped. See ranks.h."""

    def __init__(
        self, segment: Tensor, rank: int, size: int, library: Library, threads: int, timeout_s: float = 60.0
    ) -> None:
        """`segment` has `segment_bytes`, zeros before the first rank uses it. Nobody is waited for longer than
        `timeout_s`, which is more than what any rank may take for a step."""
        self.rank = rank
        self.size = size
        self._segment = segment
        self._capacity = (len(segment) - _head_bytes()) // (2 * size)
        self._timeout_s = timeout_s
        self._immediate = Immediate(library, threads)
        self._broken = library.function("ranks_broken")
        self._broken.argtypes, self._broken.restype = [ctypes.c_void_p], ctypes.c_int64

    def sum(self, target: Target, x: Tensor) -> Tensor:
        self._check_size(x)
        y = target.empty(*x.shape, dtype=x.dtype)
        width, dtype = x.shape[1], DTYPES[x.dtype]
        target.emit("sum_ranks", StepArrays(len(x)), x=x, y=y, width=width, dtype=dtype, **self._fields)
        return y

    def gather(self, x: Tensor) -> Tensor | None:
        """[T, N] of each rank, all of one shape, to [T, size, N] of rank 0; None of the others. Raises RanksLost."""
        at_once = max(1, self._capacity // max(1, x.shape[1] * x.element_size()))
        parts = [self._gather(part) for part in x.split(at_once)]
        self.check()
        found = [part for part in parts if part is not None]
        return torch.cat(found) if len(found) > 1 else next(iter(found), None)

    def check(self) -> None:
        """Raises RanksLost if a sum since the last check, or any before, has waited for a rank in vain."""
        if self._broken(self._segment.data_ptr()):
            raise RanksLost(f"one of {self.size} ranks that share a stage did not come within {self._timeout_s:g} s")

    def _gather(self, x: Tensor) -> Tensor | None:
        self._check_size(x)
        x = x.contiguous()
        y = torch.empty(len(x), self.size, x.shape[1], dtype=x.dtype) if self.rank == 0 else None
        row_bytes = x.shape[1] * x.element_size()
        self._immediate.emit("gather_ranks", StepArrays(len(x)), x=x, row_bytes=row_bytes, y=y, **self._fields)
        return y

    @property
    def _fields(self) -> dict[str, Tensor | int | float]:
        return {
            "segment": self._segment,
            "capacity": self._capacity,
            "rank": self.rank,
            "size": self.size,
            "timeout": self._timeout_s,
        }

    def _check_size(self, x: Tensor) -> None:
        num_bytes = x.shape[0] * x.shape[1] * x.element_size()
        if num_bytes > self._capacity:
            raise ValueError(f"{num_bytes} bytes of a rank; the segment was made for {self._capacity}")


def segment_bytes(size: int, rank_bytes: int) -> int:
    """Of a segment for so many ranks, each with at most `rank_bytes` at once."""
    return _head_bytes() + 2 * size * -(-rank_bytes // _ALIGNMENT) * _ALIGNMENT


@cache
def _head_bytes() -> int:
    match = re.search(r"#define RANKS_HEAD (\d+)", (SOURCE / "ranks.h").read_text(encoding="utf-8"))
    assert match is not None
    return int(match[1])
