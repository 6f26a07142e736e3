"""Large blocks of host memory, taken from the system as they are used. Knows nothing of what lies in them."""

import mmap

import torch
from torch import Tensor


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
