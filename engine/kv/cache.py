"""The device memory of keys and values. Owns the tensor and its layout; who owns which page is `engine.kv.pages`."""

import torch
from torch import Tensor

from engine.models.spec import ModelSpec


class PagedKVCache:
    """Page-major cache [pages, layers, 2, page_tokens, kv_heads, head_dim]: keys at index 0 of the third axis.

    One page of one sequence is one contiguous run over all layers, so that offload, transfer, checksum and migration
    are single copies. It starts as zeros, which the system commits page by page as they are first written.
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
        self.pages = torch.zeros(shape, dtype=dtype, device=device)

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
