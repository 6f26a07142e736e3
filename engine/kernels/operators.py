"""The operator boundary: everything that a decoder asks of the device.

An implementation owns the arithmetic of these operators and nothing else: it knows no model, no sequence and no policy.
`ReferenceOperators` is the oracle of the others. What a decoder holds for a whole life (linear layers, embeddings) is
prepared once, in whatever form the device likes best, and then called.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from engine.kv.cache import KVPages
from engine.models.spec import Activation
from engine.quant.weights import Weight

Linear = Callable[[Tensor], Tensor]
"""[T, in] to [T, out]."""
Embedding = Callable[[Tensor], Tensor]
"""[T] int64 row numbers to [T, width]."""
ExpertLinear = Callable[[Tensor, Tensor], Tensor]
"""[R, in] rows that lie expert by expert, and [experts + 1] int64 where those of each begin, to [R, out]. What comes of
rows behind the last expert's means nothing."""
RanksSum = Callable[[Tensor], Tensor]
"""See `Operators.sum_over_ranks`."""
Experts = Callable[[Tensor, Tensor], Tensor]
"""[T, hidden] and router logits [T, experts] float32 to [T, hidden]."""


@dataclass(frozen=True, slots=True)
class Routing:
    """Which experts a token runs, with what weights, and which of them are here."""

    experts: int
    """All there are: as many as a token has logits."""
    per_token: int
    """Of the largest logits, equal ones by rising number. A weight is the softmax over all experts, in float32."""
    renormalised: bool
    """Whether the weights of a token's experts are made to add up to 1."""
    held: range
    """The experts whose weights are here; results of others are for whoever holds them to add. Ranks that share a model
    all have every token, so that each runs its own experts on them and one sum brings the results together: no token
    has to travel to its experts and back (all-to-all), as it does where ranks have tokens of their own."""


class QKNorm(NamedTuple):
    """RMSNorm of every query and key head before rotation (Qwen3)."""

    q_weight: Tensor
    """[head_dim]."""
    k_weight: Tensor
    eps: float


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


@dataclass(frozen=True, slots=True, eq=False)
class Wanted:
    """The R tokens of a step whose hidden states are asked for: the last ones of some of its sequences, in its order.

    Every token's keys and values are needed, but in the last layer nothing else of a token that is not wanted.
    """

    rows: Tensor
    """[R] int64 where these tokens are among the step's T, ascending."""
    layout: AttentionLayout
    """Of these tokens alone, in those of the step's sequences that have any."""


class StepAttention(Protocol):
    """Attention over the paged cache for one step; what depends on the layout alone was prepared when it was made."""

    def write(self, qkv: Tensor, cos_sin: Tensor | None, k: KVPages, v: KVPages, norm: QKNorm | None = None) -> Tensor:
        """Normalises and rotates queries and keys, stores keys and values at the layout's slots.

        `qkv` is [T, (H + 2 KV) * D]: query heads, key heads, value heads; it may be overwritten. `cos_sin` is
        [T, rotary_dim] float32, cosines then sines, for the pairs (i, i + rotary_dim / 2) of each head; None rotates
        nothing. Returns the queries [T, H, D], which may be a view of `qkv`.
        """

    def attend(self, q: Tensor, k: KVPages, v: KVPages, *, scale: float, window: int | None) -> Tensor:
        """Causal attention of [T, H, D] queries to their own sequences' keys; returns [T, H, D], contiguous.

        With a `window`, a query sees itself and the `window - 1` keys before it.
        """


class Operators(Protocol):
    """Operators on a flat axis of T tokens. Results have the dtype of `x` unless said otherwise."""

    def linear(
        self,
        weight: Weight,
        bias: Tensor | None = None,
        *,
        gate: Activation | None = None,
        out_dtype: torch.dtype | None = None,
    ) -> Linear:
        """Prepares `x @ weight.T + bias`.

        With `gate` the weight's rows are [gate; up], and the result is `gate(x) * up` (Shazeer, 2020), [T, out / 2].
        """

    def expert_linear(
        self, weight: Weight, experts: int, *, gate: Activation | None = None, out_dtype: torch.dtype | None = None
    ) -> ExpertLinear:
        """Prepares `linear` for weights of one shape that lie one below the other, one for each expert."""

    def experts(self, routing: Routing, inner: ExpertLinear, outer: ExpertLinear) -> Experts:
        """Prepares a mixture of experts: `outer(inner(x))` of each of a token's experts, summed by their weights.

        `expert_linear` made both for the held experts, `outer` with float32 results. The sum has a fixed order, so that
        a token's result does not depend on the tokens beside it.
        """

    def embedding(self, table: Tensor, held: range | None = None) -> Embedding:
        """Prepares a lookup of rows of [rows, width], in the table's dtype.

        With `held`, the table's first rows are those of these ids, and the rows of all others are zeros.
        """

    def tied_embedding(self, head: Linear, dtype: torch.dtype, held: range | None = None) -> Embedding:
        """A lookup of the rows of the weight of `head`, which `linear` made: nothing is held twice."""

    def sum_over_ranks(self, x: Tensor) -> Tensor:
        """The sum of every rank's x, which all of them call with one shape: the same bits for each. It may take the
        place of x. Where no other rank has a part of the model it is x itself, and costs nothing."""

    def add(self, a: Tensor, b: Tensor) -> Tensor:
        """a + b of one shape."""

    def add_gated(self, a: Tensor, b: Tensor, gate: Tensor) -> Tensor:
        """a + sigmoid(gate) * b, a and b of one shape, with a gate for each token: [T, 1] float32."""

    def take_rows(self, x: Tensor, rows: Tensor) -> Tensor:
        """[T, ...] to [R, ...]: the rows `Wanted.rows` of x, contiguous."""

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """RMSNorm (Zhang & Sennrich, 2019) of `x + residual` over the last axis, in float32.

        Returns the normalised values and the sum, which is the next residual.
        """

    def layer_norm(
        self, x: Tensor, weight: Tensor, bias: Tensor, eps: float, residual: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """LayerNorm of `x + residual` over the last axis; returns the normalised values and the sum."""

    def activate(self, x: Tensor, activation: Activation) -> Tensor:
        """The activation alone."""

    def attention(self, layout: AttentionLayout) -> StepAttention:
        """Prepares the attention of one layout; called once per step and layout, not per layer."""
