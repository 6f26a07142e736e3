"""The memory that one step of a rank needs besides weights and pages. Pure.

Counted from the values that live at the same time at the widest place of a layer, and at the logits; kernels that fuse
hold fewer of them. What a library allocates for itself is in the share of memory that a plan leaves alone.
"""

from dataclasses import dataclass

from cluster.planner.form import Form
from cluster.planner.shares import Share
from engine.models.spec import ModelSpec, RopeSpec

LOGITS_BYTES = 4
"""float32."""
_INDEX_BYTES = 8
_TOKEN_INDICES = 4
"""Token id, position, context and slot of each token."""
_PAGE_NUMBER_BYTES = 4
_LOGPROB_ROWS = 128
"""Rows whose logits are asked for at once, however few sequences run (`engine.runner`)."""


@dataclass(frozen=True, slots=True)
class StepLimits:
    """The largest step that can come."""

    tokens: int
    sequences: int
    table_pages: int
    """Pages of the longest sequence."""


def workspace_bytes(spec: ModelSpec, form: Form, share: Share, limits: StepLimits, *, last: bool) -> int:
    """Of one rank of a stage; `last` is of the stage that makes logits."""
    values = limits.tokens * form.item_bytes
    inside = values * _widest(spec, share)
    # Hidden states stay until logits are made of them, in memory of its own where layers and head are two programs.
    head = values * spec.hidden + _logits(spec, share, limits) if last else 0
    summed = values * spec.hidden if share.rank.size > 1 else 0
    return inside + head + summed + _quantized_rows(spec, form, share, limits) + _inputs(spec, limits)


def _widest(spec: ModelSpec, share: Share) -> int:
    """Values of a token that live at once, at most: the residual, what an operation reads, and what it makes."""
    hidden = spec.hidden
    qkv = (share.query_heads + 2 * share.kv_heads) * spec.head_dim
    attended = share.query_heads * spec.head_dim
    routed = share.routed * hidden
    return hidden + max(
        hidden + qkv,
        qkv + attended,
        attended + hidden,
        hidden + routed + share.mlp_rows,
        share.mlp_rows + share.mlp_channels,
        share.mlp_channels + routed + hidden,
    )


def _logits(spec: ModelSpec, share: Share, limits: StepLimits) -> int:
    """A rank's own part, the gathered whole, and a copy that sampling works on."""
    rows = max(limits.sequences, _LOGPROB_ROWS)
    gathered = share.vocabulary * share.rank.size if share.rank.size > 1 else 0
    return rows * LOGITS_BYTES * (share.vocabulary + gathered + spec.vocab_size)


def _quantized_rows(spec: ModelSpec, form: Form, share: Share, limits: StepLimits) -> int:
    """The input of a product in 8 bits, with a scale for each row."""
    if not form.multiplies_int8:
        return 0
    widest = max(spec.hidden, share.query_heads * spec.head_dim, share.mlp_channels)
    return limits.tokens * (widest + LOGITS_BYTES)


def _inputs(spec: ModelSpec, limits: StepLimits) -> int:
    angles = limits.tokens * spec.positions.rotary_dim * 4 if isinstance(spec.positions, RopeSpec) else 0
    table = limits.sequences * limits.table_pages * _PAGE_NUMBER_BYTES
    return limits.tokens * _TOKEN_INDICES * _INDEX_BYTES + table + angles
