"""The operators in plain torch: the oracle of the fused implementations, and what runs where none is available."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.kernels.operators import AttentionLayout
from engine.kernels.paged_sdpa import ChunkKeys, DecodeKeys, group_decodes
from engine.models.spec import Activation

_ACTIVATIONS: dict[Activation, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
}


class ReferenceOperators:
    """`engine.kernels.Operators` on any torch device and dtype."""

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
        total = x if residual is None else x + residual
        return F.rms_norm(total, (total.shape[-1],), weight, eps), total

    def layer_norm(
        self, x: Tensor, weight: Tensor, bias: Tensor, eps: float, residual: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        total = x if residual is None else x + residual
        return F.layer_norm(total, (total.shape[-1],), weight, bias, eps), total

    def gate(self, gate_up: Tensor, activation: Activation) -> Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return _ACTIVATIONS[activation](gate) * up

    def activate(self, x: Tensor, activation: Activation) -> Tensor:
        return _ACTIVATIONS[activation](x)

    def attention(self, layout: AttentionLayout) -> "PagedAttention":
        return PagedAttention(layout)


class PagedAttention:
    """One step's attention: decodes as padded batches, prompt chunks one by one, through torch's own SDPA.

    Sequences with one query are gathered into batches of similar length, since a call per sequence and layer would cost
    more than the arithmetic. Index tensors and masks are built on first use for each window and shared by all layers.
    """

    def __init__(self, layout: AttentionLayout) -> None:
        self._layout = layout
        self._slot_pages = torch.div(layout.slots, layout.page_tokens, rounding_mode="floor")
        self._slot_offsets = layout.slots % layout.page_tokens
        self._keys: dict[tuple[int | None, torch.dtype], list[DecodeKeys | ChunkKeys]] = {}

    def write(self, qkv: Tensor, cos_sin: Tensor | None, k_pages: Tensor, v_pages: Tensor) -> Tensor:
        kv_heads, head_dim = k_pages.shape[2:]
        heads = qkv.view(qkv.shape[0], -1, head_dim)
        num_query_heads = heads.shape[1] - 2 * kv_heads
        queries_keys, values = heads.split((num_query_heads + kv_heads, kv_heads), dim=1)
        if cos_sin is not None:
            queries_keys = rotate(queries_keys, cos_sin)
        queries, keys = queries_keys.split((num_query_heads, kv_heads), dim=1)
        k_pages[self._slot_pages, self._slot_offsets] = keys
        v_pages[self._slot_pages, self._slot_offsets] = values
        return queries

    def attend(self, q: Tensor, k_pages: Tensor, v_pages: Tensor, *, scale: float, window: int | None) -> Tensor:
        keys = self._keys.get((window, q.dtype))
        if keys is None:
            keys = self._keys[window, q.dtype] = self._plan(window, q.dtype)
        if len(keys) == 1:
            return keys[0].attend(q, k_pages, v_pages, scale)
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        for part in keys:
            out[part.rows] = part.attend(q[part.rows], k_pages, v_pages, scale)
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


def rotate(x: Tensor, cos_sin: Tensor) -> Tensor:
    """Rotates the first `rotary_dim` values of each head of [T, N, D] by [T, rotary_dim] angles, in float32."""
    rotary_dim = cos_sin.shape[1]
    cos, sin = cos_sin.unsqueeze(1).chunk(2, dim=-1)
    first, second = x[..., :rotary_dim].chunk(2, dim=-1)
    rotated = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)
    return rotated if rotary_dim == x.shape[-1] else torch.cat((rotated, x[..., rotary_dim:]), dim=-1)
