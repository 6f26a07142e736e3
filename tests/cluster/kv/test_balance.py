"""The real store over a real disk under random use and failure: everything balances, and no page is another one."""

import asyncio
import errno
import shutil
import tempfile
from collections.abc import Coroutine
from pathlib import Path
from typing import Any, BinaryIO, ClassVar, TypeVar

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
from cluster.kv.store import Store
from cluster.kv.tags import Tags, is_shown
from cluster.kv.wire import Entry
from tests.cluster.kv.talk import LAYOUT, content_of, key_of

T = TypeVar("T")
PAGE_BYTES = 100
SLOTS = 8
FILES = 10
NAMES = [name + "+" * depth for name in "abc" for depth in range(6)]
CLIENTS = ["one", "two"]
names = st.sampled_from(NAMES)


def beginning(name: str) -> list[str]:
    """The pages of a sequence up to this one."""
    return [name[: 1 + depth] for depth in range(len(name))]


class Use(RuleBasedStateMachine):
    """Clients that save, find, load and vanish; a disk that fails and is damaged; a host that is started again."""

    keys: ClassVar[dict[bytes, str]] = {key_of(name): name for name in NAMES}

    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.new_event_loop()
        self.folder = Path(tempfile.mkdtemp(prefix="manta-balance-"))
        self.counters = HostCounters()
        self.is_full = False
        self.tickets = 0
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

    @rule(client=st.sampled_from(CLIENTS), name=names)
    def save(self, client: str, name: str) -> None:
        """A page comes, whether or not the one before it is here."""

        async def save() -> list[bytes] | None:
            slots = await self.store.grant(client, 1)
            if not slots:
                return None
            self.segment.slot(slots[0])[:] = content_of(name, PAGE_BYTES)
            parent = key_of(name[:-1]) if len(name) > 1 else b""
            crc = crc32c(content_of(name, PAGE_BYTES))
            return self.store.commit(client, [Entry(slots[0], key_of(name), parent, crc)])

        dropped = self.run(save())
        assert dropped in (None, [], [key_of(name)])
        assert not dropped or len(name) > 1, "a first page needs none before it"

    @rule(client=st.sampled_from(CLIENTS), count=st.integers(1, 3))
    def be_granted(self, client: str, count: int) -> None:
        self.run(self.store.grant(client, count))

    @rule(client=st.sampled_from(CLIENTS), name=names, loads=st.booleans())
    def find(self, client: str, name: str, loads: bool) -> None:
        """Finds a run, and brings it into memory; what is pinned then is what it should be, until it is released."""
        self.tickets += 1
        ticket, run = self.tickets, beginning(name)
        pages = self.store.find(client, ticket, [key_of(each) for each in run])
        there = [each for each, page in zip(run, pages, strict=False) if page is not None]
        if loads and len(there) < len(pages):
            table = self.store.table
            missing = [key_of(each) for each in run[: len(pages)] if each not in there]
            came: list[str] = []

            def pin(key: bytes) -> None:
                if self.keys[key] not in came and table.pin(client, ticket, key) is not None:
                    came.append(self.keys[key])

            self.run(self.store.load(missing, "", pin))
            there += came
        self.pinned[client, ticket] = there

    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        if self.pinned:
            client, ticket = data.draw(st.sampled_from(sorted(self.pinned)))
            del self.pinned[client, ticket]

            async def release() -> None:
                self.store.release(client, ticket)

            self.run(release())

    @rule(client=st.sampled_from(CLIENTS))
    def vanish(self, client: str) -> None:
        self.store.table.end(client)
        self.pinned = {place: run for place, run in self.pinned.items() if place[0] != client}

    @rule(name=names)
    def find_damage(self, name: str) -> None:
        """A client says that the CRC was wrong."""
        self.store.discard([key_of(name)])
        assert self.store.table.get(key_of(name)) is None

    @rule(name=names, how=st.sampled_from(["flip", "truncate", "remove"]))
    def damage(self, name: str, how: str) -> None:
        path = self.folder / "disk" / LAYOUT.hex() / file_name(key_of(name))
        if not path.exists():
            return
        content = bytearray(path.read_bytes())
        content[-7] ^= 1
        match how:
            case "flip":
                path.write_bytes(content)
            case "truncate":
                path.write_bytes(content[:-1])
            case "remove":
                path.unlink()

    @rule(is_full=st.booleans())
    def fill_disk(self, is_full: bool) -> None:
        self.is_full = is_full

    @rule()
    def start_again(self) -> None:
        async def close() -> None:
            await self.store.close()
            await self.tier.close()

        self.loop.run_until_complete(close())
        self.pinned.clear()
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
        assert self.tier.num_bytes == self.disk.table.num_pages * file_bytes(PAGE_BYTES) <= FILES * file_bytes(PAGE_BYTES)

    def teardown(self) -> None:
        if hasattr(self, "store"):
            self.start_again()
            self.loop.run_until_complete(self.store.close())
            self.loop.run_until_complete(self.tier.close())
        self.loop.close()
        shutil.rmtree(self.folder)


TestUse = Use.TestCase
TestUse.settings = settings(max_examples=40, stateful_step_count=40, deadline=None)
