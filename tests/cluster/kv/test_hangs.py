"""Disks and peers that hang: who waits for them is told so within seconds, nobody else notices, and the end comes."""

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from cluster.kv.client import ANSWER_TIMEOUT_S
from cluster.kv.disk import DiskTier, LayoutDisk
from cluster.kv.page_file import read_page, write_page
from cluster.kv.peers import PageCopy
from cluster.kv.server import KVServer
from cluster.kv.store import DISK_PATIENCE_S, READ_PATIENCE_S
from cluster.kv.wire import ELSEWHERE, ON_DISK, Fetch
from cluster.kv_host import HAVE_TIMEOUT_S, PAGES_TIMEOUT_S
from tests.cluster.kv.talk import LAYOUT, chain, connected, key_of
from tests.cluster.kv.test_tiers import MANY, Host, Network, put

pytestmark = pytest.mark.anyio
LONGEST_S = 60.0


class Hang:
    """Calls that do not return before it is over."""

    def __init__(self) -> None:
        self._over = threading.Event()
        self._running = 0

    def wrap(self, call: Callable) -> Callable:
        def hang(*arguments):
            self._running += 1
            try:
                self._over.wait(LONGEST_S)
                return call(*arguments)
            finally:
                self._running -= 1

        return hang

    def end(self) -> None:
        self._over.set()

    def close(self) -> None:
        """Ends it, and waits for those that nobody else waits for: they write where the test's folder is."""
        self.end()
        idle = 0
        while idle < 10:
            time.sleep(0.01)
            idle = 0 if self._running else idle + 1


@pytest.fixture
def hang() -> Iterator[Hang]:
    made = Hang()
    yield made
    made.close()


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.01)


def test_who_waits_is_told_before_it_gives_up() -> None:
    assert DISK_PATIENCE_S + READ_PATIENCE_S < ANSWER_TIMEOUT_S
    assert HAVE_TIMEOUT_S < ANSWER_TIMEOUT_S
    assert DISK_PATIENCE_S + PAGES_TIMEOUT_S < ANSWER_TIMEOUT_S


