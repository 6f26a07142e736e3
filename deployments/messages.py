"""What travels between a gateway and a replica. Plain, picklable values; no Ray and no HTTP in here."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from engine.sequence import Emission, Request
from engine.stats import EngineStats


@dataclass(frozen=True, slots=True)
class ModelCard:
    """What a gateway must know about the model a replica serves."""

    name: str
    """The served model name."""
    path: str
    """Local directory of the tokenizer and configuration."""
    max_model_len: int
    vocab_size: int
    eos_token_ids: tuple[int, ...]
    created: int
    """Unix seconds."""


@dataclass(frozen=True, slots=True)
class Submit:
    """A request on its way to whichever replica the router picks."""

    request: Request
    gateway_id: str
    cost: int
    """Tokens to prefill plus tokens that may be generated: what the router balances."""
    outstanding: Mapping[str, int] = field(default_factory=dict)
    """Replica id -> cost of the unfinished requests there, as far as this gateway knows."""


@dataclass(frozen=True, slots=True)
class Accepted:
    """The replica that took a request: where its tokens will come from."""

    replica_id: str


@dataclass(frozen=True, slots=True)
class Frame:
    """Everything one engine iteration brought for the requests of one gateway."""

    replica_id: str
    emissions: tuple[Emission, ...]
    stats: EngineStats
