"""The nouns of a plan: what is asked, the layout that answers it, and what each rank then holds. Pure."""

import math
from dataclasses import dataclass, field
from typing import Literal

from cluster.planner.form import Form
from cluster.planner.nodes import Node
from cluster.planner.rates import Accelerator
from cluster.planner.timing import Prediction
from engine.models.spec import ModelSpec
from engine.parallel.slices import Run, TensorRank

Preference = Literal["throughput", "latency"]


@dataclass(frozen=True, slots=True)
class Layout:
    """How one replica is cut: stages of layers, tensor ranks in each, and groups of these that experts are dealt to."""

    tensor: int = 1
    pipeline: int = 1
    expert: int = 1

    @property
    def ranks(self) -> int:
        """Accelerators of a replica. Experts lie on the tensor ranks and take none of their own."""
        return self.tensor * self.pipeline

    def distance(self, other: "Layout") -> float:
        """How far apart two layouts are: doublings and halvings from one to the other."""
        pairs = ((self.tensor, other.tensor), (self.pipeline, other.pipeline), (self.expert, other.expert))
        return sum(abs(math.log2(a / b)) for a, b in pairs)

    def __str__(self) -> str:
        return f"TP{self.tensor} x PP{self.pipeline}" + (f" x EP{self.expert}" if self.expert > 1 else "")


@dataclass(frozen=True, slots=True)
class Wishes:
    """What the operator decides; None is left to the planner."""

    tensor: int | None = None
    pipeline: int | None = None
    expert: int | None = None
    replicas: int | None = None
    prefer: Preference = "throughput"
    """Most output tokens a second of all replicas, or the fewest seconds a token of one stream that is alone."""
    context: int | None = None
    """Tokens of a sequence that concurrency is counted in, half of them prompt; None is the model's length, at most
    4,096, or less if that is all the memory holds."""
    sequences: int = 128
    """Of one replica at once, at most."""
    batch_tokens: int = 1024
    """Of one step, at most."""
    memory_share: float = 0.9
    """Of an accelerator's memory that ranks use; drivers, libraries and fragmentation have the rest."""

    def __post_init__(self) -> None:
        for name in ("tensor", "pipeline", "expert", "replicas", "sequences", "batch_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1")
        if self.batch_tokens < self.sequences:
            raise ValueError(
                f"batch_tokens is {self.batch_tokens}; it must be at least sequences ({self.sequences}), for every one "
                "decodes a token in a step"
            )
        if self.context is not None and self.context < 2:
            raise ValueError(f"context is {self.context}; a prompt and an output of one token each are 2")
        if not 0 < self.memory_share <= 1:
            raise ValueError(f"memory_share is {self.memory_share}; it must be above 0 and at most 1")


@dataclass(frozen=True, slots=True)
class Problem:
    """A model, the machines it is to run on, and what is wished."""

    spec: ModelSpec
    form: Form
    nodes: tuple[Node, ...]
    accelerator: Accelerator
    wishes: Wishes = field(default_factory=Wishes)

    @property
    def num_accelerators(self) -> int:
        return sum(node.accelerators for node in self.nodes)


@dataclass(frozen=True, slots=True)
class Shard:
    """What one rank of a replica holds, in bytes."""

    stage: int
    rank: TensorRank
    node: str
    layers: range
    query_heads: Run
    kv_heads: Run
    experts: Run
    weight_bytes: int
    kv_bytes: int
    workspace_bytes: int
    usable_bytes: int
    """Of its accelerator's memory."""

    @property
    def num_bytes(self) -> int:
        return self.weight_bytes + self.kv_bytes + self.workspace_bytes


@dataclass(frozen=True, slots=True)
class Rival:
    """A layout that was not taken."""

    layout: Layout
    replicas: int
    sequences: int
    tokens_per_second: float
    lone_token_seconds: float


@dataclass(frozen=True, slots=True)
class Plan:
    """A layout that fits, and what comes of it."""

    layout: Layout
    replicas: int
    shards: tuple[Shard, ...]
    """Of the replica with least room, stage by stage."""
    pages: int
    """Of a replica's pool: each rank has this many, of its layers and heads."""
    page_tokens: int
    kv_memory: int
    """Bytes of these pages on all ranks of a replica: what `kv.memory` must be for it to make as many."""
    context: int
    """See `Wishes.context`."""
    prediction: Prediction
    reasons: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    rivals: tuple[Rival, ...] = ()

    @property
    def layers(self) -> tuple[int, ...]:
        """Of each stage."""
        return tuple(len(shard.layers) for shard in self.shards if shard.rank.rank == 0)

    @property
    def kv_tokens(self) -> int:
        """That one replica has room for."""
        return self.pages * self.page_tokens

    @property
    def sequences(self) -> int:
        """Of `context` tokens, that one replica has room for and may run."""
        return self.prediction.sequences

    @property
    def tokens_per_second(self) -> float:
        """Output of all replicas."""
        return self.replicas * self.prediction.tokens_per_second

    def as_rival(self) -> Rival:
        alone = self.prediction.lone_token_seconds
        return Rival(self.layout, self.replicas, self.sequences, self.tokens_per_second, alone)
