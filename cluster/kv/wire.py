"""What a replica and the KV host of its node say to each other, and how it is written on their Unix socket.

A frame is a 4-byte little-endian length and as many bytes of msgpack: an array of the message's kind and its fields.
Knows neither sockets nor pages. Whatever comes from the other side is checked here, once, for its form; what it means
is for the receiver to check.
"""

import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any, NamedTuple, TypeVar

import msgpack

from engine.kv.keys import KEY_BYTES

VERSION = 3
MAX_FRAME = 8 * 2**20
"""Bytes of a body. About 200,000 keys fit, which is more than the pages of any one sequence."""
ON_DISK = -1
"""In place of a slot: the page is on this node's disk."""
ELSEWHERE = -2
"""In place of a slot: the page is at the host of another node."""
MAX_TEXT = 4096
MAX_PARTS = 65_536
_LENGTH = struct.Struct("<I")
PREFIX_BYTES = _LENGTH.size
K = TypeVar("K")


class WireError(Exception):
    """Bytes that are no message, or a message too long to send: says what is wrong with it."""


class Entry(NamedTuple):
    """A page that was written into a granted slot."""

    slot: int
    key: bytes
    parent: bytes
    """The key of the page before it in its sequence; empty for a first page."""
    crc: int
    """CRC32C of the page's bytes."""


@dataclass(frozen=True, slots=True)
class Hello:
    """Client: the first message."""

    version: int
    layout: bytes
    """32 bytes: the fingerprint of model, dtype and page layout. Pages are shared by whoever has the same."""
    page_bytes: int
    name: str
    """For the log."""
    parts: int = 1
    """Layouts that are to share the host's budgets, of which this is one: as many as a model has ranks."""


@dataclass(frozen=True, slots=True)
class Commit:
    """Client: pages that were written completely into slots granted to it. The slots are the host's again."""

    entries: list[Entry]


@dataclass(frozen=True, slots=True)
class Committed:
    """Host: the answer to each Commit, in order."""

    dropped: list[bytes]
    """Keys of its pages that were not kept: the page before each is not here, so that nobody would find it."""


@dataclass(frozen=True, slots=True)
class Find:
    """Client: which of these consecutive pages are here? `ticket` names the question and the pins that answer it."""

    ticket: int
    keys: list[bytes]


@dataclass(frozen=True, slots=True)
class Fetch:
    """Client: bring the first `count` pages that were found into memory."""

    ticket: int
    count: int


@dataclass(frozen=True, slots=True)
class Release:
    """Client: unpin all pages of this ticket. The ticket is forgotten."""

    ticket: int


@dataclass(frozen=True, slots=True)
class Corrupt:
    """Client: the CRC of these pages was wrong when they were read."""

    keys: list[bytes]


@dataclass(frozen=True, slots=True)
class Welcome:
    """Host: the answer to Hello: the segment to map (`cluster.kv.segment`)."""

    path: str
    num_slots: int
    num_disk: int


@dataclass(frozen=True, slots=True)
class Refused:
    """Host: the answer to Hello of a client that it cannot serve."""

    reason: str


@dataclass(frozen=True, slots=True)
class Grant:
    """Host: free slots that this client alone may write to, until it commits them or its connection ends."""

    slots: list[int]


@dataclass(frozen=True, slots=True)
class Found:
    """Host: the longest run of keys that can be had. Those in memory are pinned until Release."""

    ticket: int
    slots: list[int]
    """By page: its slot (0 or more), ON_DISK or ELSEWHERE."""
    crcs: list[int]
    """By page; 0 where the page is not in memory."""


@dataclass(frozen=True, slots=True)
class Ready:
    """Host: a piece of what was fetched: pages `first`, `first + 1`, ... of the run are in memory, and pinned.

    The pieces come in order and cover all of the first `count` pages, those that were in memory before too. An empty
    piece says that page `first` cannot be had after all; no other follows it.
    """

    ticket: int
    first: int
    slots: list[int]
    crcs: list[int]


Message = Hello | Commit | Find | Fetch | Release | Corrupt | Welcome | Refused | Grant | Found | Ready | Committed

_Check = Callable[[Any], Any]
"""Returns the value as the message holds it. Raises WireError."""


def _integer(lowest: int, highest: int) -> _Check:
    def check(value: Any) -> int:
        # bool is an int to Python, and not to anyone else.
        if type(value) is not int or not lowest <= value <= highest:
            raise WireError(f"expected an integer from {lowest} to {highest}, got {value!r:.40}")
        return value

    return check


