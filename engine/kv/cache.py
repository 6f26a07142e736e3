"""The device memory of keys and values. Owns the tensor and its layout; who owns which page is `engine.kv.pages`."""

import math
from enum import Enum
from typing import NamedTuple

import torch
from torch import Tensor

from engine.kv.sizing import layer_bytes_per_token
from engine.memory import reserve
from engine.models.spec import ModelSpec

WORD_TOKENS = 16
"""Pages of words hold a multiple of so many tokens."""


class KVLayout(Enum):
    """The order of a page's keys and values; whose operators use a cache says which. Both take the same bytes.

    Here U is the elements of 32 bits: 1 float32, 2 bfloat16 or float16, 4 int8.
    """

    ROWS = "rows"
    """[page_tokens, kv_heads, head_dim], scales [page_tokens, kv_heads]."""
    WORDS = "words"
    """Keys [kv_heads, head_dim / U, page_tokens, U] and values [kv_heads, page_tokens / U, head_dim, U], scales
    [kv_heads, page_tokens]: what the C kernels multiply without turning it around (attention.h). int8 keys are 128 too
    large, as uint8."""


class KVPages(NamedTuple):
    """The keys, or the values, of one layer: strided views of all pages."""

    values: Tensor
    """[pages, ...] in the cache's layout; the bytes of one page are contiguous."""
    scales: Tensor | None = None
    """[pages, ...] float32 for int8 values: value = values * scales. None for floats."""


def kv_bytes_per_token(spec: ModelSpec, dtype: torch.dtype) -> int:
    """Bytes of keys and values that one token keeps in a cache of this dtype, over all layers."""
    return spec.layers * layer_bytes_per_token(spec.kv_heads, spec.head_dim, dtype.itemsize, scaled=dtype == torch.int8)


class PagedKVCache:
    """Page-major cache: [pages, layers, 2, ...] with keys at index 0 of the third axis.

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
        layout: KVLayout = KVLayout.ROWS,
    ) -> None:
        """`dtype` is a floating type, or int8 for values quantized per token and head.

        Raises ValueError for a number of tokens that pages of words cannot have.
        """
        if layout is KVLayout.WORDS and page_tokens % WORD_TOKENS:
            raise ValueError(f"pages of {page_tokens} tokens: the C kernels take multiples of {WORD_TOKENS}")
        self.dtype = dtype
        self.page_tokens = page_tokens
        self.layout = layout
        self._kv_heads, self._head_dim = spec.kv_heads, spec.head_dim
        self._value_bytes = page_tokens * spec.kv_heads * spec.head_dim * dtype.itemsize
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
        tokens, heads, dim = self.page_tokens, self._kv_heads, self._head_dim
        if self.layout is KVLayout.ROWS:
            return self._half(index, 0, (tokens, heads, dim)), self._half(index, 1, (tokens, heads, dim))
        items = 4 // self.dtype.itemsize
        return (
            self._half(index, 0, (heads, dim // items, tokens, items)),
            self._half(index, 1, (heads, tokens // items, dim, items)),
        )

    def clear(self, page_ids: Tensor) -> None:
        """Zeroes whole pages ([N] int64), so that slots not written yet hold finite values whoever used them before."""
        self.pages.index_fill_(0, page_ids, 0)

    def _half(self, index: int, half: int, shape: tuple[int, ...]) -> KVPages:
        memory = self.pages[:, index, half]
        values = memory[:, : self._value_bytes].view(self.dtype).unflatten(1, shape)
        if self.dtype != torch.int8:
            return KVPages(values)
        tokens, heads = self.page_tokens, self._kv_heads
        scales = memory[:, self._value_bytes :].view(torch.float32)
        return KVPages(
            values, scales.unflatten(1, (tokens, heads) if self.layout is KVLayout.ROWS else (heads, tokens))
        )
