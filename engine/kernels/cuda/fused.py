"""The operators around the matrix products, which cost a launch each and no arithmetic worth the name.

Owns what is asked of them and how plain torch does it; `triton_fused` does each in one launch.
"""

from typing import Protocol

import torch
from torch import Tensor

from engine.kernels.operators import AttentionLayout, QKNorm
from engine.kernels.reference import ReferenceOperators, turn
from engine.kv.cache import KVPages
from engine.models.spec import Activation

LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}
"""What the largest value of a row is scaled to. float8 e4m3 ends at 448 (Micikevicius et al., 2022, table 1)."""


class Fused(Protocol):
    """Elementwise work on contiguous rows. Results are new and have the dtype of `x` unless said otherwise."""

    name: str

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        """As `Operators.rms_norm`."""

    def layer_norm(
        self, x: Tensor, weight: Tensor, bias: Tensor, eps: float, residual: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """As `Operators.layer_norm`."""

    def gate(self, x: Tensor, activation: Activation) -> Tensor:
        """[T, 2 N] of [gate, up] to `activation(gate) * up`, [T, N]."""

    def write(
        self,
        qkv: Tensor,
        cos_sin: Tensor | None,
        k: KVPages,
        v: KVPages,
        norm: QKNorm | None,
        layout: AttentionLayout,
    ) -> Tensor:
        """As `StepAttention.write`, for a cache of the dtype of `qkv`."""

    def quantize_rows(self, x: Tensor, dtype: torch.dtype, rows: int, columns: int) -> tuple[Tensor, Tensor]:
        """[T, in] to values [rows, columns] of int8 or float8_e4m3fn, and a scale [rows, 1] float32 for each row.

        The largest value of a row becomes `LARGEST`; int8 rounds half to even; a row of zeros has scale 0. Columns past
        `in` are zeros; rows past T hold anything.
        """

    def scale_sums(
        self, sums: Tensor, row_scale: Tensor, column_scale: Tensor, bias: Tensor | None, dtype: torch.dtype
    ) -> Tensor:
        """[T, N] int32 times [T, 1] and [N] float32, plus [N], rounded once to `dtype`."""


class TorchFused:
    """Plain torch, several launches each; any device."""

    name = "torch"

    def __init__(self) -> None:
        self._reference = ReferenceOperators()

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        return self._reference.rms_norm(x, weight, eps, residual)

    def layer_norm(
        self, x: Tensor, weight: Tensor, bias: Tensor, eps: float, residual: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        return self._reference.layer_norm(x, weight, bias, eps, residual)

    def gate(self, x: Tensor, activation: Activation) -> Tensor:
        gate, up = x.chunk(2, dim=-1)
        return self._reference.activate(gate, activation) * up

    def write(
        self,
        qkv: Tensor,
        cos_sin: Tensor | None,
        k: KVPages,
        v: KVPages,
        norm: QKNorm | None,
        layout: AttentionLayout,
    ) -> Tensor:
        kv_heads, head_dim = k.values.shape[2:]
        heads = qkv.view(len(qkv), -1, head_dim)
        queries, keys, values = heads.split((heads.shape[1] - 2 * kv_heads, kv_heads, kv_heads), dim=1)
        q_weight, k_weight, eps = (None, None, 0.0) if norm is None else norm
        pages = torch.div(layout.slots, layout.page_tokens, rounding_mode="floor")
        offsets = layout.slots % layout.page_tokens
        k.values[pages, offsets] = turn(keys, cos_sin, k_weight, eps)
        v.values[pages, offsets] = values
        return turn(queries, cos_sin, q_weight, eps)

    def quantize_rows(self, x: Tensor, dtype: torch.dtype, rows: int, columns: int) -> tuple[Tensor, Tensor]:
        wide = x.to(torch.float32)
        scale = wide.abs().amax(dim=-1, keepdim=True) / LARGEST[dtype]
        scaled = wide * torch.where(scale > 0, 1.0 / scale, 0.0)
        scaled = scaled.clamp(-LARGEST[dtype], LARGEST[dtype])
        values = torch.zeros((rows, columns), dtype=dtype, device=x.device)
        values[: len(x), : x.shape[1]] = (scaled.round() if dtype == torch.int8 else scaled).to(dtype)
        return values, torch.nn.functional.pad(scale, (0, 0, 0, rows - len(x)))

    def scale_sums(
        self, sums: Tensor, row_scale: Tensor, column_scale: Tensor, bias: Tensor | None, dtype: torch.dtype
    ) -> Tensor:
        y = sums.to(torch.float32) * row_scale * column_scale
        return (y if bias is None else y + bias).to(dtype)
