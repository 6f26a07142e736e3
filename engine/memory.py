"""Large blocks of host memory, taken from the system as they are used. Knows nothing of what lies in them."""

import math
import mmap

import torch
from torch import Tensor

_LARGE_BYTES = 4 * 2**20
"""From this size on, a tensor is worth a mapping of its own: at least one large page lies in it whole."""


def reserve(num_bytes: int) -> Tensor:
    """[num_bytes] uint8 zeros, aligned to a page, in large pages where the system has them; committed as written.

    `torch.zeros` writes its zeros, which takes all of the memory at once and seconds for each gigabyte.
    """
    length = max(num_bytes, 1)
    # Private: Python's default, shared memory, is counted against /dev/shm in containers.
    if hasattr(mmap, "MAP_ANONYMOUS"):
        memory = mmap.mmap(-1, length, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    else:
        memory = mmap.mmap(-1, length)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8, count=num_bytes)


def empty(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str = "cpu") -> Tensor:
    """As `torch.empty`, but large ones lie in `reserve`d memory of the host.

    A block that the allocator has just got from the system is paid for page by page as it is first written to, which
    in small pages takes longer than to read as much from the page cache.
    """
    num_bytes = math.prod(shape) * dtype.itemsize
    if torch.device(device).type != "cpu" or num_bytes < _LARGE_BYTES:
        return torch.empty(shape, dtype=dtype, device=device)
    return reserve(num_bytes).view(dtype).view(shape)