async def test_reads_that_hang_are_told_of_once_and_are_not_tried_again_until_they_are_over(
    place: Path, hang: Hang, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cluster.kv.store.READ_PATIENCE_S", 0.2)
    monkeypatch.setattr("cluster.kv.disk.REST_S", 0.2)
    async with (
        Host(place, slots=40) as server,
        connected(server.socket) as one,
        connected(server.socket) as two,
    ):
        for names in MANY:
            await put(server, one, *names)
        monkeypatch.setattr("cluster.kv.disk.read_page", hang.wrap(read_page))
        found = [await one.find(*MANY[0]), await two.find(*MANY[1])]
        assert [each.slots for each in found] == [[ON_DISK] * 5] * 2
        assert await asyncio.gather(one.fetch(found[0], 5), two.fetch(found[1], 5)) == [([], [])] * 2
        await one.release(found[0].ticket)
        await two.release(found[1].ticket)
        assert server.stats().disk_errors_total == 1

        for names in MANY[:2]:
            assert not one.segment.may_have(key_of(names[0]))
            assert (await one.find(*names)).slots == []
            assert server.have(LAYOUT, [key_of(name) for name in names]) == 0, "another host would wait for it too"
        recent = await two.find(*MANY[-1])
        two.check(recent.slots, recent.crcs, *MANY[-1])
        await two.put("new")

        hang.end()
        await until(lambda: all(one.segment.may_have(key_of(name)) for names in MANY[:2] for name in names))
        for names in MANY[:2]:
            again = await one.find(*names)
            one.check(*(await one.fetch(again, 5)), *names)
            await one.release(again.ticket)


async def test_what_follows_a_page_that_cannot_be_read_now_is_kept(
    place: Path, hang: Hang, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cluster.kv.store.READ_PATIENCE_S", 0.1)
    monkeypatch.setattr("cluster.kv.disk.REST_S", 0.1)
    async with Host(place, slots=40) as server, connected(server.socket) as client:
        for names in MANY:
            await put(server, client, *names)
        monkeypatch.setattr("cluster.kv.disk.read_page", hang.wrap(read_page))
        found = await client.find(*MANY[0])
        assert await client.fetch(found, 5) == ([], [])
        await client.release(found.ticket)
        next_ = MANY[0][-1] + "+"
        await client.put(next_)
        hang.end()
        await until(lambda: client.segment.may_have(key_of(MANY[0][0])))
        assert len((await client.find(*MANY[0], next_)).slots) == 6


async def test_a_write_that_hangs_keeps_nobody_from_what_is_on_disk(
    place: Path, hang: Hang, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cluster.kv.store.DISK_PATIENCE_S", 0.05)
    async with Host(place) as server, connected(server.socket) as client:
        for names in MANY:
            await put(server, client, *names)
        monkeypatch.setattr("cluster.kv.disk.write_page", hang.wrap(write_page))
        await client.put(*chain("more", 8))
        found = await client.find(*MANY[0])
        client.check(*(await client.fetch(found, 5)), *MANY[0])
        hang.end()


async def test_the_end_comes_whatever_hangs(place: Path, hang: Hang, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cluster.kv.store.DISK_PATIENCE_S", 0.05)
    server = Host(place).server
    await server.start()
    async with connected(server.socket) as client:
        for names in MANY:
            await put(server, client, *names)
        monkeypatch.setattr("cluster.kv.disk.read_page", hang.wrap(read_page))
        monkeypatch.setattr("cluster.kv.disk.write_page", hang.wrap(write_page))
        await client.put(*chain("more", 8))
        client.say(Fetch((await client.find(*MANY[0])).ticket, 5))
        await client.find("unknown")
        async with asyncio.timeout(10):
            await server.close()
    assert not list((place / "shm").iterdir()), "its memory is given back"
    assert not server.socket.exists()
    async with Host(place) as server, connected(server.socket) as client:
        await client.put("a")
        assert len((await client.find(*MANY[0])).slots) == 5


@pytest.mark.parametrize("call", [DiskTier._survey, LayoutDisk._scan])
async def test_a_disk_that_hangs_from_the_start_is_done_without(
    place: Path, hang: Hang, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, call: Callable
) -> None:
    monkeypatch.setattr("cluster.kv.disk.SURVEY_PATIENCE_S", 0.1)
    owner = DiskTier if call is DiskTier._survey else LayoutDisk
    monkeypatch.setattr(owner, call.__name__, hang.wrap(call))
    async with Host(place) as server, connected(server.socket) as client:
        await client.put(*MANY[0])
        found = await client.find(*MANY[0])
        client.check(found.slots, found.crcs, *MANY[0])
        assert caplog.text.count("The disk tier is off") == 1


class Stuck(Network):
    """Pages of one sequence do not come before `over` is set."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.over = asyncio.Event()
        self._first = key_of(name)

    async def pages(self, host: str, layout: bytes, keys: Sequence[bytes]) -> list[PageCopy]:
        if keys[0] == self._first:
            await self.over.wait()
        return await super().pages(host, layout, keys)


@asynccontextmanager
async def far_and_near(place: Path, network: Network) -> AsyncIterator[tuple[KVServer, KVServer]]:
    """A host that has MANY[0] and MANY[1], and another that may ask it."""
    for name in ("far", "near"):
        (place / name).mkdir()
        (place / name / "shm").symlink_to((place / "shm").resolve())
    async with (
        Host(place / "far", slots=40, disk=False) as far,
        Host(place / "near", slots=40, peers=network) as near,
        connected(far.socket) as writer,
    ):
        network.servers["far"] = far
        await writer.put(*MANY[0])
        await writer.put(*MANY[1])
        yield far, near


async def test_a_peer_that_hangs_keeps_nobody_from_other_pages(place: Path) -> None:
    network = Stuck(MANY[0][0])
    async with (
        far_and_near(place, network) as (_, near),
        connected(near.socket) as one,
        connected(near.socket) as two,
    ):
        for names in MANY[2:]:
            await put(near, two, *names)
        stuck = await one.find(*MANY[0])
        assert stuck.slots == [ELSEWHERE] * 5
        waiting = asyncio.create_task(one.fetch(stuck, 5))
        for names, place_ in ((MANY[1], ELSEWHERE), (MANY[2], ON_DISK)):
            found = await two.find(*names)
            assert found.slots == [place_] * 5
            two.check(*(await two.fetch(found, 5)), *names)
            await two.release(found.ticket)
        assert not waiting.done()
        network.over.set()
        one.check(*(await waiting), *MANY[0])


async def test_pages_that_several_wait_for_come_from_a_peer_once(place: Path) -> None:
    network = Stuck(MANY[0][0])
    async with (
        far_and_near(place, network) as (far, near),
        connected(near.socket) as one,
        connected(near.socket) as two,
    ):
        clients = (one, two)
        waiting = [asyncio.create_task(client.fetch(await client.find(*MANY[0]), 5)) for client in clients]
        await asyncio.sleep(0.2)
        network.over.set()
        for client, fetched in zip(clients, waiting, strict=True):
            client.check(*(await fetched), *MANY[0])
        assert far.stats().served_total == 5
