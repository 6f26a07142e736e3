"""What travels between a gateway and the store of streams. Plain, picklable values; no Ray and no HTTP in here."""

import secrets
import time
from array import array
from collections.abc import Sequence
from dataclasses import dataclass

from deployments.messages import ModelCard
from deployments.streams.token_log import LogPart

_SPEC_BYTES = 1000


@dataclass(frozen=True, slots=True)
class StreamSpec:
    """A streamed request, with everything that was drawn or stamped for it: what another gateway needs to serve it."""

    kind: str
    """Which endpoint writes the answer."""
    body: bytes
    """As the client sent it; valid."""
    prompts: tuple["array[int]", ...]
    """Token ids: a template may have put the date into them."""
    seeds: tuple[int, ...]
    """Parallel to `prompts`."""
    answer_id: str
    created: int
    """Unix seconds."""
    card: ModelCard
    """Of the model that it is written for, as it was when the request came: its tokenizer, and how long it may get."""

    @classmethod
    def draw(
        cls,
        kind: str,
        body: bytes,
        prompts: Sequence[Sequence[int]],
        seed: int | None,
        answer_id: str,
        card: ModelCard,
    ) -> "StreamSpec":
        """A new request's. Without a seed of the client's every prompt gets one of its own."""
        seeds = tuple(secrets.randbits(63) if seed is None else seed for _ in prompts)
        packed = tuple(array("I", prompt) for prompt in prompts)
        return cls(kind, body, packed, seeds, answer_id, int(time.time()), card)

    @property
    def num_bytes(self) -> int:
        """Memory it takes, about."""
        return _SPEC_BYTES + len(self.body) + sum(prompt.itemsize * len(prompt) for prompt in self.prompts)


@dataclass(frozen=True, slots=True)
class Opened:
    """A stream that the store is to keep, all of it."""

    stream_id: str
    spec: StreamSpec
    log: LogPart
    attended: bool
    """Whether a client reads it from this gateway now."""
    finished: bool
    """Whether the answer is complete."""


@dataclass(frozen=True, slots=True)
class Growth:
    """What came of a stream since the last report, maybe nothing: that renews the lease."""

    stream_id: str
    start: int
    """Entries of the log before `part`."""
    part: LogPart
    attended: bool
    finished: bool


@dataclass(frozen=True, slots=True)
class Report:
    """Everything that a gateway has to say of its streams, in one call."""

    gateway_id: str
    """A name that no other gateway process ever has."""
    opened: tuple[Opened, ...] = ()
    grown: tuple[Growth, ...] = ()
    closed: tuple[str, ...] = ()
    """Streams that nobody will ask for any more."""
    room: int = 0
    """Orphaned streams that this gateway would take on."""


@dataclass(frozen=True, slots=True)
class Kept:
    """A stream, handed to a gateway that goes on with it."""

    stream_id: str
    spec: StreamSpec
    log: LogPart
    finished: bool


@dataclass(frozen=True, slots=True)
class Answer:
    """What a gateway learns from its report. Streams that are not named in it are kept as reported."""

    unknown: tuple[str, ...] = ()
    """To be sent whole: the store is new, or another gateway had them for a while."""
    taken: tuple[str, ...] = ()
    """Another gateway goes on with them."""
    refused: tuple[str, ...] = ()
    """Not kept: there is no room for them."""
    orphans: tuple[Kept, ...] = ()
    """The caller's from now on: their gateways fell silent."""


@dataclass(frozen=True, slots=True)
class Entry:
    """A stream as one store hands it to the next."""

    kept: Kept
    owner: str
    attended: bool
    silent_s: float
    """Since its gateway mentioned it last."""
    finished_s: float | None
    """Since the answer was complete, if it is."""
