"""The disk tier: which pages are files, within a budget of bytes, one folder a layout.

Owns what is written, found again after a restart, and deleted. The format of a file is `cluster.kv.page_file`'s. A disk
that fails is never an error to the caller: what cannot be written or read is not there. One that cannot be written to
is read from on, and nothing more is written until the next start. One that hangs shows no page until it is over that.
"""

import asyncio
import contextlib
import fcntl
import logging
import os
import re
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from cluster.kv.page_file import (
    HEADER_BYTES,
    SUFFIX,
    UNFINISHED,
    Opener,
    PageFileError,
    PageHeader,
    file_name,
    open_new,
    read_header,
    read_page,
    write_page,
)
from cluster.kv.segment import round_up
from cluster.kv.slots import Page, SlotTable
from cluster.kv.stats import HostCounters
from cluster.kv.tags import Tags, hide, new_table, show

logger = logging.getLogger(__name__)
T = TypeVar("T")

MAX_PAGES = 2**22
"""Of one layout: each has two places for a tag in the segment."""
READERS = 4
"""Threads that read: a few that hang leave some to the others, and all other threads of the host alone."""
REST_S = 30.0
"""How long nothing is read of a layout once a read that hung has come to its end: it is likely to happen again."""
SURVEY_PATIENCE_S = 60.0
"""For what is on the disk to be found, before a host serves without."""
CLOSE_PATIENCE_S = 1.5
"""For what is being written when the tier closes."""
_LAYOUT_FOLDER = re.compile(r"[0-9a-f]{64}")
_LOCK_NAME = ".manta-kv.lock"
_WRITER = "writer"
_READER = "reader"


def file_bytes(page_bytes: int) -> int:
    """What a page's file takes of the disk, in whole blocks."""
    return round_up(HEADER_BYTES + page_bytes)


