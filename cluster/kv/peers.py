"""What a KV host asks of the hosts of other nodes. Names and plain values; how they are reached is not known here."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class PageCopy:
    """A page on its way to another node. Picklable."""

    key: bytes
    parent: bytes
    crc: int
    content: bytes


class Peers(Protocol):
    """The hosts of all other nodes. Neither call raises, nor takes more than seconds: a host that cannot be asked, or
    does not answer in time, has nothing."""

    async def have(self, layout: bytes, keys: Sequence[bytes]) -> tuple[str, int]:
        """The host that has the longest run of these keys, from the first on, and how many; 0 if none has any."""
        ...

    async def pages(self, host: str, layout: bytes, keys: Sequence[bytes]) -> list[PageCopy]:
        """The pages of the longest run of these keys that the host still has."""
        ...


class NoPeers:
    """This host is the only one."""

    async def have(self, layout: bytes, keys: Sequence[bytes]) -> tuple[str, int]:
        return "", 0

    async def pages(self, host: str, layout: bytes, keys: Sequence[bytes]) -> list[PageCopy]:
        return []
