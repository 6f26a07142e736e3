"""The pages of one layout on one node: in a segment, below it on disk, beside it at other hosts.

Owns what moves between these. Knows clients only as owners of slots and tickets; what is said to them, and when, is
the server's.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Coroutine, Iterable, Sequence
from typing import Any, TypeVar

import numpy as np

from cluster.kv.backing import Disk
from cluster.kv.checksum import crc32c
from cluster.kv.peers import PageCopy, Peers
from cluster.kv.segment import Segment
from cluster.kv.slots import Owner, Page, SlotError, SlotTable
from cluster.kv.stats import HostCounters
from cluster.kv.tags import hide, show
from cluster.kv.wire import ELSEWHERE, ON_DISK, Entry

logger = logging.getLogger(__name__)

T = TypeVar("T")

HOST = "host"
"""The owner of slots that the host itself writes to."""
PIECE_BYTES = 16 * 2**20
"""What is brought into memory at once, in whole pages: the first page is not to wait for the last."""
MAX_CREDIT = 32
MAX_AHEAD = 64
"""Slots kept free, at most, so that whoever needs one does not wait for the disk."""
DISK_PATIENCE_S = 1.0
"""How long a piece may take to be written before others get slots at the cost of pages that are not on disk."""
READ_PATIENCE_S = 2.0
"""How long a piece may take to be read from disk before whoever waits for it is told that it is not there. Well within
what a client waits for an answer."""
CLOSE_PATIENCE_S = 1.5
"""For what is under way when a store closes, and for pages to be written then."""
LAST_WRITE_S = 1.0
"""When a store closes, no further piece is begun after so long: there is to be time to end the last one."""


class Store:
    """One layout's pages. Only the event loop calls it; what waits for a disk or a peer does so in tasks of its own."""

    def __init__(
        self, layout: bytes, segment: Segment, disk: Disk | None, peers: Peers, counters: HostCounters
    ) -> None:
        """`layout`: 32 bytes. Takes the segment and the disk over."""
        self.layout = layout
        self.segment = segment
        self.table = SlotTable(segment.num_slots)
        self.disk = disk
        self.credit = max(1, min(MAX_CREDIT, segment.num_slots // 4))
        """Slots that each client may have."""
        self.on_free: Callable[[], None] = lambda: None
        """Called when slots may have become free by something that no client did."""
        self._peers = peers
        self._counters = counters
        # At least what one client is granted at once.
        self._ahead = min(MAX_AHEAD, segment.num_slots // 4)
        self._backed = bytearray(segment.num_slots)
        self._reading = asyncio.Lock()
        self._coming: dict[bytes, asyncio.Event] = {}
        """By the key of the first: pages on their way from a peer, until they are here or are not to come."""
        self._tasks: set[asyncio.Task[Any]] = set()
        self._demotion: asyncio.Task[None] | None = None
        self._writing_since = 0.0
        self._reminder: asyncio.TimerHandle | None = None
        self._wanted = 0
        """Free slots that loads wait for."""

    @property
    def piece(self) -> int:
        """Pages that are brought into memory at once."""
        return max(1, min(PIECE_BYTES // self.segment.page_bytes, self.segment.num_slots // 4))

    async def grant(self, client: Owner, count: int) -> list[int]:
        """Up to `count` slots that the client may write to, with memory behind each.

        No more than the disk makes room for: a client's pages can wait where they are, and are found there meanwhile.
        """
        self._keep_ahead()
        if self._disk_patience() > 0 and count > self.table.num_free:
            count = self.table.num_free
            if self._reminder is None:
                self._reminder = asyncio.get_running_loop().call_later(DISK_PATIENCE_S, self._remind)
        return await self._take(client, count)

    def commit(self, owner: Owner, entries: Iterable[Entry]) -> list[bytes]:
        """The owner has written these pages. Raises SlotError.

        A page whose predecessor is not here could not be found: its slot is free again. Returns the keys of those.
        """
        dropped = []
        for entry in entries:
            if entry.parent and self.table.get(entry.parent) is None and not self._on_disk(entry.parent):
                self.table.give_back(owner, entry.slot)
                dropped.append(entry.key)
            elif self.table.commit(owner, entry.slot, entry.key, entry.parent, entry.crc) is not None:
                show(self.segment.tags, entry.key)
        self._keep_ahead()
        return dropped

    def find(self, owner: Owner, ticket: int, keys: Sequence[bytes]) -> list[Page | None]:
        """The longest run of these keys on this node: pages in memory, pinned under the ticket; None if on disk."""
        run: list[Page | None] = []
        for key in keys:
            page = self.table.pin(owner, ticket, key)
            if page is None and not self._can_read(key):
                break
            run.append(page)
        return run

    def release(self, owner: Owner, ticket: int) -> None:
        """Drops the pins of a ticket."""
        self.table.release(owner, ticket)
        self._keep_ahead()

    async def find_elsewhere(self, keys: Sequence[bytes]) -> tuple[str, int]:
        """The host that has the longest run of these keys, and how many."""
        host, count = await self._peers.have(self.layout, keys)
        return host, min(count, len(keys))

    def has(self, key: bytes) -> bool:
        """Whether the page can be had on this node now."""
        return self.table.get(key) is not None or self._can_read(key)

    def discard(self, keys: Iterable[bytes]) -> None:
        """A client read these pages and their CRC was wrong."""
        gone = [page for key in keys if (page := self.table.discard(key)) is not None]
        self._forget(gone)
        self._counters.corrupt_total += len(gone)

    async def load(self, keys: Sequence[bytes], peer: str, pin: Callable[[bytes], object]) -> None:
        """Brings pages, at most `piece` of them, from disk or from a peer; `pin` is called with the key of each.

        What hangs is waited for by those who want it, for seconds, and by nobody else. It goes on when the caller is
        cancelled: a slot that a thread writes to cannot be given to another.
        """
        await asyncio.shield(self._start(self._load(keys, peer, pin)))

    async def copies(self, keys: Sequence[bytes]) -> list[PageCopy]:
        """The longest run of these pages, at most `piece` of them, for another node."""
        copies: list[PageCopy] = []
        for key in keys[: self.piece]:
            page = self.table.get(key)
            if page is not None:
                copies.append(PageCopy(key, page.parent, page.crc, self.segment.slot(page.slot).tobytes()))
            elif (copy := await self._copy_from_disk(key)) is not None:
                copies.append(copy)
            else:
                break
        self._counters.served_total += len(copies)
        return copies

    async def close(self) -> None:
        """Removes the segment, waits for what is under way, unless that hangs, and writes to disk what it can.

        Pages that are in memory alone are gone, those on disk stay.
        """
        began = time.monotonic()
        # At once: nobody is to open it any more, and what comes next may be cut short.
        self.segment.unlink()
        if self._reminder is not None:
            self._reminder.cancel()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(CLOSE_PATIENCE_S):
                while self._tasks:
                    await asyncio.wait(self._tasks)
                await self._write_all(until=began + LAST_WRITE_S)
        for task in list(self._tasks):
            task.cancel()
        if self.disk is not None:
            await self.disk.close()
        # A thread that still writes to a slot has a view of it, which keeps the mapping.
        self.segment.close()

    async def _take(self, owner: Owner, count: int) -> list[int]:
        """Slots with memory behind each; pages that nobody needs go for them, on disk or not."""
        slots, gone = self.table.grant(owner, count)
        self._forget(gone)
        self._counters.evictions_total += sum(not self._on_disk(page.key) for page in gone)
        self._keep_ahead()
        bare = [slot for slot in slots if not self._backed[slot]]
        if bare:
            await asyncio.shield(self._start(self._back(owner, bare)))
        return [slot for slot in slots if self._backed[slot]]

    async def _back(self, owner: Owner, bare: Sequence[int]) -> None:
        """Gets memory for slots that have never had any; those for which there is none are given up."""
        backed = await asyncio.to_thread(lambda: [self.segment.commit(slot) for slot in bare])
        lost = 0
        for slot, there in zip(bare, backed, strict=True):
            self._backed[slot] |= there
            if not there:
                lost += 1
                # If the owner has ended meanwhile, the next one finds out.
                with contextlib.suppress(SlotError):
                    self.table.retire(owner, slot)
        if lost:
            logger.warning("%s: no memory for %d of its slots, which stay unused", self.segment.path, lost)

    async def _load(self, keys: Sequence[bytes], peer: str, pin: Callable[[bytes], object]) -> None:
        keys = keys[: self.piece]
        first = next((key for key in keys if self.table.get(key) is None), None)
        if first is not None and self._can_read(first):
            # One after another: the disk is one, and whoever waits for the same pages finds them in memory then.
            async with self._reading:
                await self._load_from_disk(keys, pin)
        elif first is not None and peer:
            await self._load_from_peer([key for key in keys if not self.has(key)], peer, pin)
        for key in keys:
            pin(key)

    async def _load_from_disk(self, keys: Sequence[bytes], pin: Callable[[bytes], object]) -> None:
        keys = [key for key in keys if self.table.get(key) is None and self._can_read(key)]
        if not keys:
            return
        await self._free(len(keys))
        slots = await self._take(HOST, len(keys))
        await self._patiently(self._start(self._fill(keys[: len(slots)], slots, pin)))

    async def _fill(self, keys: Sequence[bytes], slots: Sequence[int], pin: Callable[[bytes], object]) -> None:
        """Reads pages from disk into these slots, which nobody else gets before the thread that does so returns."""
        assert self.disk is not None
        read = await self.disk.read(keys, [self.segment.slot(slot) for slot in slots])
        for key, slot, header in zip(keys, slots, read, strict=True):
            if header is None:
                self.table.give_back(HOST, slot)
                continue
            self.commit(HOST, [Entry(slot, key, *header)])
            self._counters.promotions_total += 1
            pin(key)

    async def _copy_from_disk(self, key: bytes) -> PageCopy | None:
        if self.disk is None or not self._can_read(key):
            return None
        buffer = bytearray(self.segment.page_bytes)
        read = await self._patiently(self._start(self.disk.read([key], [np.frombuffer(buffer, dtype=np.uint8)])))
        if read is None or read[0] is None:
            return None
        return PageCopy(key, *read[0], bytes(buffer))

    async def _patiently(self, reading: "asyncio.Task[T]") -> T | None:
        """What a read from disk has brought. None if it hangs: then it goes on by itself, and the disk rests."""
        assert self.disk is not None
        done, _ = await asyncio.wait([reading], timeout=READ_PATIENCE_S)
        if not done:
            self.disk.rest(reading)
            return None
        return reading.result()

    async def _load_from_peer(self, keys: Sequence[bytes], peer: str, pin: Callable[[bytes], object]) -> None:
        """Holds nothing up meanwhile but those who want the same pages: they come once."""
        if (coming := self._coming.get(keys[0])) is not None:
            await coming.wait()
            return
        coming = self._coming[keys[0]] = asyncio.Event()
        try:
            copies = await self._peers.pages(peer, self.layout, keys)
            await self._keep(keys, copies[: len(keys)], pin)
        finally:
            del self._coming[keys[0]]
            coming.set()

    async def _keep(self, keys: Sequence[bytes], copies: Sequence[PageCopy], pin: Callable[[bytes], object]) -> None:
        """Puts pages that a peer has sent into memory, those that are what they should be."""
        await self._free(len(copies))
        slots = await self._take(HOST, len(copies))
        for key, slot, copy in zip(keys, slots, copies, strict=False):
            whole = copy.key == key != copy.parent and len(copy.content) == self.segment.page_bytes
            if not whole or crc32c(copy.content) != copy.crc:
                self._counters.corrupt_total += 1
                self.table.give_back(HOST, slot)
                continue
            self.segment.slot(slot)[:] = np.frombuffer(copy.content, dtype=np.uint8)
            self.commit(HOST, [Entry(slot, key, copy.parent, copy.crc)])
            self._counters.received_total += 1
            pin(key)

    def _keep_ahead(self) -> None:
        """Writes the coldest pages to disk while few slots are free."""
        if self._demotion is None and self._short() > 0:
            self._writing_since = time.monotonic()
            self._demotion = self._start(self._demote())

    def _disk_patience(self) -> float:
        """Seconds that pages may still be on their way to disk; none if there are no such pages, or for too long."""
        if self._demotion is None:
            return 0.0
        return max(0.0, self._writing_since + DISK_PATIENCE_S - time.monotonic())

    def _remind(self) -> None:
        """Clients were given fewer slots than they may have; the disk may not have kept up since."""
        self._reminder = None
        self.on_free()

    def _short(self) -> int:
        """How many more slots should be free; none without a disk to write what is in them to."""
        if self.disk is None or not self.disk.writable:
            return 0
        return max(self._ahead, self._wanted) - self.table.num_free

    async def _free(self, count: int) -> None:
        """Waits until so many slots are free, if writing pages to disk makes them so.

        A load has the time, unlike a client that has new pages; and nothing is lost for what is not lost yet. But not
        for a disk that hangs.
        """
        self._wanted += count
        try:
            self._keep_ahead()
            while self._demotion is not None and self.table.num_free < count and (left := self._disk_patience()) > 0:
                await asyncio.wait([self._demotion], timeout=left)
        finally:
            self._wanted -= count

    async def _demote(self) -> None:
        assert self.disk is not None
        try:
            while (short := self._short()) > 0:
                pages = self.table.start_leaving(min(short, self.piece))
                if not pages:
                    break
                self._writing_since = time.monotonic()
                await self.disk.write([(page, self.segment.slot(page.slot)) for page in pages])
                gone = [page for page in pages if self.table.finish_leaving(page, go=self._on_disk(page.key))]
                self._forget(gone)
                self._counters.demotions_total += len(gone)
                self.on_free()
                if not any(self._on_disk(page.key) for page in pages):
                    break
        finally:
            self._demotion = None
            if not self.disk.writable:  # Nobody waits for it any more.
                self.on_free()

    async def _write_all(self, until: float) -> None:
        """Writes pages to disk for as long as there is time.

        First those that others on disk follow: ends go there first, and nobody finds one without its beginning.
        """
        if (disk := self.disk) is None:
            return
        followed = [page.key for page in self.table.pages() if page.key not in disk and disk.has_followers(page.key)]
        pages = [page for page in self.table.in_order(followed) if page.key not in disk][: disk.capacity]
        for begin in range(0, len(pages), self.piece):
            if not disk.writable or time.monotonic() >= until:
                break
            await disk.write([(page, self.segment.slot(page.slot)) for page in pages[begin : begin + self.piece]])

    def _on_disk(self, key: bytes) -> bool:
        return self.disk is not None and key in self.disk

    def _can_read(self, key: bytes) -> bool:
        return self.disk is not None and self.disk.readable and key in self.disk

    def _forget(self, gone: Iterable[Page]) -> None:
        for page in gone:
            hide(self.segment.tags, page.key)

    def _start(self, work: Coroutine[Any, Any, T]) -> "asyncio.Task[T]":
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task


def places(run: Sequence[Page | None], elsewhere: int) -> tuple[list[int], list[int]]:
    """The slots and CRCs of a `Found`: a run on this node and `elsewhere` pages after it on another."""
    slots = [ON_DISK if page is None else page.slot for page in run] + [ELSEWHERE] * elsewhere
    crcs = [0 if page is None else page.crc for page in run] + [0] * elsewhere
    return slots, crcs
