"""What one tensor rank holds of a layer, and of what comes before the first layer and after the last. Pure.

Follows from the slices of `engine.parallel` alone: bytes are counted, not estimated.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from cluster.planner.form import Form
from engine.models.spec import ModelSpec
from engine.parallel.slices import TensorRank, experts_of, is_held, key_heads, query_heads, slice_of

_EVERY_TOKEN = (
    "qkv",
    "out",
    "mlp_in",
    "mlp_out",
    "router",
    "shared_in",
    "shared_out",
    "shared_gate",
    "project_in",
    "project_out",
)
"""Modules whose weight multiplies every token."""
_EXPERTS = ("experts_in", "experts_out")
_TABLES = ("embed", "position")
"""Modules of which a token reads one row."""
_BEFORE = ("embed.weight", "project_in.weight", "position.weight")
_AFTER = ("final_norm.weight", "final_norm.bias", "project_out.weight")


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
    vocabulary: int
    """Rows of the head, those of padding included."""
    mlp_rows: int
    """Values that the first half of an MLP makes of a token, at most: of all experts that it is routed to here."""
    mlp_channels: int
    """Values that its second half takes."""
    routed: int
    """Experts of this rank that one token goes through at most; 0 for a model without."""

    def weight_bytes(self, layers: int, *, first: bool, last: bool) -> int:
        """Of a stage of so many layers. A model in one stage holds its tied embeddings once."""
        return layers * self.layer.num_bytes + self.end_bytes(first=first, last=last)

    def end_bytes(self, *, first: bool, last: bool) -> int:
        """Of what a stage holds besides layers."""
        ends = (self.before.num_bytes if first else 0) + (self.after.num_bytes if last else 0)
        return ends + (0 if not last or (first and self.tied) else self.head.num_bytes)


def shares(spec: ModelSpec, form: Form, tensor: int, expert: int) -> tuple[Share, ...]:
    """Of every tensor rank, in order. The degrees must have no obstacle."""
    # All layers are alike: the first stands for every one, and the plan of a deep model takes no longer.
    shapes = {name: shape for name, shape in spec.parameter_shapes().items() if _layer_of(name) in (None, "0")}
    return tuple(_share(_Counter(spec, form, TensorRank(rank, tensor, expert), shapes)) for rank in range(tensor))


def _layer_of(name: str) -> str | None:
    return name.split(".")[1] if name.startswith("layers.") else None


@dataclass(frozen=True, slots=True)
class _Counter:
    """Counts the slices of one rank."""

    spec: ModelSpec
    form: Form
    rank: TensorRank
    shapes: Mapping[str, tuple[int, ...]]

    def held(self, name: str) -> tuple[int, ...]:
        """The shape of the rank's slice; of no rows for a parameter that the model does not have."""
        if name not in self.shapes:
            return (0, 0)
        return slice_of(name, self.shapes[name], self.spec, self.rank, self.form.unit).shape

    def part(self, names: Iterable[str]) -> Part:
        held = (name for name in names if name in self.shapes and is_held(name, self.rank))
        return sum((self._one(name) for name in held), Part())

    def _one(self, name: str) -> Part:
        held = self.held(name)
        num_bytes = self.form.weight_bytes(name, held, self.spec)
        module = name.rpartition(".")[0].rpartition(".")[2]
        if module in _TABLES:
            return Part(num_bytes)
        if module in _EXPERTS:
            return Part(num_bytes, expert_bytes=num_bytes, expert_macs=math.prod(held))
        macs = math.prod(held) if module in _EVERY_TOKEN and name.endswith(".weight") else 0
        return Part(num_bytes, num_bytes, macs)


def _share(counter: _Counter) -> Share:
    spec, rank = counter.spec, counter.rank
    kv_heads = key_heads(spec, rank).count
    head = "embed.weight" if spec.tied_embeddings else "head.weight"
    matrix = counter.held(head)
    matrix_bytes = counter.form.weight_bytes(head, matrix, spec)
    rows, channels, routed = _widths(counter)
    return Share(
        rank=rank,
        layer=counter.part(name for name in counter.shapes if name.startswith("layers.")),
        before=counter.part(_BEFORE),
        after=counter.part(_AFTER),
        head=Part(matrix_bytes, matrix_bytes, math.prod(matrix)),
        tied=spec.tied_embeddings,
        query_heads=query_heads(spec, rank).count,
        kv_heads=kv_heads,
        layer_kv_bytes=counter.form.layer_kv_bytes(kv_heads, spec.head_dim),
        vocabulary=matrix[0],
        mlp_rows=rows,
        mlp_channels=channels,
        routed=routed,
    )


def _widths(counter: _Counter) -> tuple[int, int, int]:
    """`Share.mlp_rows`, `mlp_channels` and `routed`."""
    spec, prefix = counter.spec, "layers.0."
    if spec.experts is None:
        return counter.held(f"{prefix}mlp_in.weight")[0], counter.held(f"{prefix}mlp_out.weight")[1], 0
    routed = min(spec.experts.per_token, experts_of(spec, counter.rank).count)
    inner = counter.held(f"{prefix}experts_out.weight")[1]
    shared = counter.held(f"{prefix}shared_out.weight")[1]
    return 2 * (routed * inner + shared), routed * inner + shared, routed
