"""Attention over paged keys and values on a GPU: torch's flash attention where it can, gathered pages elsewhere.

Owns what torch's paged kernel accepts and how it must be called. Knows no model and no CUDA graph.
"""

from functools import cached_property

import torch
from torch import Tensor

from engine.kernels.cuda.fused import Fused
from engine.kernels.operators import AttentionLayout, QKNorm
from engine.kernels.reference import PagedAttention
from engine.kv.cache import KVPages

PAGE_MULTIPLE = 256
"""Flash attention 2 reads pages of a multiple of this many tokens."""
FLASH_CAPABILITY = (8, 0)
"""Compute capability that flash attention 2 is compiled for, and above."""
FLASH_DTYPES = (torch.bfloat16, torch.float16)
MAX_HEAD_DIM = 256
HEAD_DIM_MULTIPLE = 8


def flash_obstacle(
    *, capability: tuple[int, int], page_tokens: int, head_dim: int, dtype: torch.dtype, kv_dtype: torch.dtype
) -> str | None:
    """Why flash attention cannot run over such pages, in words; None if it can.

    Pages may lie anywhere: it takes the distance between two of them from the stride, which is 64 bits wide.
    """
    if capability < FLASH_CAPABILITY:
        return f"compute capability {capability[0]}.{capability[1]}, and it needs 8.0"
    if dtype not in FLASH_DTYPES:
        return f"activations of {_name(dtype)}, and it knows bfloat16 and float16"
    if kv_dtype != dtype:
        return f"keys and values of {_name(kv_dtype)}, and it wants those of the activations, {_name(dtype)}"
    if head_dim % HEAD_DIM_MULTIPLE or head_dim > MAX_HEAD_DIM:
        return f"heads of {head_dim} values, and it needs a multiple of {HEAD_DIM_MULTIPLE} up to {MAX_HEAD_DIM}"
    if page_tokens % PAGE_MULTIPLE:
        return f"pages of {page_tokens} tokens, and it needs a multiple of {PAGE_MULTIPLE}"
    return None


class CudaAttention:
    """One step's attention: decodes and prompt chunks in one launch."""

    def __init__(self, layout: AttentionLayout, fused: Fused, capability: tuple[int, int]) -> None:
        self._layout = layout
        self._fused = fused
        self._capability = capability

    def write(self, qkv: Tensor, cos_sin: Tensor | None, k: KVPages, v: KVPages, norm: QKNorm | None = None) -> Tensor:
        if k.values.dtype != qkv.dtype:
            return self._gathered.write(qkv, cos_sin, k, v, norm)
        return self._fused.write(qkv, cos_sin, k, v, norm, self._layout)

    def attend(self, q: Tensor, k: KVPages, v: KVPages, *, scale: float, window: int | None) -> Tensor:
        obstacle = flash_obstacle(
            capability=self._capability,
            page_tokens=self._layout.page_tokens,
            head_dim=q.shape[2],
            dtype=q.dtype,
            kv_dtype=k.values.dtype,
        )
        if obstacle is None:
            return flash_attention(q, k, v, self._layout, scale=scale, window=window)
        return self._gathered.attend(q.contiguous(), k, v, scale=scale, window=window)

    @cached_property
    def _gathered(self) -> PagedAttention:
        return PagedAttention(self._layout)


def flash_attention(
    q: Tensor, k: KVPages, v: KVPages, layout: AttentionLayout, *, scale: float, window: int | None
) -> Tensor:
    """FlashAttention-2 (Dao, 2023) over a page table; shapes are those of `StepAttention.attend`.

    Two things about torch 2.13's kernel decide how it is called. It puts the query heads that share a key head on the
    query axis, and so reads each key once, only without a window and without a causal bound; a single query is the last
    of its sequence, so the bound adds nothing. And it splits the keys over several blocks correctly in that shape
    alone: elsewhere rows of the result stay unwritten (pytorch/pytorch#194167), hence one split.
    """
    # Here, because torch imports its compiler along with it: two seconds that a replica without a GPU would pay too.
    from torch.nn.attention.varlen import varlen_attn

    heads, kv_heads = q.shape[1], k.values.shape[2]
    longest_query = max(layout.query_lens)
    is_packed = longest_query == 1 and window is None and heads > kv_heads
    left = -1 if window is None else window - 1
    out = varlen_attn(
        q,
        k.values,
        v.values,
        layout.cu_seq_q,
        # Not read beside a page table, but torch takes both offsets or neither.
        layout.cu_seq_q,
        longest_query,
        max(layout.lens),
        scale=scale,
        window_size=(-1, -1) if is_packed else (left, 0),
        enable_gqa=heads != kv_heads,
        seqused_k=layout.context_lens,
        block_table=layout.page_table,
        num_splits=None if is_packed else 1,
    )
    assert isinstance(out, Tensor)
    return out.contiguous()


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
