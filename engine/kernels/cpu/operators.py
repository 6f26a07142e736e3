"""The operators of the CPU: what a decoder asks for, as operations of the C library. Owns shapes, dtypes, addresses."""

import torch
from torch import Tensor

from engine.kernels.cpu.attention import HEAD_DIM_STEP, LARGEST_HEAD_DIM, CpuAttention
from engine.kernels.cpu.dtypes import DTYPES
from engine.kernels.cpu.experts import CpuExperts
from engine.kernels.cpu.library import ACTIVATIONS
from engine.kernels.cpu.linear import PackedLinear, pack_experts, pack_linear
from engine.kernels.cpu.program import Field, StepArrays, Target
from engine.kernels.cpu.ranks import CpuRanks
from engine.kernels.operators import AttentionLayout, Embedding, ExpertLinear, Experts, Linear, Routing
from engine.kv.cache import WORD_TOKENS
from engine.models.spec import Activation
from engine.quant.weights import Weight


def missing_kernel(dtype: torch.dtype, head_dim: int, page_tokens: int) -> str | None:
    """Why a model cannot run on these operators; None if it can."""
    if dtype not in DTYPES:
        return f"{str(dtype).removeprefix('torch.')} has no C kernels (bfloat16 and float32 have)"
    if head_dim % HEAD_DIM_STEP or head_dim > LARGEST_HEAD_DIM:
        return (
            f"heads of {head_dim} values have no C kernels (multiples of {HEAD_DIM_STEP} up to {LARGEST_HEAD_DIM} have)"
        )
    if page_tokens % WORD_TOKENS:
        return f"KV pages of {page_tokens} tokens have no C kernels (multiples of {WORD_TOKENS} have)"
    return None


class CpuOperators:
    """`engine.kernels.Operators` in C, for float32 and bfloat16. Rows of inputs are contiguous."""

    def __init__(self, target: Target, *, deterministic: bool = False, ranks: CpuRanks | None = None) -> None:
        """`deterministic`: see `CpuAttention`; all other operators are so in any case. `ranks` adds up what the ranks
        of a model have; None: there is one."""
        self._target = target
        self._deterministic = deterministic
        self._ranks = ranks

    def linear(
        self,
        weight: Weight,
        bias: Tensor | None = None,
        *,
        gate: Activation | None = None,
        out_dtype: torch.dtype | None = None,
    ) -> Linear:
        return pack_linear(self._target, weight, bias, gate=gate, out_dtype=out_dtype)

    def expert_linear(
        self, weight: Weight, experts: int, *, gate: Activation | None = None, out_dtype: torch.dtype | None = None
    ) -> ExpertLinear:
        return pack_experts(self._target, weight, experts, gate=gate, out_dtype=out_dtype)

    def experts(self, routing: Routing, inner: ExpertLinear, outer: ExpertLinear) -> Experts:
        assert isinstance(inner, PackedLinear) and isinstance(outer, PackedLinear)
        return CpuExperts(self._target, routing, inner, outer)

    def embedding(self, table: Tensor, held: range | None = None) -> Embedding:
        return CpuEmbedding(self._target, table.contiguous(), held)

    def tied_embedding(self, head: Linear, dtype: torch.dtype, held: range | None = None) -> Embedding:
        assert isinstance(head, PackedLinear)
        return head.rows(dtype, held)

    def sum_over_ranks(self, x: Tensor) -> Tensor:
        return x if self._ranks is None else self._ranks.sum(self._target, x)

    def add(self, a: Tensor, b: Tensor) -> Tensor:
        y = self._like(a)
        self._target.emit("add", _rows(a), a=a, b=b, y=y, width=a.shape[-1], dtype=DTYPES[a.dtype])
        return y

    def add_gated(self, a: Tensor, b: Tensor, gate: Tensor) -> Tensor:
        assert gate.dtype == torch.float32 and gate.shape == (len(a), 1)
        y = self._like(a)
        self._target.emit("add_gated", _rows(a), a=a, b=b, gate=gate, y=y, width=a.shape[-1], dtype=DTYPES[a.dtype])
        return y

    def take_rows(self, x: Tensor, rows: Tensor) -> Tensor:
        assert x[0].is_contiguous(), "the values of a row are neighbours"
        y = self._target.empty(len(rows), *x.shape[1:], dtype=x.dtype)
        self._target.emit(
            "take_rows",
            StepArrays(len(rows), rows=rows),
            x=x,
            x_stride=x.stride(0) * x.element_size(),
            row_bytes=x[0].nbytes,
            y=y,
        )
        return y

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._norm("rms_norm", x, residual, weight=weight, eps=eps)

    def layer_norm(
        self, x: Tensor, weight: Tensor, bias: Tensor, eps: float, residual: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        return self._norm("layer_norm", x, residual, weight=weight, bias=bias, eps=eps)

    def activate(self, x: Tensor, activation: Activation) -> Tensor:
        y = self._like(x)
        number = ACTIVATIONS[activation]
        self._target.emit("activate", _rows(x), x=x, y=y, width=x.shape[-1], activation=number, dtype=DTYPES[x.dtype])
        return y

    def attention(self, layout: AttentionLayout) -> CpuAttention:
        return CpuAttention(self._target, layout, deterministic=self._deterministic)

    def _norm(self, name: str, x: Tensor, residual: Tensor | None, **parameters: Field) -> tuple[Tensor, Tensor]:
        y, total = self._like(x), x if residual is None else self._like(x)
        self._target.emit(
            name,
            _rows(x),
            x=x,
            residual=residual,
            y=y,
            total=None if residual is None else total,
            width=x.shape[-1],
            dtype=DTYPES[x.dtype],
            **parameters,
        )
        return y, total

    def _like(self, x: Tensor) -> Tensor:
        return self._target.empty(*x.shape, dtype=x.dtype)


class CpuEmbedding:
    """Rows of a table by token id, or, for a program's positions, by position."""

    def __init__(self, target: Target, table: Tensor, held: range | None = None) -> None:
        self._target = target
        self._table = table
        self._held = range(len(table)) if held is None else held

    def __call__(self, ids: Tensor) -> Tensor:
        rows, width = len(ids), self._table.shape[1]
        y = self._target.empty(rows, width, dtype=self._table.dtype)
        self._target.emit(
            "embed",
            StepArrays(rows, token_ids=None if ids.is_meta else ids),
            table=self._table,
            first=self._held.start,
            rows=len(self._held),
            from_positions=self._target.is_positions(ids),
            width=width,
            dtype=DTYPES[self._table.dtype],
            y=y,
        )
        return y


def _rows(x: Tensor) -> StepArrays:
    return StepArrays(x.shape[0])
