"""Attention on the CPU: rotation, the write into pages and attention over them, in C. Owns shapes, strides and scratch.

The work is planned in C from the step's own lengths, so nothing here is done per sequence.
"""

import ctypes
from typing import NamedTuple

import torch
from torch import Tensor

from engine.kernels.cpu.dtypes import DTYPES
from engine.kernels.cpu.program import StepArrays, Target
from engine.kernels.operators import AttentionLayout, QKNorm
from engine.kv.cache import WORD_TOKENS, KVPages

LARGEST_HEAD_DIM = 256
HEAD_DIM_STEP = 8


class CpuAttention:
    """`engine.kernels.StepAttention` for float32 and bfloat16 queries, over a cache of their dtype or of int8."""

    def __init__(self, target: Target, layout: AttentionLayout, *, deterministic: bool = False) -> None:
        """`deterministic`: a token's result is the same, bit for bit, in whatever chunk of its sequence it comes."""
        self._target = target
        self._layout = layout
        self._deterministic = deterministic

    def write(self, qkv: Tensor, cos_sin: Tensor | None, k: KVPages, v: KVPages, norm: QKNorm | None = None) -> Tensor:
        """Rotates in place: the result is a view of `qkv`."""
        pages = _Pages.of(k, v, qkv.dtype, self._layout.page_tokens)
        heads = qkv.shape[1] // pages.head_dim - 2 * pages.kv_heads
        self._target.emit(
            "write_kv",
            self._step(qkv, cos_sin),
            qkv=qkv,
            qkv_stride=qkv.stride(0),
            dtype=DTYPES[qkv.dtype],
            heads=heads,
            rotary_dim=0 if cos_sin is None else cos_sin.shape[1],
            q_norm=None if norm is None else norm.q_weight,
            k_norm=None if norm is None else norm.k_weight,
            norm_eps=0.0 if norm is None else norm.eps,
            **pages._asdict(),
        )
        return qkv[:, : heads * pages.head_dim].unflatten(1, (heads, pages.head_dim))

    def attend(self, q: Tensor, k: KVPages, v: KVPages, *, scale: float, window: int | None) -> Tensor:
        pages = _Pages.of(k, v, q.dtype, self._layout.page_tokens)
        heads = q.shape[1]
        if heads % pages.kv_heads:
            raise ValueError(f"{heads} query heads cannot share {pages.kv_heads} key heads evenly")
        assert q.stride()[1:] == (pages.head_dim, 1), "the heads of a token are neighbours"
        y = self._target.empty(*q.shape, dtype=q.dtype)
        self._target.emit(
            "attend",
            self._step(q, None),
            q=q,
            q_stride=q.stride(0),
            dtype=DTYPES[q.dtype],
            heads=heads,
            scale=scale,
            window=window or 0,
            deterministic=int(self._deterministic),
            scratch=self._target.empty(self._scratch_bytes(heads, pages), dtype=torch.uint8),
            y=y,
            **pages._asdict(),
        )
        return y

    def _step(self, x: Tensor, cos_sin: Tensor | None) -> StepArrays:
        if x.is_meta:
            return StepArrays(x.shape[0])
        return StepArrays(x.shape[0], layout=self._layout, cos_sin=cos_sin)

    def _scratch_bytes(self, heads: int, pages: "_Pages") -> int:
        function = self._target.library.function("attend_scratch_bytes")
        function.restype = ctypes.c_int64
        function.argtypes = [ctypes.c_int64] * 4
        return int(function(self._target.threads, heads, pages.kv_heads, pages.head_dim))


class _Pages(NamedTuple):
    """The fields that both operations have for a layer's cache."""

    k: Tensor
    v: Tensor
    page_stride: int
    k_scales: Tensor | None
    v_scales: Tensor | None
    page_tokens: int
    kv_heads: int
    head_dim: int

    @staticmethod
    def of(k: KVPages, v: KVPages, dtype: torch.dtype, page_tokens: int) -> "_Pages":
        """Of a cache of words. Raises ValueError for one that the kernels cannot read."""
        _, kv_heads, words, tokens, items = k.values.shape
        head_dim = words * items
        stored = torch.int8 if k.scales is not None else dtype
        if dtype not in DTYPES or k.values.dtype != stored:
            raise ValueError(f"attention of {dtype} over a cache of {k.values.dtype}: no kernel for it")
        if head_dim % HEAD_DIM_STEP or head_dim > LARGEST_HEAD_DIM:
            raise ValueError(
                f"heads of {head_dim} values: a multiple of {HEAD_DIM_STEP} up to {LARGEST_HEAD_DIM} is needed"
            )
        assert tokens == page_tokens and tokens % WORD_TOKENS == 0
        assert v.values.shape[1:] == (kv_heads, tokens // items, head_dim, items)
        page_stride = k.values.stride(0) * k.values.element_size()
        for values, scales in (k, v):
            assert values[0].is_contiguous()
            assert values.stride(0) * values.element_size() == page_stride
            assert scales is None or (scales[0].is_contiguous() and scales.stride(0) * 4 == page_stride)
        return _Pages(k.values, v.values, page_stride, k.scales, v.scales, page_tokens, kv_heads, head_dim)