class DiskTier:
    """The folder of a host's disk tier."""

    def __init__(self, root: Path, budget: int, counters: HostCounters, opener: Opener = open_new) -> None:
        """`budget`: bytes of all files together."""
        self.root = root
        self.writable = True
        self.opener = opener
        self.counters = counters
        self._budget = budget
        self._open: dict[str, LayoutDisk] = {}
        self._stale: dict[str, int] = {}
        """Folders of layouts that nobody uses and their bytes, those used longest ago first."""
        self._lock = -1
        self._off = False
        """Whether the folder is left alone: another host uses it, or it could not even be looked through."""
        # One thread, so that files are written and deleted in the order in which that was decided.
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="kv-disk")
        self._readers = ThreadPoolExecutor(READERS, thread_name_prefix="kv-disk-read")

    @property
    def num_pages(self) -> int:
        """Pages that can be found."""
        return sum(disk.table.num_pages for disk in self._open.values())

    @property
    def num_bytes(self) -> int:
        """Bytes of all files, those of layouts that nobody uses too."""
        return sum(disk.num_bytes for disk in self._open.values()) + sum(self._stale.values())

    async def start(self) -> None:
        """Makes the folder if need be, and looks what is in it. A tier that cannot be used says so in the log."""
        try:
            self._stale = await asyncio.wait_for(self.write_thread(self._survey), SURVEY_PATIENCE_S)
        except BlockingIOError:
            self._off, self.writable = True, False
            logger.warning("The disk tier is off: another host uses %s", self.root)
        except TimeoutError:
            self._off, self.writable = True, False
            logger.warning("The disk tier is off: to look through %s takes over %.0f s", self.root, SURVEY_PATIENCE_S)
        except OSError as error:
            self.switch_off(error)

    async def open(self, layout: bytes, page_bytes: int, parts: int = 1) -> "LayoutDisk | None":
        """The pages of a layout, with its part of the budget, if others in use leave as much; None if that is not even
        one page, or if the disk is not to be used."""
        size = file_bytes(page_bytes)
        left = self._budget - sum(disk.table.num_slots * disk.file_bytes for disk in self._open.values())
        left = min(left, self._budget // parts)
        num_pages = min(left // size, MAX_PAGES)
        name = layout.hex()
        if self._off:
            return None
        if num_pages < 1:
            logger.warning("The disk tier is off for this layout: %d bytes are left, a page takes %d", left, size)
            return None
        disk = LayoutDisk(self, layout, page_bytes, num_pages)
        self._stale.pop(name, None)
        self._open[name] = disk
        try:
            await asyncio.wait_for(disk.recover(), SURVEY_PATIENCE_S)
        except TimeoutError:
            logger.warning("The disk tier is off for this layout: it takes over %.0f s to be found", SURVEY_PATIENCE_S)
            await disk.close()
            return None
        return disk

    def closed(self, name: str, num_bytes: int) -> None:
        """A layout is not in use any more: its files may go when others need the room."""
        del self._open[name]
        self._stale[name] = num_bytes

    async def make_room(self, num_bytes: int) -> None:
        """Deletes folders that nobody uses until so much more fits the budget, or none is left."""
        while self._stale and self.num_bytes + num_bytes > self._budget:
            name = next(iter(self._stale))
            del self._stale[name]
            logger.info("Deleting the pages of a layout that nobody uses: %s", self.root / name)
            await self.write_thread(partial(_delete_folder, self.root / name))

    def switch_off(self, error: OSError) -> None:
        """Nothing more is written, which is said once."""
        self.counters.disk_errors_total += 1
        if self.writable:
            self.writable = False
            logger.warning(
                "The disk tier %s cannot be written to (%s): what is there is read, nothing is added", self.root, error
            )

    async def write_thread(self, work: Callable[[], T]) -> T:
        """Runs `work` after everything that was to be written before it."""
        return await asyncio.get_running_loop().run_in_executor(self._writer, work)

    async def read_thread(self, work: Callable[[], T]) -> T:
        """Runs `work`, which reads, beside all else."""
        return await asyncio.get_running_loop().run_in_executor(self._readers, work)

    def delete_later(self, paths: Sequence[Path]) -> None:
        """Deletes files after everything that was to be written before."""
        if paths:
            self._writer.submit(_delete, paths)

    async def close(self) -> None:
        """Waits for what is being written, unless that hangs. Files stay."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self.write_thread(_nothing), CLOSE_PATIENCE_S)
        for threads in (self._writer, self._readers):
            threads.shutdown(wait=False, cancel_futures=True)
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def _survey(self) -> dict[str, int]:
        """Takes the folder for this host, and finds what is in it. Raises BlockingIOError if another host has it."""
        self.root.mkdir(mode=0o700, parents=True, exist_ok=True)
        if os.access(self.root, os.W_OK):
            flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
            self._lock = os.open(self.root / _LOCK_NAME, flags, 0o600)
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        else:
            self.switch_off(PermissionError("it is read-only"))
        folders = [path for path in self.root.iterdir() if _LAYOUT_FOLDER.fullmatch(path.name) and path.is_dir()]
        folders.sort(key=lambda path: path.stat().st_mtime)
        return {
            path.name: sum(round_up(entry.stat().st_size) for entry in os.scandir(path) if entry.is_file())
            for path in folders
        }


class LayoutDisk:
    """The pages of one layout on disk. `cluster.kv.store.Disk` to its store; only the event loop calls it."""

    def __init__(self, tier: DiskTier, layout: bytes, page_bytes: int, num_pages: int) -> None:
        self.file_bytes = file_bytes(page_bytes)
        self.table = SlotTable(num_pages)
        """Each slot is the right to one file."""
        self.readable = True
        """See `Disk.readable`."""
        self._tier = tier
        self._layout = layout
        self._page_bytes = page_bytes
        self._folder = tier.root / layout.hex()
        self._tags = new_table(num_pages)
        self._shown = self._tags
        """What clients see: the tags themselves, or nothing while the disk rests."""
        self._hanging: set[asyncio.Future[Any]] = set()
        self._waking: asyncio.TimerHandle | None = None
        self._tickets = 0

    @property
    def num_bytes(self) -> int:
        return self.table.num_pages * self.file_bytes

    @property
    def writable(self) -> bool:
        return self._tier.writable

    @property
    def capacity(self) -> int:
        return self.table.num_slots

    def __contains__(self, key: bytes) -> bool:
        return self.table.get(key) is not None

    def has_followers(self, key: bytes) -> bool:
        return self.table.has_followers(key)

    def show_tags(self, tags: Tags) -> None:
        """Keeps the tags of its pages in this table for `num_pages` from now on."""
        tags[:] = self._tags
        self._tags = self._shown = tags

    async def recover(self) -> None:
        """Finds the pages that are there from before; files that are not whole are deleted."""
        headers = await self._tier.write_thread(self._scan)
        for header in headers:
            slots, gone = self.table.grant(_WRITER, 1)
            self._delete(gone)
            if self.table.commit(_WRITER, slots[0], header.key, header.parent, header.crc) is not None:
                show(self._tags, header.key)
        if headers:
            logger.info("Found %d pages in %s", self.table.num_pages, self._folder)

    async def write(self, pages: Sequence[tuple[Page, NDArray[np.uint8]]]) -> None:
        """See `Disk.write`."""
        new = [(page, view) for page, view in pages if page.key not in self]
        if not new or not self.writable:
            return
        slots, gone = self.table.grant(_WRITER, len(new))
        self._delete(gone)
        await self._tier.make_room(len(slots) * self.file_bytes)
        headers = [PageHeader(self._layout, page.key, page.parent, self._page_bytes, page.crc) for page, _ in new]
        views = [view for _, view in new]
        written = await self._tier.write_thread(lambda: self._write(headers[: len(slots)], views))
        for slot, header, error in zip(slots, headers, written, strict=False):
            if error is not None:
                self.table.give_back(_WRITER, slot)
            elif self.table.commit(_WRITER, slot, header.key, header.parent, header.crc) is not None:
                show(self._tags, header.key)
        if written and written[-1] is not None:
            self._tier.switch_off(written[-1])

    async def read(self, keys: Sequence[bytes], views: Sequence[NDArray[np.uint8]]) -> list[tuple[bytes, int] | None]:
        """See `Disk.read`. A page that is not whole is deleted and counted."""
        self._tickets += 1
        ticket = self._tickets
        for key in keys:
            self.table.pin(_READER, ticket, key)
        outcomes = await self._tier.read_thread(partial(self._read, keys, views))
        for key, outcome in zip(keys, outcomes, strict=True):
            if isinstance(outcome, PageHeader):
                continue
            logger.warning("A page on disk cannot be read: %s", outcome)
            page = self.table.discard(key)
            if page is not None:
                self._delete([page])
            if isinstance(outcome, PageFileError):
                self._tier.counters.corrupt_total += 1
            else:
                self._tier.counters.disk_errors_total += 1
        self.table.release(_READER, ticket)
        return [(each.parent, each.crc) if isinstance(each, PageHeader) else None for each in outcomes]

    def rest(self, until: "asyncio.Future[Any]") -> None:
        """See `Disk.rest`."""
        if self.readable:
            logger.warning(
                "A read hangs: nothing is read from %s until %.0f s after it has come to its end", self._folder, REST_S
            )
            self._tier.counters.disk_errors_total += 1
            self._tags = self._shown.copy()
            self._shown.fill(0)
            self.readable = False
        if self._waking is not None:
            self._waking.cancel()
        self._hanging.add(until)
        until.add_done_callback(self._has_ended)

    async def close(self) -> None:
        """Files stay."""
        self._hanging.clear()
        if self._waking is not None:
            self._waking.cancel()
        self._tags = self._shown = new_table(self.table.num_slots)
        self._tier.closed(self._folder.name, self.num_bytes)

    def _has_ended(self, read: "asyncio.Future[Any]") -> None:
        """A read that hung has come to its end, if not after the end of this."""
        if self._hanging == {read}:
            self._waking = read.get_loop().call_later(REST_S, self._wake)
        self._hanging.discard(read)

    def _wake(self) -> None:
        logger.info("Pages are read from %s again", self._folder)
        self._shown[:] = self._tags
        self._tags = self._shown
        self.readable = True

    def _delete(self, pages: Iterable[Page]) -> None:
        paths = []
        for page in pages:
            hide(self._tags, page.key)
            paths.append(self._folder / file_name(page.key))
        self._tier.delete_later(paths)

    def _write(self, headers: Sequence[PageHeader], views: Sequence[NDArray[np.uint8]]) -> list[OSError | None]:
        """In the writer's thread. After the first failure nothing more is tried."""
        outcomes: list[OSError | None] = []
        for header, view in zip(headers, views, strict=False):
            if outcomes and outcomes[-1] is not None:
                outcomes.append(outcomes[-1])
                continue
            try:
                self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
                write_page(self._folder, header, view, self._tier.opener)
                outcomes.append(None)
            except OSError as error:
                outcomes.append(error)
        return outcomes

    def _read(self, keys: Sequence[bytes], views: Sequence[NDArray[np.uint8]]) -> list[PageHeader | Exception]:
        outcomes: list[PageHeader | Exception] = []
        for key, view in zip(keys, views, strict=True):
            try:
                outcomes.append(read_page(self._folder, self._layout, key, view))
            except (OSError, PageFileError) as error:
                outcomes.append(error)
        return outcomes

    def _scan(self) -> list[PageHeader]:
        """The pages in the folder, those written longest ago first. In the writer's thread."""
        try:
            entries = [(entry.stat().st_mtime, Path(entry.path)) for entry in os.scandir(self._folder)]
        except OSError:
            return []
        headers = []
        for _, path in sorted(entries):
            if path.suffix == UNFINISHED:
                _delete([path])
            if path.suffix != SUFFIX:
                continue
            try:
                headers.append(read_header(path, self._layout, self._page_bytes))
            except PageFileError as error:
                logger.warning("Deleting what is no page: %s", error)
                self._tier.counters.corrupt_total += 1
                _delete([path])
            except OSError as error:
                logger.warning("A page on disk cannot be read: %s", error)
                self._tier.counters.disk_errors_total += 1
        return headers


def _nothing() -> None:
    pass


def _delete(paths: Iterable[Path]) -> None:
    for path in paths:
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            logger.debug("%s cannot be deleted: %s", path, error)


def _delete_folder(folder: Path) -> None:
    """Deletes the files of pages in a folder, and the folder if nothing else is in it."""
    try:
        _delete(path for path in list(folder.iterdir()) if path.suffix in (SUFFIX, UNFINISHED))
        folder.rmdir()
    except OSError as error:
        logger.warning("%s cannot be deleted: %s", folder, error)
