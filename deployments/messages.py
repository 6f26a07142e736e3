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
    """Tokens of one sequence that there is room for; replicas of one model may differ in it."""
    vocab_size: int
    eos_token_ids: tuple[int, ...]
    created: int
    """Unix seconds."""
    identity: str
    """Equal for replicas of which any can go on with what another one began: the same answers, but for rounding."""

    def fits(self, request: Request) -> bool:
        """Whether a replica of this card can answer a request: the same model, with room for prompt and output.

        A request that names no model is for whichever there is; whether that has room for it, its engine says.
        """
        length = len(request.prompt_token_ids) + (request.params.max_tokens or 0)
        return not request.model or (request.model == self.identity and length <= self.max_model_len)


@dataclass(frozen=True, slots=True)
class Describe:
    """Asks one replica, or whichever the router picks, for its card."""

    replica_id: str | None = None


@dataclass(frozen=True, slots=True)
class Described:
    """The card of one replica; as the answer to a request: why it is not for this replica."""

    replica_id: str
    card: ModelCard


@dataclass(frozen=True, slots=True)
class Submit:
    """A request on its way to whichever replica the router picks."""

    request: Request
    gateway_id: str
    """By which the replica knows who asks for its tokens: a gateway has several, one after the other."""
    cost: int
    """Tokens to prefill plus tokens that may be generated: what the router balances."""
    outstanding: Mapping[str, int] = field(default_factory=dict)
    """Replica id -> tokens outstanding there, as far as this gateway knows: its live ledger, which the router in the
    gateway's process reads and books on. It is not sent to the replica."""
    unfit: frozenset[str] = frozenset()
    """Replicas that are known to be unable to serve it."""


@dataclass(frozen=True, slots=True)
class Accepted:
    """The replica that took a request: where its tokens will come from."""

    replica_id: str


@dataclass(frozen=True, slots=True)
class Unavailable:
    """The replica is there, but its engine takes no more requests; another replica may."""

    replica_id: str


@dataclass(frozen=True, slots=True)
class Attach:
    """Asks one replica for the frames of one gateway's requests."""

    gateway_id: str
    replica_id: str


@dataclass(frozen=True, slots=True)
class Abort:
    """Tells one replica that nobody reads these requests any more."""

    gateway_id: str
    replica_id: str
    request_ids: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Frame:
    """Everything that one engine iteration, or several if the gateway is behind, brought for one gateway's requests.

    A frame without emissions is a sign of life.
    """

    replica_id: str
    emissions: tuple[Emission, ...]
    stats: EngineStats
