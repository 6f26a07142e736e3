"""The operators in plain torch: the oracle of the fused implementations, and what runs where none is available."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.kernels.operators import (
    AttentionLayout,
    Embedding,
    ExpertLinear,
    Experts,
    Linear,
    QKNorm,
    RanksSum,
    Routing,
)
from engine.kernels.paged_sdpa import ChunkKeys, DecodeKeys, group_decodes
from engine.kernels.routing import TableExperts
from engine.kv.cache import KVPages
from engine.models.spec import Activation
from engine.quant.weights import Int4Weight, Int8Weight, Weight, rows_of

_ACTIVATIONS: dict[Activation, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
}


class ReferenceOperators:
    """`engine.kernels.Operators` on any torch device and dtype."""

    def __init__(self, ranks: RanksSum | None = None) -> None:
        """`ranks` adds up what the ranks of a model have; None: there is one."""
        self._ranks = ranks

    def linear(
        self,
        weight: Weight,
        bias: Tensor | None = None,
        *,
        gate: Activation | None = None,
        out_dtype: torch.dtype | None = None,
    ) -> Linear:
        return ReferenceLinear(weight, bias, gate, out_dtype)

    def expert_linear(
        self, weight: Weight, experts: int, *, gate: Activation | None = None, out_dtype: torch.dtype | None = None
    ) -> ExpertLinear:
        return ReferenceExpertLinear(weight, experts, gate, out_dtype)

    def experts(self, routing: Routing, inner: ExpertLinear, outer: ExpertLinear) -> Experts:
        return TableExperts(routing, inner, outer)

    def embedding(self, table: Tensor, held: range | None = None) -> Embedding:
        return held_rows(lambda ids: F.embedding(ids, table), held)

    def tied_embedding(self, head: Linear, dtype: torch.dtype, held: range | None = None) -> Embedding:
        assert isinstance(head, ReferenceLinear)
        weight = head.weight
        return held_rows(lambda ids: weight_rows(weight, ids, dtype), held)

    def sum_over_ranks(self, x: Tensor) -> Tensor:
        return x if self._ranks is None else self._ranks(x)

    def add(self, a: Tensor, b: Tensor) -> Tensor:
        return a + b

    def add_gated(self, a: Tensor, b: Tensor, gate: Tensor) -> Tensor:
        return (a + gate.sigmoid() * b).to(a.dtype)

    def take_rows(self, x: Tensor, rows: Tensor) -> Tensor:
        return x.index_select(0, rows)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
        total = x if residual is None else x + residual
        return F.rms_norm(total, (total.shape[-1],), weight, eps), total

    def layer_norm(
        self, x: Tensor, weight: Tensor, bias: Tensor, eps: float, residual: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        total = x if residual is None else x + residual
        return F.layer_norm(total, (total.shape[-1],), weight, bias, eps), total

    def activate(self, x: Tensor, activation: Activation) -> Tensor:
        return _ACTIVATIONS[activation](x)

    def attention(self, layout: AttentionLayout) -> "PagedAttention":
        return PagedAttention(layout)


class ReferenceLinear:
    """`x @ weight.T + bias`, gated if asked for; integer weights mean what `engine.quant.weights` says."""

    def __init__(
        self, weight: Weight, bias: Tensor | None, gate: Activation | None, out_dtype: torch.dtype | None
    ) -> None:
        self.weight = weight
        self._bias = bias
        self._gate = gate
        self._out_dtype = out_dtype
        self._dense = weight if isinstance(weight, Tensor) else None

    def __call__(self, x: Tensor) -> Tensor:
        if isinstance(self.weight, Int8Weight):
            y = multiply_int8(x, self.weight)
            y = y if self._bias is None else y + self._bias
        elif isinstance(self.weight, Int4Weight) and self.weight.int8_activations:
            bias = None if self._bias is None else self._bias.to(torch.float32)
            y = F.linear(quantize_groups(x, self.weight), self._dense_weight(torch.float32), bias)
        else:
            y = F.linear(x, self._dense_weight(x.dtype), self._bias)
        if self._gate is not None:
            gate, up = y.chunk(2, dim=-1)
            y = _ACTIVATIONS[self._gate](gate) * up
        return y.to(self._out_dtype or x.dtype)

    def _dense_weight(self, dtype: torch.dtype) -> Tensor:
        """[out, in]; 4-bit weights are dequantized at the first call, which is what tells the run's dtype."""
        if self._dense is None or self._dense.dtype != dtype:
            assert isinstance(self.weight, Int4Weight), f"activations of {dtype} meet a dense weight of another dtype"
            self._dense = self.weight.dequantize().to(dtype)
        return self._dense