def _key(value: Any) -> bytes:
    if type(value) is not bytes or len(value) != KEY_BYTES:
        raise WireError(f"expected {KEY_BYTES} bytes, got {value!r:.40}")
    return value


def _text(value: Any) -> str:
    if type(value) is not str or len(value) > MAX_TEXT:
        raise WireError(f"expected a text of at most {MAX_TEXT} characters, got {value!r:.40}")
    return value


def _list_of(check: _Check) -> _Check:
    def check_all(value: Any) -> list[Any]:
        if type(value) is not list:
            raise WireError(f"expected an array, got {value!r:.40}")
        return [check(item) for item in value]

    return check_all


def _entry(value: Any) -> Entry:
    if type(value) is not list or len(value) != len(Entry._fields):
        raise WireError(f"expected a slot, a key, its parent and a CRC, got {value!r:.40}")
    slot, key, parent, crc = value
    return Entry(_slot(slot), _key(key), b"" if parent == b"" else _key(parent), _crc(crc))


_number = _integer(0, 2**63 - 1)
_slot = _integer(0, 2**31 - 1)
_place = _integer(ELSEWHERE, 2**31 - 1)
_crc = _integer(0, 2**32 - 1)

_KINDS: tuple[tuple[type, tuple[_Check, ...]], ...] = (
    (Hello, (_number, _key, _number, _text, _integer(1, MAX_PARTS))),
    (Commit, (_list_of(_entry),)),
    (Find, (_number, _list_of(_key))),
    (Fetch, (_number, _number)),
    (Release, (_number,)),
    (Corrupt, (_list_of(_key),)),
    (Welcome, (_text, _slot, _slot)),
    (Refused, (_text,)),
    (Grant, (_list_of(_slot),)),
    (Found, (_number, _list_of(_place), _list_of(_crc))),
    (Ready, (_number, _number, _list_of(_slot), _list_of(_crc))),
    (Committed, (_list_of(_key),)),
)
"""By kind, which is the place in this table and never changes: the message, and the checks of its fields."""
_KIND_OF = {message: kind for kind, (message, _) in enumerate(_KINDS)}


def encode(message: Message) -> bytes:
    """The frame of a message, its length included. Raises WireError for one that is longer than MAX_FRAME."""
    content = [getattr(message, field.name) for field in fields(message)]
    body = msgpack.packb([_KIND_OF[type(message)], *content])
    if len(body) > MAX_FRAME:
        raise WireError(f"{type(message).__name__} has {len(body)} bytes, more than the {MAX_FRAME} of a frame")
    return _LENGTH.pack(len(body)) + body


def body_length(prefix: bytes) -> int:
    """How long the body after the first PREFIX_BYTES bytes of a frame is. Raises WireError for more than MAX_FRAME."""
    length: int = _LENGTH.unpack(prefix)[0]
    if length > MAX_FRAME:
        raise WireError(f"a frame of {length} bytes is announced, more than {MAX_FRAME}")
    return length


def open_message(body: bytes | bytearray, kinds: Sequence[K]) -> tuple[K, list[Any]]:
    """What stands among `kinds` in the place that is a message's kind, and its fields, unchecked. Raises WireError."""
    try:
        content = msgpack.unpackb(body)
    except (ValueError, TypeError, OverflowError, msgpack.UnpackException) as error:
        raise WireError(f"not msgpack: {error}") from None
    if type(content) is not list or not content:
        raise WireError(f"expected an array of a kind and its fields, got {content!r:.40}")
    kind, *values = content
    if type(kind) is not int or not 0 <= kind < len(kinds):
        raise WireError(f"there is no message of kind {kind!r:.40}")
    return kinds[kind], values


def decode(body: bytes) -> Message:
    """The message of a frame's body. Raises WireError for anything that `encode` does not write."""
    (message, checks), values = open_message(body, _KINDS)
    if len(values) != len(checks):
        raise WireError(f"{message.__name__} has {len(checks)} fields, got {len(values)}")
    try:
        decoded: Message = message(*(check(value) for check, value in zip(checks, values, strict=True)))
    except WireError as error:
        raise WireError(f"{message.__name__}: {error}") from None
    if isinstance(decoded, Found | Ready) and len(decoded.slots) != len(decoded.crcs):
        raise WireError(f"{message.__name__}: {len(decoded.slots)} slots, but {len(decoded.crcs)} CRCs")
    return decoded
