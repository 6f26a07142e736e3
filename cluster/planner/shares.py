"""What one tensor rank holds of a layer, and of what comes before the first layer and after the last. Pure.

Follows from the slices of `engine.parallel` alone: bytes are counted, not estimated.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

from cluster.planner.form import Form
from engine.models.spec import ModelSpec
from engine.parallel.slices import TensorRank, key_heads, query_heads, slice_of

_EVERY_TOKEN = (
    ("qkv", "out", "mlp_in", "mlp_out", "router", "shared_in", "shared_out", "shared_gate", "project_in", "project_out")
)
"""Modules whose weight multiplies every token."""
_EXPERTS = ("experts_in", "experts_out")
_BEFORE = ("embed.weight", "project_in.weight", "position.weight")
_AFTER = ("final_norm.weight", "final_norm.bias", "project_out.weight", "head.weight")


@dataclass(frozen=True, slots=True)
class Part:
    """Some of a rank's parameters."""

    num_bytes: int = 0
    read_bytes: int = 0
    """Of them, those that a step reads whatever its tokens are: not a table of embeddings, not the experts."""
    macs: int = 0
    """Multiplications with an addition for each token."""
    expert_bytes: int = 0
    """Of `num_bytes`, those of experts that tokens are routed to."""
    expert_macs: int = 0
    """If a token went through all of these experts."""

    def __add__(self, other: "Part") -> "Part":
        return Part(
            self.num_bytes + other.num_bytes,
            self.read_bytes + other.read_bytes,
            self.macs + other.macs,
            self.expert_bytes + other.expert_bytes,
            self.expert_macs + other.expert_macs,
        )


@dataclass(frozen=True, slots=True)
class Share:
    """One tensor rank's part of a model, whichever layers it has."""

    rank: TensorRank
    layer: Part
    before: Part
    """Embeddings and positions, of a rank of the first stage."""
    after: Part
    """The last norm and a projection, of a rank of the last stage."""
    head: Part
    """The matrix that makes logits, of a rank of the last stage; where it is tied, the embeddings again."""
    tied: bool
    query_heads: int
    kv_heads: int
    layer_kv_bytes: int
    """Of one token's keys and values in one layer."""

    def weight_bytes(self, layers: int, *, first: bool, last: bool) -> int:
        """Of a stage of so many layers. A model in one stage holds its tied embeddings once."""
        ends = (self.before.num_bytes if first else 0) + (self.after.num_bytes if last else 0)
        head = 0 if not last or (first and self.tied) else self.head.num_bytes
        return layers * self.layer.num_bytes + ends + head


def shares(spec: ModelSpec, form: Form, tensor: int, expert: int) -> tuple[Share, ...]:
    """Of every tensor rank, in order. The degrees must have no obstacle."""
    return tuple(_share(spec, form, TensorRank(rank, tensor, expert)) for rank in range(tensor))


def _share(spec: ModelSpec, form: Form, rank: TensorRank) -> Share:
    shapes = spec.parameter_shapes()
    kv_heads = key_heads(spec, rank).count

    def part(names: Iterable[str]) -> Part:
        return sum((_part(name, shapes[name], spec, form, rank) for name in names if name in shapes), Part())

    head = "embed.weight" if spec.tied_embeddings else "head.weight"
    matrix = _part(head, shapes[head], spec, form, rank)
    return Share(
        rank=rank,
        layer=part(name for name in shapes if name.startswith("layers.0.")),
        before=part(_BEFORE),
        after=part(name for name in _AFTER if name != "head.weight"),
        head=Part(matrix.num_bytes, matrix.num_bytes, _elements(head, shapes[head], spec, form, rank)),
        tied=spec.tied_embeddings,
        query_heads=query_heads(spec, rank).count,
        kv_heads=kv_heads,
        layer_kv_bytes=form.layer_kv_bytes(kv_heads, spec.head_dim),
    )


def _part(name: str, shape: tuple[int, ...], spec: ModelSpec, form: Form, rank: TensorRank) -> Part:
    held = slice_of(name, shape, spec, rank, form.unit).shape
    num_bytes = form.weight_bytes(name, held, spec)
    module = name.rpartition(".")[0].rpartition(".")[2]
    if name in ("embed.weight", "position.weight", "head.weight"):
        return Part(num_bytes)
    if module in _EXPERTS:
        return Part(num_bytes, expert_bytes=num_bytes, expert_macs=math.prod(held))
    macs = math.prod(held) if module in _EVERY_TOKEN and name.endswith(".weight") else 0
    return Part(num_bytes, num_bytes, macs)


def _elements(name: str, shape: tuple[int, ...], spec: ModelSpec, form: Form, rank: TensorRank) -> int:
    return math.prod(slice_of(name, shape, spec, rank, form.unit).shape)