class ReferenceExpertLinear:
    """A linear layer for each expert, on its own rows."""

    def __init__(self, weight: Weight, experts: int, gate: Activation | None, out_dtype: torch.dtype | None) -> None:
        rows = weight.shape[0] // experts
        parts = [rows_of(weight, index * rows, (index + 1) * rows) for index in range(experts)]
        self._linears = [ReferenceLinear(each, None, gate, out_dtype) for each in parts]
        self._width = rows if gate is None else rows // 2
        self._out_dtype = out_dtype

    def __call__(self, x: Tensor, offsets: Tensor) -> Tensor:
        y = x.new_zeros(len(x), self._width, dtype=self._out_dtype or x.dtype)
        for linear, (begin, end) in zip(self._linears, pairwise(offsets.tolist()), strict=True):
            if begin < end:
                y[begin:end] = linear(x[begin:end])
        return y


def held_rows(look_up: Embedding, held: range | None) -> Embedding:
    """A lookup in a table whose first rows are those of the held ids: zeros for any other; None holds all."""
    if held is None:
        return look_up

    def look_up_held(ids: Tensor) -> Tensor:
        is_held = (ids >= held.start) & (ids < held.stop)
        return look_up(torch.where(is_held, ids - held.start, 0)).masked_fill(~is_held.unsqueeze(1), 0.0)

    return look_up_held


def multiply_int8(x: Tensor, weight: Int8Weight) -> Tensor:
    """[T, in] by an 8-bit weight: [T, out] float32. The integer sums are exact; only the scaling rounds."""
    values, scale = quantize_rows(x)
    if x.device.type == "cpu":
        sums = torch._int_mm(values, weight.values.T)
    else:
        sums = values.to(torch.float64) @ weight.values.T.to(torch.float64)
    return sums.to(torch.float32) * scale * weight.scale


def quantize_groups(x: Tensor, weight: Int4Weight) -> Tensor:
    """[T, in] as a 4-bit weight with int8 activations meets it: [T, in] float32, each group of a token rounded to int8
    steps of its own."""
    ordered = x if weight.order is None else x[:, weight.order]
    values, scale = quantize_rows(ordered.unflatten(1, (-1, weight.group)))
    rounded = (values.to(torch.float32) * scale).flatten(1)
    if weight.order is None:
        return rounded
    restored = torch.empty_like(rounded)
    restored[:, weight.order] = rounded
    return restored


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """[..., N] to int8 values in [-127, 127] and their scale [..., 1] float32: symmetric, max|x| / 127, half to even.

    A row of zeros has scale 0.
    """
    x = x.to(torch.float32)
    scale = x.abs().amax(dim=-1, keepdim=True) / 127.0
    inverse = torch.where(scale > 0, 1.0 / scale, 0.0)
    return (x * inverse).round().clamp(-127, 127).to(torch.int8), scale


def weight_rows(weight: Weight, ids: Tensor, dtype: torch.dtype) -> Tensor:
    """Rows of a weight by number: [T] to [T, in] of `dtype`."""
    if isinstance(weight, Tensor):
        return F.embedding(ids, weight).to(dtype)
    if isinstance(weight, Int8Weight):
        return Int8Weight(weight.values[ids], weight.scale[ids]).dequantize().to(dtype)
    zero = None if weight.zero is None else weight.zero[ids]
    return replace(weight, packed=weight.packed[ids], scale=weight.scale[ids], zero=zero).dequantize().to(dtype)


