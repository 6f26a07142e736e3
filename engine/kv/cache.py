"""The device memory of keys and values. Owns the tensor and its layout; who owns which page is `engine.kv.pages`."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from engine.memory import reserve
from engine.models.spec import ModelSpec

SCALE_BYTES = 4
"""A float32 scale for each token and head of an int8 cache."""


class KVPages(NamedTuple):
    """The keys, or the values, of one layer: strided views of all pages."""

    values: Tensor
    """[pages, page_tokens, kv_heads, head_dim]; the tokens of one page are contiguous."""
    scales: Tensor | None = None
    """[pages, page_tokens, kv_heads] float32 for int8 values: value = values * scales. None for floats."""


def kv_bytes_per_token(spec: ModelSpec, dtype: torch.dtype) -> int:
    """Bytes of keys and values that one token keeps in a cache of this dtype, over all layers."""
    head_bytes = spec.head_dim * dtype.itemsize + (SCALE_BYTES if dtype == torch.int8 else 0)
    return spec.layers * 2 * spec.kv_heads * head_bytes


class PagedKVCache:
    """Page-major cache: [pages, layers, 2, page_tokens, kv_heads, head_dim], keys at index 0 of the third axis.

    One page of one sequence is one contiguous run of bytes over all layers, so that offload, transfer, checksum and
    migration are single copies. With int8, the values of a layer's page are followed by their scales. It starts as
    zeros; on the CPU the system commits memory only as pages are first written.
    """

    def __init__(
        self,
        spec: ModelSpec,
        num_pages: int,
        page_tokens: int,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
    ) -> None:
        """`dtype` is a floating type, or int8 for values quantized per token and head."""
        self.dtype = dtype
        self.page_tokens = page_tokens
        self._heads = (page_tokens, spec.kv_heads, spec.head_dim)
        self._value_bytes = math.prod(self._heads) * dtype.itemsize
        half_bytes = page_tokens * kv_bytes_per_token(spec, dtype) // (2 * spec.layers)
        shape = (num_pages, spec.layers, 2, half_bytes)
        on_cpu = torch.device(device).type == "cpu"
        self.pages = (
            reserve(math.prod(shape)).view(shape) if on_cpu else torch.zeros(shape, dtype=torch.uint8, device=device)
        )
        """[pages, layers, 2, bytes] uint8."""

    @property
    def num_pages(self) -> int:
        return self.pages.shape[0]

    @property
    def page_bytes(self) -> int:
        return self.pages[0].numel()

    def layer(self, index: int) -> tuple[KVPages, KVPages]:
        """Keys and values of one layer."""
        return self._half(self.pages[:, index, 0]), self._half(self.pages[:, index, 1])

    def clear(self, page_ids: Tensor) -> None:
        """Zeroes whole pages ([N] int64), so that slots not written yet hold finite values whoever used them before."""
        self.pages.index_fill_(0, page_ids, 0)

    def _half(self, half: Tensor) -> KVPages:
        values = half[:, : self._value_bytes].view(self.dtype).unflatten(1, self._heads)
        if self.dtype != torch.int8:
            return KVPages(values)
        return KVPages(values, half[:, self._value_bytes :].view(torch.float32).unflatten(1, self._heads[:2]))
