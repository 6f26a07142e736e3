"""Pages that do not fit in memory: on disk and back, and from one node to another, as a client sees it."""

import asyncio
import errno
import time
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import replace
from pathlib import Path

import pytest

from cluster.kv.disk import LayoutDisk
from cluster.kv.host_config import HostConfig
from cluster.kv.peers import PageCopy
from cluster.kv.segment import segment_bytes
from cluster.kv.server import KVServer
from cluster.kv.wire import ELSEWHERE, ON_DISK, Fetch, Ready
from tests.cluster.kv.talk import LAYOUT, PAGE_BYTES, Client, chain, connected, content_of, key_of

pytestmark = pytest.mark.anyio


class Host:
    """A host with few slots and a disk, started and stopped as a test wants."""

    def __init__(self, place: Path, slots: int = 16, disk: bool = True, peers=None) -> None:
        memory = segment_bytes(slots, PAGE_BYTES, 400) + 8192
        self.disk = place / "disk"
        config = HostConfig(memory, self.disk if disk else None, 400 * 12288, place / "shm")
        self.server = KVServer(place / "host", config, peers)

    async def __aenter__(self) -> KVServer:
        await self.server.start()
        return self.server

    async def __aexit__(self, *exception: object) -> None:
        await self.server.close()


MANY = [chain(name, 5) for name in "abcdefgh"]


async def put(server: KVServer, client: Client, *names: str) -> None:
    """Writes pages no faster than the disk takes those that have to go."""
    for name in names:
        await client.put(name)
        await settled(server)


async def settled(server: KVServer) -> None:
    """Waits until nothing more moves between the tiers."""
    same, before = 0, server.stats()
    while same < 3:
        await asyncio.sleep(0.01)
        same, before = same + 1 if server.stats() == before else 0, server.stats()


async def test_what_memory_has_no_room_for_comes_back_from_disk(place: Path) -> None:
    async with Host(place) as server, connected(server.socket) as client:
        for names in MANY:
            await put(server, client, *names)
        stats = server.stats()
        assert stats.evictions_total == 0 and stats.demotions_total >= 40 - 16 and stats.disk_pages >= 24
        for names in MANY:
            found = await client.find(*names)
            assert len(found.slots) == 5, "nothing is lost"
            slots, crcs = await client.fetch(found, 5)
            client.check(slots, crcs, *names)
            await client.release(found.ticket)
        assert server.stats().promotions_total > 0
        assert all(client.segment.may_have(key_of(name)) for names in MANY for name in names)


async def test_nothing_is_lost_to_a_client_that_is_faster_than_the_disk(place: Path) -> None:
    async with Host(place) as server, connected(server.socket) as client:
        for names in MANY:
            await client.put(*names)
        assert server.stats().evictions_total == 0
        for names in MANY:
            assert len((await client.find(*names)).slots) == 5