@dataclass(frozen=True, slots=True, eq=False)
class _Slots:
    """Where tokens go in the pages of any layer."""

    pages: Tensor
    """[T] int64."""
    offsets: Tensor
    """[T] int64."""

    def store(self, heads: Tensor, into: KVPages) -> None:
        """Stores keys or values [T, kv_heads, head_dim], quantized where the cache is."""
        if into.scales is None:
            into.values[self.pages, self.offsets] = heads
            return
        values, scale = quantize_rows(heads)
        into.values[self.pages, self.offsets] = values
        into.scales[self.pages, self.offsets] = scale.squeeze(-1)


class PagedAttention:
    """One step's attention: decodes as padded batches, prompt chunks one by one, through torch's own SDPA.

    Sequences with one query are gathered into batches of similar length, since a call per sequence and layer would cost
    more than the arithmetic. Index tensors and masks are built on first use for each window and shared by all layers.
    """

    def __init__(self, layout: AttentionLayout) -> None:
        self._layout = layout
        self._slots = _Slots(
            torch.div(layout.slots, layout.page_tokens, rounding_mode="floor"), layout.slots % layout.page_tokens
        )
        self._keys: dict[tuple[int | None, torch.dtype], list[DecodeKeys | ChunkKeys]] = {}

    def write(self, qkv: Tensor, cos_sin: Tensor | None, k: KVPages, v: KVPages, norm: QKNorm | None = None) -> Tensor:
        kv_heads, head_dim = k.values.shape[2:]
        heads = qkv.view(qkv.shape[0], -1, head_dim)
        num_query_heads = heads.shape[1] - 2 * kv_heads
        queries, keys, values = heads.split((num_query_heads, kv_heads, kv_heads), dim=1)
        queries = turn(queries, cos_sin, None if norm is None else norm.q_weight, 0.0 if norm is None else norm.eps)
        keys = turn(keys, cos_sin, None if norm is None else norm.k_weight, 0.0 if norm is None else norm.eps)
        self._slots.store(keys, k)
        self._slots.store(values, v)
        return queries

    def attend(self, q: Tensor, k: KVPages, v: KVPages, *, scale: float, window: int | None) -> Tensor:
        keys = self._keys.get((window, q.dtype))
        if keys is None:
            keys = self._keys[window, q.dtype] = self._plan(window, q.dtype)
        if len(keys) == 1:
            return keys[0].attend(q, k, v, scale)
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        for part in keys:
            out[part.rows] = part.attend(q[part.rows], k, v, scale)
        return out

    def _plan(self, window: int | None, dtype: torch.dtype) -> list[DecodeKeys | ChunkKeys]:
        layout = self._layout
        decodes = [row for row, length in enumerate(layout.query_lens) if length == 1]
        groups = group_decodes({row: visible_pages(layout, row, window) for row in decodes})
        chunks = [row for row, length in enumerate(layout.query_lens) if length > 1]
        return [
            *(DecodeKeys.of(layout, rows, window, dtype) for rows in groups),
            *(ChunkKeys.of(layout, row, window, dtype) for row in chunks),
        ]


def visible_pages(layout: AttentionLayout, row: int, window: int | None) -> int:
    """Pages that the last query of a sequence can see a key of."""
    last = layout.lens[row] - 1
    first = 0 if window is None else max(0, last - window + 1)
    return last // layout.page_tokens - first // layout.page_tokens + 1


def turn(x: Tensor, cos_sin: Tensor | None, norm_weight: Tensor | None, eps: float) -> Tensor:
    """Normalises and rotates the heads of [T, N, D] in float32, rounding once to their dtype."""
    heads = x
    if norm_weight is not None:
        heads = F.rms_norm(x.to(torch.float32), (x.shape[-1],), norm_weight.to(torch.float32), eps)
    if cos_sin is not None:
        heads = rotate(heads, cos_sin)
    return heads.to(x.dtype)


def rotate(x: Tensor, cos_sin: Tensor) -> Tensor:
    """Rotates the first `rotary_dim` values of each head of [T, N, D] by [T, rotary_dim] angles, in float32."""
    rotary_dim = cos_sin.shape[1]
    cos, sin = cos_sin.unsqueeze(1).chunk(2, dim=-1)
    first, second = x[..., :rotary_dim].chunk(2, dim=-1)
    rotated = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)
    return rotated if rotary_dim == x.shape[-1] else torch.cat((rotated, x[..., rotary_dim:]), dim=-1)
