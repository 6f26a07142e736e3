"""Where pages go besides the device, as the scheduler sees it: copies of pages are sent there, and fetched back.

Knows keys, page numbers and seconds; neither memory nor sockets. Everything that takes time happens on the tier's own
thread. A tier may lose pages, refuse them or go away at any time: then it has nothing, and tokens are computed again.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray


class Save(NamedTuple):
    """A page of the device to copy: full, computed, and not written to until the tier says that it is done."""

    key: bytes
    parent: bytes
    """The key of the page before it; empty for a first page."""
    page: int


@dataclass(frozen=True, slots=True)
class Load:
    """Consecutive pages of one sequence to bring back, as many of the first as are there and are worth it."""

    ticket: int
    keys: list[bytes]
    pages: list[int]
    """[len(keys)] pages of the device to write to."""
    recompute_seconds: Callable[[int], float]
    """What computing the rest of the sequence is expected to take when so many of these pages have been loaded."""


@dataclass(frozen=True, slots=True)
class Saved:
    """An answer to `Save`: the page may be written to again."""

    page: int
    stored: bool
    """Whether it can be found in the tier, as long as the pages before it can be."""


@dataclass(frozen=True, slots=True)
class Loaded:
    """The answer to `Load`: the first `num_pages` pages hold what their keys say, and no other is written to."""

    ticket: int
    num_pages: int
    seconds: float = 0.0
    """From `Load` to this answer."""
    predicted_seconds: float = 0.0
    """What loading these pages was expected to take when it was decided on."""
    recompute_seconds: float = 0.0
    """What computing them was expected to take."""


Answer = Saved | Loaded


@dataclass(slots=True)
class TierStats:
    """What a tier has done since it exists. Only ever grows."""

    pages_saved: int = 0
    pages_loaded: int = 0
    pages_refused: int = 0
    """Offered, and not kept: the budget or the memory was used up, there was no host, or it lacked the page before."""
    pages_corrupt: int = 0
    """Came with a wrong checksum, and were not used."""
    failures: int = 0
    """Times that the host was lost or broke the protocol."""


class PageMemory(Protocol):
    """The device's pages as bytes, for a tier's own thread: it reads pages that nobody writes to, and writes to pages
    that nobody reads."""

    @property
    def page_bytes(self) -> int: ...

    def read(self, page: int, target: NDArray[np.uint8]) -> None:
        """Copies a page to `target` ([page_bytes])."""

    def write(self, page: int, source: NDArray[np.uint8]) -> None:
        """Copies `source` ([page_bytes]) to a page; when it returns, later steps see it."""


class Tier(Protocol):
    """A place for pages. All methods are called on the engine's thread and return at once, but for `poll`."""

    def host(self) -> int:
        """Which host takes pages now, by a number that none had before it; 0 while there is none. Nothing that one
        took is sure to be at the next."""

    def may_have(self, key: bytes) -> bool:
        """Whether the page is probably there, on this node. Costs microseconds; may err in both directions, and does
        not know what other nodes have and `load` would bring."""

    def room(self) -> int:
        """Pages that may be handed to `save` now, within the bandwidth that saving may take."""

    def save(self, pages: list[Save]) -> None:
        """Begins to copy pages; each is answered by a `Saved`."""

    def load(self, load: Load) -> None:
        """Begins to bring pages back, if that should be faster than to compute them; answered by a `Loaded`. Its ticket
        may be that of a load that has been answered, given up or not: nothing of that one is left."""

    def give_up(self, ticket: int) -> None:
        """A load that has not been answered is not waited for any more: it may end with the pages that it has brought.
        It is answered all the same."""

    def poll(self, timeout_s: float = 0.0) -> list[Answer]:
        """What was finished since the last call; waits up to `timeout_s` for the first."""

    def page_seconds(self) -> float:
        """What saving a page and loading it again is expected to take."""

    def stats(self) -> TierStats: ...

    def close(self) -> None:
        """Ends the thread; what was begun is not answered."""


TierFactory = Callable[[bytes, PageMemory], Tier]
"""Makes an engine's tier, of what its pages mean (32 bytes, equal only where they mean the same) and of the pages."""
