"""What an operator may choose about what runs beside the replicas, and about how these are cut. Frozen; holds no
resolved value.
"""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, model_validator

from engine.config import Auto, Bytes, Config, parse_bytes


class KVTierConfig(Config):
    """Where KV pages go that the replicas of a node have no room for, and live on when a replica dies."""

    memory: Annotated[Annotated[int, Field(ge=0)] | Auto, BeforeValidator(parse_bytes)] = "auto"
    """Bytes of shared memory on each node; "auto" is a quarter of what is free there, 0 turns all of this off."""
    disk: Path | None = None
    """A folder on each node for what that memory has no room for; it survives a restart. None for no such tier."""
    disk_size: Annotated[Bytes, BeforeValidator(parse_bytes)] = 16 * 2**30
    """Bytes of files in that folder."""

    @property
    def enabled(self) -> bool:
        return self.memory != 0


Strategy = Literal["PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"]
MAX_DEGREE = 256


class ParallelConfig(Config):
    """How one replica is cut into ranks, each a process of its own with one part of the model."""

    tensor: int = Field(default=1, ge=1, le=MAX_DEGREE)
    """Ranks that share every layer of a stage."""
    pipeline: int = Field(default=1, ge=1, le=MAX_DEGREE)
    """Stages of consecutive layers."""
    expert: int = Field(default=1, ge=1, le=MAX_DEGREE)
    """Groups of tensor ranks that the experts of a mixture are dealt out to; takes no ranks of its own."""
    layers: tuple[Annotated[int, Field(ge=1)], ...] | Auto = "auto"
    """Of each stage, in order; "auto" deals them out so that all stages have about as much arithmetic to do. What
    `manta plan` prints leaves most room on the machines that it was told of."""
    depth: Annotated[int, Field(ge=1, le=2 * MAX_DEGREE)] | Auto = "auto"
    """Batches in flight; "auto" is one for each stage."""
    strategy: Strategy | Auto = "auto"
    """How Ray places stages on nodes; "auto" spreads them. The ranks of a stage share a node where one has room."""
    labels: tuple[dict[str, str], ...] = ()
    """Labels that the node of each stage must have (Ray's label selectors), by stage, or one for all stages. With
    {"ray.io/node-id": ...} that is an explicit layout."""

    @property
    def ranks(self) -> int:
        return self.tensor * self.pipeline

    @model_validator(mode="after")
    def _is_consistent(self) -> "ParallelConfig":
        if self.tensor % self.expert:
            nearest = -(-self.tensor // self.expert) * self.expert
            raise ValueError(
                f"expert ({self.expert}) must divide tensor ({self.tensor}), as experts lie on tensor ranks: "
                f"tensor {nearest} would do"
            )
        if self.layers != "auto" and len(self.layers) != self.pipeline:
            raise ValueError(f"layers are given for {len(self.layers)} stages, and there are {self.pipeline}")
        if len(self.labels) not in (0, 1, self.pipeline):
            raise ValueError(f"labels are given for {len(self.labels)} stages, and there are {self.pipeline}")
        return self
