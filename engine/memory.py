"""Large blocks of host memory, taken from the system as they are used. Knows nothing of what lies in them."""

import math
import mmap
import weakref
from dataclasses import dataclass

import torch
from torch import Tensor

_LARGE_BYTES = 4 * 2**20
"""From this size on, a tensor is worth a mapping of its own: at least one large page lies in it whole."""


def reserve(num_bytes: int) -> Tensor:
    """[num_bytes] uint8 zeros, aligned to a page, in large pages where the system has them; committed as written.

    `torch.zeros` writes its zeros, which takes all of the memory at once and seconds for each gigabyte.
    """
    return torch.frombuffer(_map(num_bytes), dtype=torch.uint8, count=num_bytes)


def _map(num_bytes: int) -> mmap.mmap:
    length = max(num_bytes, 1)
    # Private: Python's default, shared memory, is counted against /dev/shm in containers.
    if hasattr(mmap, "MAP_ANONYMOUS"):
        memory = mmap.mmap(-1, length, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    else:
        memory = mmap.mmap(-1, length)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return memory


def empty(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str = "cpu") -> Tensor:
    """As `torch.empty`, but large ones lie in `reserve`d memory of the host.

    A block that the allocator has just got from the system is paid for page by page as it is first written to, which
    in small pages takes longer than to read as much from the page cache.
    """
    return Recycler(kept_bytes=0).empty(shape, dtype, device)


@dataclass(slots=True)
class _Block:
    """Memory that is kept, and the view of it that the tensors in it hold, all of them and nobody else."""

    memory: mmap.mmap
    view: "weakref.ref[memoryview] | None" = None

    @property
    def is_free(self) -> bool:
        return self.view is None or self.view() is None

    def lend(self) -> memoryview:
        view = memoryview(self.memory)
        self.view = weakref.ref(view)
        return view


class Recycler:
    """`empty` for tensors that are needed one after another: memory comes back once no tensor lies in it.

    The first write to a page of memory costs several times as much as any later one, above all on a virtual machine,
    which may have to get it from its host.
    """

    def __init__(self, kept_bytes: int = 128 * 2**20) -> None:
        """Blocks are kept, used or not, up to `kept_bytes` together; larger ones go as their tensors go."""
        self._kept_bytes = kept_bytes
        self._blocks: list[_Block] = []

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str = "cpu") -> Tensor:
        num_bytes = math.prod(shape) * dtype.itemsize
        if torch.device(device).type != "cpu" or num_bytes < _LARGE_BYTES:
            return torch.empty(shape, dtype=dtype, device=device)
        return torch.frombuffer(self._memory(num_bytes), dtype=dtype, count=math.prod(shape)).view(shape)

    def _memory(self, num_bytes: int) -> memoryview:
        """Of at most twice as many bytes: a tensor that stays must not hold much more than it needs."""
        for block in self._blocks:
            if num_bytes <= len(block.memory) <= 2 * num_bytes and block.is_free:
                return block.lend()
        block = _Block(_map(num_bytes))
        if sum(len(kept.memory) for kept in self._blocks) + num_bytes <= self._kept_bytes:
            self._blocks.append(block)
        return block.lend()
