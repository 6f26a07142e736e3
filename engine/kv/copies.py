"""Pages of the cache as bytes for a tier's thread (`engine.kv.tier.PageMemory`), on a CPU and on a GPU."""

import numpy as np
import torch
from numpy.typing import NDArray

from engine.kv.cache import PagedKVCache


class HostPages:
    """Pages in the memory of the process: a copy is a copy, beside the threads that compute."""

    def __init__(self, cache: PagedKVCache) -> None:
        self._pages: NDArray[np.uint8] = cache.pages.view(cache.num_pages, -1).numpy()

    @property
    def page_bytes(self) -> int:
        return self._pages.shape[1]

    def read(self, page: int, target: NDArray[np.uint8]) -> None:
        np.copyto(target, self._pages[page])

    def write(self, page: int, source: NDArray[np.uint8]) -> None:
        np.copyto(self._pages[page], source)


class DevicePages:
    """Pages on a GPU: copies go through pinned memory on a stream of their own, beside the kernels of the steps.

    Whatever used a page before was a step that is over (`engine.forward.Forward.wait`), and what is written is complete
    before any step that reads it begins: neither stream has to wait for the other.
    """

    def __init__(self, cache: PagedKVCache) -> None:
        self._pages = cache.pages.view(cache.num_pages, -1)
        self._stream = torch.cuda.Stream(cache.pages.device)
        self._staging = torch.empty(self.page_bytes, dtype=torch.uint8, pin_memory=True)
        self._staged: NDArray[np.uint8] = self._staging.numpy()

    @property
    def page_bytes(self) -> int:
        return self._pages.shape[1]

    def read(self, page: int, target: NDArray[np.uint8]) -> None:
        with torch.cuda.stream(self._stream):
            self._staging.copy_(self._pages[page], non_blocking=True)
        self._stream.synchronize()
        np.copyto(target, self._staged)

    def write(self, page: int, source: NDArray[np.uint8]) -> None:
        np.copyto(self._staged, source)
        with torch.cuda.stream(self._stream):
            self._pages[page].copy_(self._staging, non_blocking=True)
        self._stream.synchronize()
