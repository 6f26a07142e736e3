"""How fast this machine reads memory: the bound of one stream, whose every token reads every weight once."""

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from numpy.typing import NDArray

_BYTES = 2**30
"""Far more than any cache holds."""
_PASSES = 8


def read_bandwidth(threads: int) -> float:
    """Bytes per second of the fastest of several passes in which each thread reads its share of a gibibyte once.

    The faster of two ways to read: the largest of 64-bit integers, and a dot product of doubles with themselves. NumPy
    vectorises both, releases the interpreter's lock for both, and both compute less than they load; which one comes
    closer to the memory depends on the processor.
    """
    doubles = np.array_split(np.ones(_BYTES // 8), threads)
    integers = [share.view(np.int64) for share in doubles]
    fastest = float("inf")
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(_PASSES):
            fastest = min(fastest, _seconds(pool, _largest, integers), _seconds(pool, _norm, doubles))
    return _BYTES / fastest


def _seconds(pool: ThreadPoolExecutor, read: Callable[[NDArray[Any]], object], shares: list[NDArray[Any]]) -> float:
    began = time.perf_counter()
    list(pool.map(read, shares))
    return time.perf_counter() - began


def _largest(share: NDArray[Any]) -> object:
    return share.max()


def _norm(share: NDArray[Any]) -> object:
    return share @ share
