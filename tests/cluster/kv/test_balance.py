"""The real store over a real disk under random use and failure: everything balances, and no page is another one."""

import asyncio
import errno
import shutil
import tempfile
from collections.abc import Coroutine
from pathlib import Path
from typing import Any, BinaryIO, ClassVar, TypeVar
from unittest.mock import patch

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from cluster.kv.checksum import crc32c
from cluster.kv.disk import DiskTier, LayoutDisk, file_bytes
from cluster.kv.page_file import file_name, open_new
from cluster.kv.peers import NoPeers
from cluster.kv.segment import Segment
from cluster.kv.slots import SlotTable
from cluster.kv.stats import HostCounters
from cluster.kv.store import HOST, Store
from cluster.kv.tags import Tags, is_shown
from cluster.kv.wire import Entry
from tests.cluster.kv.talk import LAYOUT, content_of, key_of

T = TypeVar("T")
PAGE_BYTES = 100
SLOTS = 8
FILES = 6
NAMES = [name + "+" * depth for name in "abcd" for depth in range(1, 6)]
CLIENTS = ["one", "two"]
names = st.sampled_from(NAMES)


def beginning(name: str) -> list[str]:
    """The pages of a sequence up to this one."""
    return [name[: 1 + depth] for depth in range(len(name))]


