"""The operator boundary: what a decoder asks of the device besides matrix products and embeddings.

An implementation owns the arithmetic of these operators and nothing else: it knows no model, no sequence and no policy.
`ReferenceOperators` is the oracle of the others.
"""

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from engine.models.spec import Activation


@dataclass(frozen=True, slots=True, eq=False)
class AttentionLayout:
    """Where the T tokens of S sequences lie in one step. Names follow `torch.nn.attention.varlen.varlen_attn`.

    The tensors are on the model's device; `query_lens` and `lens` are the same numbers on the host, so that an
    implementation can plan its work without waiting for the device.
    """

    positions: Tensor
    """[T] int64 index of each token in its own sequence."""
    contexts: Tensor
    """[T] int64 length of each token's sequence, this step's tokens included."""
    slots: Tensor
    """[T] int64 where each token's keys and values go: page * page_tokens + offset."""
    cu_seq_q: Tensor
    """[S + 1] int32 where each sequence's tokens begin."""
    context_lens: Tensor
    """[S] int32 keys that each sequence holds, this step's tokens included."""
    page_table: Tensor
    """[S, P] int32; entries past a sequence's context are not read."""
    page_tokens: int
    query_lens: tuple[int, ...]
    lens: tuple[int, ...]


class StepAttention(Protocol):
    """Attention over the paged cache for one step; whatever depends on the layout alone was prepared when it was made.

    `k_pages` and `v_pages` are one layer of the cache: [pages, page_tokens, KV, D], strided.
    """

    def write(self, qkv: Tensor, cos_sin: Tensor | None, k_pages: Tensor, v_pages: Tensor) -> Tensor:
        """Rotates queries and keys and stores keys and values at the layout's slots; returns the queries [T, H, D].

        `qkv` is [T, (H + 2 KV) * D]: query heads, key heads, value heads. `cos_sin` is [T, rotary_dim] float32,
        cosines then sines, for the pairs (i, i + rotary_dim / 2) of each head; None rotates nothing.
        """

    def attend(self, q: Tensor, k_pages: Tensor, v_pages: Tensor, *, scale: float, window: int | None) -> Tensor:
        """Causal attention of [T, H, D] queries to their own sequences' keys; returns [T, H, D].

        With a `window`, a query sees itself and the `window - 1` keys before it.
        """


class Operators(Protocol):
    """Element-wise and reducing operators on a flat token axis. Results have the dtype of `x`."""

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """RMSNorm (Zhang & Sennrich, 2019) of `x + residual` over the last axis, in float32.

        Returns the normalised values and the sum, which is the next residual.
        """

    def layer_norm(
        self, x: Tensor, weight: Tensor, bias: Tensor, eps: float, residual: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """LayerNorm of `x + residual` over the last axis; returns the normalised values and the sum."""

    def gate(self, gate_up: Tensor, activation: Activation) -> Tensor:
        """`activation(gate) * up` of [T, 2 I], gate first, to [T, I] (Shazeer, 2020)."""

    def activate(self, x: Tensor, activation: Activation) -> Tensor:
        """The activation alone."""

    def attention(self, layout: AttentionLayout) -> StepAttention:
        """Prepares one step's attention; called once per step, not per layer."""
