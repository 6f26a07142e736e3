"""What a store of pages may have below its memory, as the store sees it."""

import asyncio
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from cluster.kv.slots import Page

View = NDArray[np.uint8]
"""[page_bytes], a page in memory."""


class Disk(Protocol):
    """The pages of this layout on disk. No call raises: what cannot be written or read is not there."""

    @property
    def writable(self) -> bool: ...

    @property
    def readable(self) -> bool:
        """Whether pages can be read now."""
        ...

    @property
    def capacity(self) -> int:
        """Pages that there is room for."""
        ...

    def __contains__(self, key: bytes) -> bool:
        """Whether the page is on disk, readable or not."""
        ...

    def has_followers(self, key: bytes) -> bool:
        """Whether pages on disk follow this one, which may not be there."""
        ...

    async def write(self, pages: Sequence[tuple[Page, View]]) -> None:
        """Writes what is not there yet; the views must not change meanwhile."""
        ...

    async def read(self, keys: Sequence[bytes], views: Sequence[View]) -> list[tuple[bytes, int] | None]:
        """Fills the views; by page, its parent and CRC, or None if it cannot be had.

        However long that takes: until it returns a thread may write to the views.
        """
        ...

    def rest(self, until: "asyncio.Future[Any]") -> None:
        """This read hangs: until it has come to its end, and some time after, nothing is readable."""
        ...

    async def close(self) -> None: ...
