"""The device memory of keys and values. Owns the tensor and its layout; who owns which page is `engine.kv.pages`."""

import math
import mmap

import torch
from torch import Tensor

from engine.models.spec import ModelSpec


class PagedKVCache:
    """Page-major cache [pages, layers, 2, page_tokens, kv_heads, head_dim]: keys at index 0 of the third axis.

    One page of one sequence is one contiguous run over all layers, so that offload, transfer, checksum and migration
    are single copies. It starts as zeros; on the CPU the system commits memory only as pages are first written.
    """

    def __init__(
        self,
        spec: ModelSpec,
        num_pages: int,
        page_tokens: int,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
    ) -> None:
        shape = (num_pages, spec.layers, 2, page_tokens, spec.kv_heads, spec.head_dim)
        on_cpu = torch.device(device).type == "cpu"
        self.pages = _untouched_zeros(shape, dtype) if on_cpu else torch.zeros(shape, dtype=dtype, device=device)

    @property
    def num_pages(self) -> int:
        return self.pages.shape[0]

    @property
    def page_tokens(self) -> int:
        return self.pages.shape[3]

    @property
    def page_bytes(self) -> int:
        return self.pages[0].numel() * self.pages.element_size()

    def layer(self, index: int) -> tuple[Tensor, Tensor]:
        """Keys and values of one layer: two strided views [pages, page_tokens, kv_heads, head_dim]."""
        return self.pages[:, index, 0], self.pages[:, index, 1]

    def clear(self, page_ids: Tensor) -> None:
        """Zeroes whole pages ([N] int64), so that slots not written yet hold finite values whoever used them before."""
        self.pages.index_fill_(0, page_ids, 0)


def _untouched_zeros(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Zeros in memory that is reserved and not yet taken.

    `torch.zeros` writes its zeros, which would take the whole budget at start, seconds for each gigabyte.
    """
    num_bytes = math.prod(shape) * dtype.itemsize
    # Private: Python's default, shared memory, is counted against /dev/shm in containers.
    if hasattr(mmap, "MAP_ANONYMOUS"):
        memory = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    else:
        memory = mmap.mmap(-1, num_bytes)
    return torch.frombuffer(memory, dtype=dtype).view(shape)