class Use(RuleBasedStateMachine):
    """Clients that save, find, load and vanish; a disk that fails and is damaged; a host that is started again."""

    keys: ClassVar[dict[bytes, str]] = {key_of(part): part for name in NAMES for part in beginning(name)}

    def __init__(self) -> None:
        super().__init__()
        # What is done in time must not depend on how busy the machine is: an example is to be the same twice.
        names = ("DISK_PATIENCE_S", "READ_PATIENCE_S", "CLOSE_PATIENCE_S", "LAST_WRITE_S")
        self.patience = patch.multiple("cluster.kv.store", **dict.fromkeys(names, 60.0))
        self.patience.start()
        self.loop = asyncio.new_event_loop()
        self.folder = Path(tempfile.mkdtemp(prefix="manta-balance-"))
        self.counters = HostCounters()
        self.is_full = False
        self.tickets = 0
        self.granted: dict[str, list[int]] = {client: [] for client in CLIENTS}
        self.pinned: dict[tuple[str, int], list[str]] = {}

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Ends it, and all that it has begun."""

        async def whole() -> T:
            result = await work
            while self.store._tasks:
                await asyncio.wait(self.store._tasks)
            await self.tier.write_thread(lambda: None)
            return result

        return self.loop.run_until_complete(whole())

    def open_file(self, path: Path) -> BinaryIO:
        if self.is_full:
            raise OSError(errno.ENOSPC, "No space left on device")
        return open_new(path)

    @initialize()
    def start(self) -> None:
        async def start() -> LayoutDisk | None:
            self.tier = DiskTier(self.folder / "disk", FILES * file_bytes(PAGE_BYTES), self.counters, self.open_file)
            await self.tier.start()
            return await self.tier.open(LAYOUT, PAGE_BYTES)

        disk = self.loop.run_until_complete(start())
        assert disk is not None
        self.disk = disk
        self.segment = Segment.create(self.folder / "segment", SLOTS, PAGE_BYTES, disk.table.num_slots)
        disk.show_tags(self.segment.disk_tags)
        self.store = Store(LAYOUT, self.segment, disk, NoPeers(), self.counters)

    @rule(client=st.sampled_from(CLIENTS), name=names, first=st.sampled_from([0, 0, 0, 1, 2]))
    def save(self, client: str, name: str, first: int) -> None:
        """Pages of a sequence come in order, whether or not those before them are here."""
        for each in beginning(name)[first:]:
            if not self.granted[client]:
                self.be_granted(client, 1)
            if not self.granted[client]:
                return
            slot = self.granted[client].pop()
            self.segment.slot(slot)[:] = content_of(each, PAGE_BYTES)
            parent = key_of(each[:-1]) if len(each) > 1 else b""
            entry = Entry(slot, key_of(each), parent, crc32c(content_of(each, PAGE_BYTES)))

            async def commit(entry: Entry = entry) -> list[bytes]:
                return self.store.commit(client, [entry])

            could_be_found = not parent or self.store.table.get(parent) is not None or parent in self.disk
            assert self.run(commit()) == ([] if could_be_found else [entry.key])

    @rule(client=st.sampled_from(CLIENTS), count=st.integers(1, 2))
    def be_granted(self, client: str, count: int) -> None:
        if len(self.granted[client]) + count <= self.store.credit:
            self.granted[client] += self.run(self.store.grant(client, count))

    @rule(client=st.sampled_from(CLIENTS), name=names, keeps=st.booleans())
    def load(self, client: str, name: str, keeps: bool) -> None:
        """Finds a run, and brings what is on disk of it into memory, piece by piece; what came stays pinned, or not."""
        self.tickets += 1
        ticket, run, table = self.tickets, beginning(name), self.store.table
        pages = self.store.find(client, ticket, [key_of(each) for each in run])
        run = run[: len(pages)]
        there = {each for each, page in zip(run, pages, strict=True) if page is not None}

        def pin(key: bytes) -> None:
            if self.keys[key] not in there and table.pin(client, ticket, key) is not None:
                there.add(self.keys[key])

        missing = [each for each in run if each not in there]
        while missing:
            self.run(self.store.load([key_of(each) for each in missing], "", pin))
            if missing[0] not in there:
                break
            missing = [each for each in missing if each not in there]
        self.pinned[client, ticket] = sorted(there)
        if not keeps:
            self.let_go(client, ticket)

    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        if self.pinned:
            self.let_go(*data.draw(st.sampled_from(sorted(self.pinned))))

    def let_go(self, client: str, ticket: int) -> None:
        async def release() -> None:
            self.store.release(client, ticket)

        del self.pinned[client, ticket]
        self.run(release())

    @rule(client=st.sampled_from(CLIENTS))
    def vanish(self, client: str) -> None:
        self.store.table.end(client)
        self.granted[client] = []
        self.pinned = {place: run for place, run in self.pinned.items() if place[0] != client}

    @rule(name=names)
    def find_damage(self, name: str) -> None:
        """A client says that the CRC was wrong."""
        self.store.discard([key_of(name)])
        assert self.store.table.get(key_of(name)) is None

    @rule(data=st.data(), how=st.sampled_from(["flip", "truncate", "remove"]), loads=st.booleans())
    def damage(self, data: st.DataObject, how: str, loads: bool) -> None:
        files = {file_name(key): name for key, name in self.keys.items()}
        paths = sorted((self.folder / "disk" / LAYOUT.hex()).glob("*"))
        if not paths:
            return
        path = data.draw(st.sampled_from(paths))
        content = bytearray(path.read_bytes())
        content[-7] ^= 1
        match how:
            case "flip":
                path.write_bytes(content)
            case "truncate":
                path.write_bytes(content[:-1])
            case "remove":
                path.unlink()
        if loads:
            self.load(CLIENTS[0], files[path.name], keeps=False)

    @rule(is_full=st.sampled_from([False, False, False, True]))
    def fill_disk(self, is_full: bool) -> None:
        """One write that fails is the last one, until the host is started again."""
        self.is_full = is_full

    @rule()
    def start_again(self) -> None:
        async def close() -> None:
            await self.store.close()
            await self.tier.close()

        self.loop.run_until_complete(close())
        self.pinned.clear()
        self.granted = {client: [] for client in CLIENTS}
        self.is_full = False
        self.start()

    @invariant()
    def everything_balances(self) -> None:
        if not hasattr(self, "store"):
            return
        memory, disk = self.store.table, self.disk.table
        for table in (memory, disk):
            table.check_integrity()
        assert memory.num_pages <= SLOTS and disk.num_pages <= FILES
        assert not disk._pins and not disk._granted, "nothing is under way"
        assert {client: memory.num_granted(client) for client in CLIENTS} == {
            client: len(slots) for client, slots in self.granted.items()
        }
        assert memory.num_granted(HOST) == 0
        for table, tags in ((memory, self.segment.tags), (disk, self.segment.disk_tags)):
            self.check_shown(table, tags)
        self.check_files()
        pins = {page.key: page.pins for page in memory.pages() if page.pins}
        held = [name for run in self.pinned.values() for name in run]
        assert all(count <= held.count(self.keys[key]) for key, count in pins.items())
        assert set(memory._pins) == {client for (client, _), run in self.pinned.items() if run}
        for page in memory.pages():
            assert np.array_equal(self.segment.slot(page.slot), content_of(self.keys[page.key], PAGE_BYTES))

    def check_shown(self, table: SlotTable, tags: Tags) -> None:
        there = {page.key for page in table.pages()}
        assert np.count_nonzero(tags) == len(there)
        assert all(is_shown(tags, key) for key in there)

    def check_files(self) -> None:
        """Files are those in the table, or fewer, as somebody removes some; bytes are within the budget."""
        files = {path.name for path in (self.folder / "disk").glob("*/*")}
        assert files <= {file_name(page.key) for page in self.disk.table.pages()}
        size = file_bytes(PAGE_BYTES)
        assert self.tier.num_bytes == self.disk.table.num_pages * size <= FILES * size

    def teardown(self) -> None:
        if hasattr(self, "store"):
            self.start_again()
            self.loop.run_until_complete(self.store.close())
            self.loop.run_until_complete(self.tier.close())
        self.patience.stop()
        self.loop.close()
        shutil.rmtree(self.folder)


TestUse = Use.TestCase
TestUse.settings = settings(max_examples=60, stateful_step_count=50)