async def test_a_disk_that_hangs_holds_nobody_up(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cluster.kv.store.DISK_PATIENCE_S", 0.05)
    hanging = asyncio.Event()

    async def hang(disk: LayoutDisk, pages: object) -> None:
        await hanging.wait()

    monkeypatch.setattr(LayoutDisk, "write", hang)
    async with Host(place) as server, connected(server.socket) as client:
        for names in MANY:
            await client.put(*names)
        assert server.stats().evictions_total > 0
        hanging.set()


async def test_a_disk_that_fails_holds_nobody_up(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("cluster.kv.disk.write_page", fail)
    async with Host(place) as server, connected(server.socket) as client:
        for names in MANY:
            await client.put(*names)
        found = await client.find(*MANY[-1])
        client.check(found.slots, found.crcs, *MANY[-1])
        assert server.stats().disk_errors_total == 1


async def test_a_run_is_found_across_memory_and_disk(place: Path) -> None:
    async with Host(place) as server, connected(server.socket) as client:
        for names in MANY:
            await put(server, client, *names)
        runs = [(await client.find(*names)).slots for names in MANY]
        assert runs[0] == [ON_DISK] * 5 and all(slot >= 0 for slot in runs[-1])
        for run in runs:
            on_disk = [slot == ON_DISK for slot in run]
            assert len(run) == 5 and on_disk == sorted(on_disk), "a page went before one that follows it"


async def test_only_as_many_pages_as_asked_for_are_brought(place: Path) -> None:
    async with Host(place) as server, connected(server.socket) as client:
        for names in MANY:
            await put(server, client, *names)
        found = await client.find(*MANY[0])
        assert len((await client.fetch(found, 2))[0]) == 2
        assert server.stats().promotions_total == 2


async def found_after_a_restart(place: Path, *chains: list[str]) -> list[int]:
    """How many pages of each chain another host finds on disk; asserts that they are right."""
    counts = []
    async with Host(place) as server, connected(server.socket) as client:
        for names in chains:
            found = await client.find(*names)
            slots, crcs = await client.fetch(found, len(found.slots)) if found.slots else ([], [])
            client.check(slots, crcs, *names[: len(found.slots)])
            await client.release(found.ticket)
            counts.append(len(slots))
    return counts


async def test_what_was_in_memory_and_on_disk_is_found_after_a_restart(place: Path) -> None:
    async with Host(place) as server, connected(server.socket) as client:
        for names in MANY:
            await put(server, client, *names)
        assert server.stats().disk_pages < 40, "some are in memory alone"
    assert await found_after_a_restart(place, *MANY) == [5] * len(MANY)


async def test_without_time_to_write_all_ends_on_disk_are_given_their_beginnings(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The sequence of which only the end is on disk was used longest ago: by age, others would come first."""
    monkeypatch.setattr("cluster.kv.store.PIECE_BYTES", PAGE_BYTES)
    old, new = chain("old", 4), [chain(f"new {number}", 2) for number in range(6)]
    async with Host(place) as server, connected(server.socket) as client:
        await put(server, client, *old)
        while server.stats().disk_pages == 0:
            await put(server, client, *new[0])
            new = [*new[1:], new[0]]
        beginning = [name for name in old if (await client.find(name)).slots[0] != ON_DISK]
        assert 0 < len(beginning) < len(old)
        written: list[bytes] = []
        write = LayoutDisk.write

        async def write_some(disk: LayoutDisk, pages: Sequence) -> None:
            written.extend(page.key for page, _ in pages)
            await write(disk, pages)

        monkeypatch.setattr(LayoutDisk, "write", write_some)
    assert written[: len(beginning)] == [key_of(name) for name in beginning]
    assert await found_after_a_restart(place, old) == [4]


async def test_a_disk_that_is_slow_is_not_waited_for_at_the_end(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cluster.kv.store.PIECE_BYTES", PAGE_BYTES)
    write = LayoutDisk.write

    async def write_slowly(disk: LayoutDisk, pages: Sequence) -> None:
        await asyncio.sleep(0.4)
        await write(disk, pages)

    host = Host(place, slots=40)
    async with host as server, connected(server.socket) as client:
        await client.put(*chain("a", 20))
        monkeypatch.setattr(LayoutDisk, "write", write_slowly)
        begin = time.monotonic()
    assert time.monotonic() - begin < 3.0, "8 s for all of them"
    monkeypatch.setattr(LayoutDisk, "write", write)
    (count,) = await found_after_a_restart(place, chain("a", 20))
    assert 0 < count < 20


async def test_memory_does_not_survive_a_host_that_is_killed(place: Path) -> None:
    """Nothing is written then, and what is found is whole all the same."""
    async with Host(place) as server, connected(server.socket) as client:
        for names in MANY:
            await put(server, client, *names)
        kept = [names for names in MANY if (await client.find(*names)).slots == [ON_DISK] * 5]
        files = {path: path.read_bytes() for path in (place / "disk").glob("*/*.page")}
    for path in (place / "disk").glob("*/*.page"):
        if path not in files:
            path.unlink()
    assert kept
    assert await found_after_a_restart(place, *kept, MANY[-1]) == [5] * len(kept) + [0]


async def test_a_page_that_is_damaged_on_disk_is_never_handed_out(place: Path) -> None:
    host = Host(place)
    async with host as server, connected(server.socket) as client:
        for names in MANY:
            await put(server, client, *names)
        path = host.disk / LAYOUT.hex() / f"{key_of('a++').hex()}.page"
        damaged = bytearray(path.read_bytes())
        damaged[-100] ^= 8
        path.write_bytes(damaged)
        found = await client.find(*MANY[0])
        slots, crcs = await client.fetch(found, 5)
        client.check(slots, crcs, "a", "a+")
        await client.release(found.ticket)
        assert server.stats().corrupt_total == 1
        assert len((await client.find(*MANY[0])).slots) == 2


async def test_a_fetch_that_is_released_half_way_leaves_no_pin(place: Path) -> None:
    async with Host(place, slots=8) as server, connected(server.socket) as client:
        for names in MANY:
            await put(server, client, *names)
        for names in MANY * 5:
            found = await client.find(*names)
            client.say(Fetch(found.ticket, 5))
            await client.release(found.ticket)
        await settled(server)
        await client.put(*chain("new", 5))
        found = await client.find(*chain("new", 5))
        slots, crcs = await client.fetch(found, 5)
        client.check(slots, crcs, *chain("new", 5))


async def test_more_than_memory_holds_cannot_be_had_at_once(place: Path) -> None:
    """An answer all the same: the client goes on with what there is."""
    names = chain("long", 30)
    async with Host(place, slots=12) as server, connected(server.socket) as client:
        await put(server, client, *names)
        found = await client.find(*names)
        assert len(found.slots) == 30
        slots, crcs = await client.fetch(found, 30)
        assert 0 < len(slots) < 12
        client.check(slots, crcs, *names[: len(slots)])


async def test_a_disk_that_cannot_be_used_is_said_and_memory_serves(
    place: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (place / "disk").touch()
    async with Host(place) as server, connected(server.socket) as client:
        assert caplog.text.count("cannot be written to") == 1
        for names in MANY:
            await client.put(*names)
        found = await client.find(*MANY[-1])
        client.check(found.slots, found.crcs, *MANY[-1])
        assert server.stats().evictions_total > 0 == server.stats().demotions_total


class Network:
    """Hosts by name, reached directly."""

    def __init__(self) -> None:
        self.servers: dict[str, KVServer] = {}
        self.damage = False
        self.asked = 0

    async def have(self, layout: bytes, keys: Sequence[bytes]) -> tuple[str, int]:
        self.asked += 1
        counts = {name: server.have(layout, keys) for name, server in self.servers.items()}
        best = max(counts, key=lambda name: counts[name], default="")
        return best, counts.get(best, 0)

    async def pages(self, host: str, layout: bytes, keys: Sequence[bytes]) -> list[PageCopy]:
        copies = await self.servers[host].pages(layout, keys)
        return [replace(copy, content=bytes(len(copy.content))) for copy in copies] if self.damage else copies


class TestOtherNodes:
    @pytest.fixture
    async def two(self, place: Path):
        """A host that has MANY[0], and another one that does not, but may ask it."""
        network = Network()
        async with AsyncExitStack() as stack:
            for name in ("far", "near"):
                (place / name).mkdir()
                (place / name / "shm").symlink_to((place / "shm").resolve())
                host = Host(place / name, slots=40, disk=False, peers=network if name == "near" else None)
                server = await stack.enter_async_context(host)
                if name == "far":
                    network.servers[name] = server
            async with connected(network.servers["far"].socket) as client:
                await client.put(*MANY[0])
            near = await stack.enter_async_context(connected(server.socket))
            yield network, server, near

    async def test_pages_come_from_there_once(self, two) -> None:
        network, server, client = two
        found = await client.find(*MANY[0], "unknown")
        assert found.slots == [ELSEWHERE] * 5
        slots, crcs = await client.fetch(found, 5)
        client.check(slots, crcs, *MANY[0])
        await client.release(found.ticket)
        assert (server.stats().received_total, network.servers["far"].stats().served_total) == (5, 5)
        found = await client.find(*MANY[0])
        client.check(found.slots, found.crcs, *MANY[0])
        assert server.stats().received_total == 5

    async def test_they_continue_a_run_that_begins_here(self, two) -> None:
        network, _, client = two
        await client.put(*MANY[0][:2])
        asked = network.asked
        found = await client.find(*MANY[0])
        assert [slot >= 0 for slot in found.slots] == [True, True, False, False, False]
        client.check(*(await client.fetch(found, 5)), *MANY[0])
        assert network.asked == asked + 1

    async def test_damage_on_the_way_is_noticed(self, two) -> None:
        network, server, client = two
        network.damage = True
        found = await client.find(*MANY[0])
        assert await client.fetch(found, 5) == ([], [])
        assert server.stats().corrupt_total == 5 and server.stats().memory_pages == 0

    async def test_a_host_that_has_lost_them_meanwhile_is_no_error(self, two) -> None:
        network, _, client = two
        found = await client.find(*MANY[0])
        network.servers["far"]._stores.clear()
        client.say(Fetch(found.ticket, 5))
        assert await client.hear(Ready) == Ready(found.ticket, 0, [], [])


def test_pages_differ() -> None:
    assert (content_of("a") != content_of("a+")).any()
