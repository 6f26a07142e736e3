"""The way of a page between a device and a host's memory.

Each page lies in one buffer on its way, which the cache of the CPU holds, and is summed up there. Knows no connection.
"""

import numpy as np

from cluster.kv.checksum import crc32c
from cluster.kv.segment import Segment
from engine.kv.tier import PageMemory


class Passage:
    """Copies one page at a time. Not thread-safe."""

    def __init__(self, memory: PageMemory) -> None:
        self._memory = memory
        self._page = np.empty(memory.page_bytes, np.uint8)

    def out(self, page: int, segment: Segment, slot: int) -> int:
        """Copies a page of the device to a slot; its CRC32C."""
        self._memory.read(page, self._page)
        checksum = crc32c(self._page)
        segment.write(slot, self._page)
        return checksum

    def into(self, page: int, segment: Segment, slot: int, checksum: int) -> bool:
        """Copies a slot to a page of the device; False, and that stays as it is, where it is not what was summed up."""
        segment.read(slot, self._page)
        if crc32c(self._page) != checksum:
            return False
        self._memory.write(page, self._page)
        return True
