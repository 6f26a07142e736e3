"""Reductions over the vocabulary by the C kernels; they mean what those of `engine.sampling.reductions` mean.

Owns shapes and addresses. Knows nothing of sampling parameters.
"""

import ctypes

import torch
from torch import Tensor

from engine.kernels.cpu.library import Library


class _Logits(ctypes.Structure):
    """`struct logits` of vocabulary.h."""

    _fields_ = (
        ("values", ctypes.c_void_p),
        ("rows", ctypes.c_int64),
        ("vocabulary", ctypes.c_int64),
        ("stride", ctypes.c_int64),
    )


class CpuReductions:
    """Reductions of [R, V] float32 logits in memory, neighbouring tokens side by side. Nothing is copied."""

    def __init__(self, library: Library, threads: int) -> None:
        logits, integer, address = ctypes.POINTER(_Logits), ctypes.c_int64, ctypes.c_void_p
        self._threads = threads
        self._largest = library.function("largest_of_rows")
        self._largest.argtypes, self._largest.restype = [logits, integer, address, address], None
        self._k_largest = library.function("k_largest_of_rows")
        self._k_largest.argtypes, self._k_largest.restype = [logits, integer, integer, address, address], integer
        self._log_sum_exp = library.function("log_sum_exp_of_rows")
        self._log_sum_exp.argtypes, self._log_sum_exp.restype = [logits, integer, address], None

    def largest(self, x: Tensor) -> tuple[list[float], list[int]]:
        """The largest value of each row and the lowest id that has it: R values, R ids.

        The value is NaN where the row has a NaN anywhere, and the id is that of one.
        """
        logits = _logits(x)
        values, ids = (ctypes.c_float * logits.rows)(), (ctypes.c_int64 * logits.rows)()
        self._largest(logits, self._threads, values, ids)
        return values[:], ids[:]

    def k_largest(self, x: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """The `k` largest values of each row, largest first, equal values by rising id: values, ids [R, k].

        A NaN counts as -inf. Raises ValueError if k is not in [1, V].
        """
        if not 1 <= k <= x.shape[1]:
            raise ValueError(f"the {k} largest of {x.shape[1]} tokens: k must be from 1 to {x.shape[1]}")
        values, ids = torch.empty(len(x), k), torch.empty(len(x), k, dtype=torch.int64)
        if self._k_largest(_logits(x), k, self._threads, values.data_ptr(), ids.data_ptr()):
            raise MemoryError(f"no memory for the {k} largest tokens of a row")
        return values, ids

    def log_sum_exp(self, x: Tensor) -> Tensor:
        """log(sum(exp(row))), [R] float64; NaN where a row has a NaN or +inf, -inf where it is all -inf."""
        sums = torch.empty(len(x), dtype=torch.float64)
        self._log_sum_exp(_logits(x), self._threads, sums.data_ptr())
        return sums


def _logits(x: Tensor) -> _Logits:
    shape, strides = x.shape, x.stride()
    if x.dtype != torch.float32 or not x.is_cpu or len(shape) != 2 or strides[1] != 1 or shape[1] < 1:
        raise ValueError(
            f"expected [rows, vocabulary] float32 in memory with neighbouring tokens side by side, "
            f"got {list(shape)} {x.dtype} on {x.device}, strides {strides}"
        )
    return _Logits(x.data_ptr(), shape[0], shape[1], strides[0])
