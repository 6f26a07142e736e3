"""`engine.kernels.cuda.fused.Fused` on Triton: shapes, block sizes and launches. Importing it needs Triton."""

import torch
import triton  # type: ignore[import-not-found, import-untyped, unused-ignore]
from torch import Tensor

from engine.kernels.cuda import triton_kernels as kernels
from engine.kernels.cuda.fused import LARGEST
from engine.kernels.operators import AttentionLayout, QKNorm
from engine.kv.cache import KVPages
from engine.models.spec import Activation

_COLUMNS = 1024
"""Columns of a program where a row needs no reduction."""
_REDUCED_COLUMNS = 4096
"""Columns that a program reduces at a time where it goes over its row twice."""
_HEAD_ELEMENTS = 1024
"""Elements of a program that turns and stores heads."""


class TritonFused:
    """One launch an operator."""

    name = "Triton"

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        y, total = torch.empty_like(x), x if residual is None else torch.empty_like(x)
        rows, width = _rows(x)
        block = triton.next_power_of_2(width)
        kernels.rms_norm_kernel[(rows,)](
            x,
            residual,
            weight,
            y,
            total,
            eps,
            WIDTH=width,
            BLOCK=block,
            HAS_RESIDUAL=residual is not None,
            num_warps=_warps(block),
        )
        return y, total

    def layer_norm(
        self, x: Tensor, weight: Tensor, bias: Tensor, eps: float, residual: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        y, total = torch.empty_like(x), x if residual is None else torch.empty_like(x)
        rows, width = _rows(x)
        block = triton.next_power_of_2(width)
        kernels.layer_norm_kernel[(rows,)](
            x,
            residual,
            weight,
            bias,
            y,
            total,
            eps,
            WIDTH=width,
            BLOCK=block,
            HAS_RESIDUAL=residual is not None,
            num_warps=_warps(block),
        )
        return y, total

    def gate(self, x: Tensor, activation: Activation) -> Tensor:
        rows, merged = _rows(x)
        width = merged // 2
        y = x.new_empty((rows, width))
        kernels.gate_kernel[(rows, triton.cdiv(width, _COLUMNS))](
            x, y, WIDTH=width, BLOCK=_COLUMNS, ACTIVATION=activation
        )
        return y

    def write(
        self,
        qkv: Tensor,
        cos_sin: Tensor | None,
        k: KVPages,
        v: KVPages,
        norm: QKNorm | None,
        layout: AttentionLayout,
    ) -> Tensor:
        tokens, _ = _rows(qkv)
        kv_heads, head_dim = k.values.shape[2:]
        assert k.values[0].is_contiguous() and k.values.stride() == v.values.stride(), "pages of tokens in order"
        total_heads = qkv.shape[1] // head_dim
        heads = total_heads - 2 * kv_heads
        # Nothing to turn leaves the queries where they are.
        first_head = heads if cos_sin is None and norm is None else 0
        q = qkv.view(tokens, total_heads, head_dim)[:, :heads] if first_head else qkv.new_empty(tokens, heads, head_dim)
        dim_block = triton.next_power_of_2(head_dim)
        head_block = max(1, _HEAD_ELEMENTS // dim_block)
        kernels.write_kernel[(tokens, triton.cdiv(total_heads - first_head, head_block))](
            qkv,
            cos_sin,
            None if norm is None else norm.q_weight,
            None if norm is None else norm.k_weight,
            layout.slots,
            q,
            k.values,
            v.values,
            k.values.stride(0),
            0.0 if norm is None else norm.eps,
            HEADS=heads,
            KV_HEADS=kv_heads,
            HEAD_DIM=head_dim,
            ROTARY_DIM=0 if cos_sin is None else cos_sin.shape[1],
            PAGE_TOKENS=layout.page_tokens,
            FIRST_HEAD=first_head,
            HAS_NORM=norm is not None,
            HEAD_BLOCK=head_block,
            DIM_BLOCK=dim_block,
        )
        return q

    def quantize_rows(self, x: Tensor, dtype: torch.dtype, rows: int, columns: int) -> tuple[Tensor, Tensor]:
        count, width = _rows(x)
        values = torch.empty((rows, columns), dtype=dtype, device=x.device)
        scales = torch.empty((rows, 1), dtype=torch.float32, device=x.device)
        block = min(triton.next_power_of_2(columns), _REDUCED_COLUMNS)
        kernels.quantize_rows_kernel[(count,)](
            x,
            values,
            scales,
            WIDTH=width,
            PADDED_WIDTH=columns,
            BLOCK=block,
            LARGEST=LARGEST[dtype],
            TO_INTEGERS=dtype == torch.int8,
            num_warps=_warps(block),
        )
        return values, scales

    def scale_sums(
        self, sums: Tensor, row_scale: Tensor, column_scale: Tensor, bias: Tensor | None, dtype: torch.dtype
    ) -> Tensor:
        rows, width = _rows(sums)
        y = torch.empty((rows, width), dtype=dtype, device=sums.device)
        kernels.scale_sums_kernel[(rows, triton.cdiv(width, _COLUMNS))](
            sums, row_scale, column_scale, bias, y, WIDTH=width, BLOCK=_COLUMNS, HAS_BIAS=bias is not None
        )
        return y


def _rows(x: Tensor) -> tuple[int, int]:
    assert x.is_contiguous(), f"rows of {tuple(x.shape)} with strides {x.stride()}"
    return x.shape[0], x.shape[1]


def _warps(block: int) -> int:
    """So that a thread has 8 to 16 elements of a row, as far as 32 warps go."""
    return min(max(block // 512, 1), 32)
