"""What a group and its ranks say to each other of pages that overflow (`cluster.shards.fields`)."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cluster.kv.wire import WireError
from cluster.shards.fields import F64, I64, Kind, array, bytes_of, items, pack, real, record, truth, unpack, whole
from engine.kv.keys import KEY_BYTES
from engine.kv.tier import Save


@dataclass(frozen=True, slots=True)
class Saves:
    """Group: copy these pages to your node's host."""

    pages: tuple[Save, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Fetch:
    """Group: bring these pages back, as many of the first as are there and worth it."""

    ticket: int
    keys: tuple[bytes, ...]
    pages: tuple[int, ...]
    recompute: NDArray[np.float64]
    """[len(keys) + 1] seconds to compute what is left of the sequence when so many have been loaded."""


@dataclass(frozen=True, slots=True)
class GiveUp:
    """Group: nobody waits for these pages any more. What has come of them is told all the same."""

    ticket: int


@dataclass(frozen=True, slots=True)
class Saved:
    """Rank: a page may be written to again."""

    page: int
    stored: bool


@dataclass(frozen=True, slots=True)
class Fetched:
    """Rank: so many pages are there."""

    ticket: int
    num_pages: int
    seconds: float
    predicted_seconds: float


@dataclass(frozen=True, slots=True)
class State:
    """Rank: what its host is to it now, as `engine.kv.tier.Tier` has it, and totals since its start."""

    host: int
    room: int
    """With all of `received` in it."""
    received: int
    """Pages to copy that it was given since its start."""
    page_seconds: float
    corrupt: int
    failures: int


@dataclass(frozen=True, slots=True)
class News:
    """Rank: what has been finished since it last said something."""

    saved: tuple[Saved, ...]
    fetched: tuple[Fetched, ...]
    state: State


Message = Saves | Fetch | News | GiveUp


def encode(message: Message) -> bytes:
    """The bytes of a message. Raises WireError."""
    match message:
        case Saves(pages):
            content: list[Any] = [0, [[save.key, save.parent, save.page] for save in pages]]
        case Fetch(ticket, keys, pages, recompute):
            content = [1, ticket, b"".join(keys), np.array(pages, I64).tobytes(), bytes_of(recompute, F64)]
        case News(saved, fetched, state):
            content = [
                2,
                [[each.page, each.stored] for each in saved],
                [[e.ticket, e.num_pages, float(e.seconds), float(e.predicted_seconds)] for e in fetched],
                [state.host, state.room, state.received, float(state.page_seconds), state.corrupt, state.failures],
            ]
        case GiveUp(ticket):
            content = [3, ticket]
    return pack(type(message).__name__, content)


def decode(data: bytes) -> Message:
    """The message that was encoded. Raises WireError for anything that `encode` does not write."""
    return unpack(data, _KINDS)


def _read_saves(pages: Any) -> Saves:
    return Saves(tuple(_read_save(*record(each, 3)) for each in items(pages)))


def _read_save(key: Any, parent: Any, page: Any) -> Save:
    return Save(_key(key), b"" if parent == b"" else _key(parent), whole(page))


def _read_fetch(ticket: Any, keys: Any, pages: Any, recompute: Any) -> Fetch:
    numbers = array(pages, I64)
    if type(keys) is not bytes or len(keys) != KEY_BYTES * len(numbers):
        raise WireError(f"{len(numbers)} pages, but not as many keys")
    if len(numbers) and numbers.min() < 0:
        raise WireError("a page below 0")
    split = tuple(keys[start : start + KEY_BYTES] for start in range(0, len(keys), KEY_BYTES))
    return Fetch(whole(ticket), split, tuple(numbers.tolist()), array(recompute, F64, len(numbers) + 1))


def _read_news(saved: Any, fetched: Any, state: Any) -> News:
    host, room, received, page_seconds, corrupt, failures = record(state, 6)
    return News(
        tuple(_read_saved(*record(each, 2)) for each in items(saved)),
        tuple(_read_fetched(*record(each, 4)) for each in items(fetched)),
        State(whole(host), whole(room), whole(received), real(page_seconds), whole(corrupt), whole(failures)),
    )


def _read_saved(page: Any, stored: Any) -> Saved:
    return Saved(whole(page), truth(stored))


def _read_fetched(ticket: Any, num_pages: Any, seconds: Any, predicted_seconds: Any) -> Fetched:
    return Fetched(whole(ticket), whole(num_pages), real(seconds), real(predicted_seconds))


def _key(value: Any) -> bytes:
    if type(value) is not bytes or len(value) != KEY_BYTES:
        raise WireError(f"expected {KEY_BYTES} bytes, got {value!r:.40}")
    return value


_KINDS: tuple[Kind[Message], ...] = (
    ("Saves", 1, _read_saves),
    ("Fetch", 4, _read_fetch),
    ("News", 3, _read_news),
    ("GiveUp", 1, lambda ticket: GiveUp(whole(ticket))),
)
