"""Where a rank stands in a replica, and what it says of itself once it has loaded its part. Plain, picklable values.

Imports no torch: whoever starts ranks need not compute.
"""

from dataclasses import dataclass, field

from engine.parallel.slices import TensorRank


@dataclass(frozen=True, slots=True)
class Place:
    """One rank's place in a replica."""

    stage: int
    stages: int
    layers: range
    """Of this stage."""
    tensor: TensorRank = field(default_factory=TensorRank)

    def __post_init__(self) -> None:
        if not 0 <= self.stage < self.stages:
            raise ValueError(f"stage {self.stage} of {self.stages}; expected 0 to {self.stages - 1}")
        if not self.layers or self.layers.step != 1:
            raise ValueError(f"stage {self.stage} has the layers {self.layers}; expected consecutive ones")

    @classmethod
    def alone(cls, layers: int) -> "Place":
        """Of the only rank of a model with so many layers."""
        return cls(0, 1, range(layers))

    @property
    def rank(self) -> int:
        """In the whole replica: stage after stage."""
        return self.stage * self.tensor.size + self.tensor.rank

    @property
    def world(self) -> int:
        """Ranks of the replica."""
        return self.stages * self.tensor.size

    @property
    def is_first(self) -> bool:
        """Whether token ids come in here."""
        return self.stage == 0

    @property
    def is_last(self) -> bool:
        """Whether logits are made here."""
        return self.stage == self.stages - 1

    @property
    def answers(self) -> bool:
        """Whether it is the one that draws tokens."""
        return self.is_last and self.tensor.rank == 0


@dataclass(frozen=True, slots=True)
class RankFacts:
    """What a rank has loaded, and what it has room for."""

    num_pages: int
    """Of keys and values, that it has room for at most. All ranks of a replica have the same number in the end."""
    page_tokens: int
    page_bytes: int
    """Of a page of this rank: its layers and heads."""
    weight_bytes: int
    max_position: int
    """Tokens of a sequence that the model is made for."""
    vocab_size: int
    eos_token_ids: tuple[int, ...]
    namespace: bytes
    """Equal only where pages mean the same; tells this rank's from those of others."""
