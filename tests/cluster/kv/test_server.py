"""The host over a real socket and real shared memory: what one client writes, another reads, whoever dies."""

import asyncio
import logging
import signal
import stat
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest

from cluster.kv.host_config import HostConfig
from cluster.kv.segment import Segment, round_up, segment_bytes
from cluster.kv.server import HostError, KVServer
from cluster.kv.wire import VERSION, Commit, Corrupt, Entry, Fetch, Find, Found, Grant, Hello, Refused, Release, Welcome
from tests.cluster.kv.talk import LAYOUT, PAGE_BYTES, Client, chain, connected, key_of

pytestmark = pytest.mark.anyio


def memory_for(slots: int, page_bytes: int = PAGE_BYTES) -> int:
    """The budget of which a store makes at least so many slots, and hardly more."""
    return segment_bytes(slots, page_bytes, 0) + 4096 + 8 * slots


@asynccontextmanager
async def running(place: Path, slots: int = 16) -> AsyncIterator[KVServer]:
    server = KVServer(place / "host", HostConfig(memory_for(slots), segments=place / "shm"))
    await server.start()
    try:
        yield server
    finally:
        await server.close()
        assert not list((place / "shm").iterdir()), "a segment was left behind"


async def test_what_one_client_writes_another_reads(place: Path) -> None:
    async with running(place) as server:
        names = chain("a", 5)
        async with connected(server.socket) as writer:
            await writer.put(*names)
        async with connected(server.socket) as reader:
            found = await reader.find(*names, "unknown", *chain("b", 2))
            reader.check(found.slots, found.crcs, *names)
            assert all(reader.segment.may_have(key_of(name)) for name in names)
            assert not reader.segment.may_have(key_of("unknown"))
            assert await reader.fetch(found, 5) == (found.slots, found.crcs)
        assert server.stats().memory_pages == 5
        assert server.stats().memory_bytes == 5 * PAGE_BYTES


async def test_a_page_in_the_middle_of_nowhere_is_not_found(place: Path) -> None:
    async with running(place) as server, connected(server.socket) as client:
        await client.put("a", "a++")
        assert (await client.find("a", "a+", "a++")).slots == [0]


async def test_the_socket_is_private(place: Path) -> None:
    async with running(place) as server:
        assert stat.S_IMODE(server.socket.parent.stat().st_mode) == 0o700
        assert stat.S_IMODE(server.socket.stat().st_mode) & 0o077 == 0


async def test_least_recently_used_leaves_make_room(place: Path) -> None:
    async with running(place, slots=16) as server, connected(server.socket) as client:
        await client.put(*chain("old", 4))
        await client.put(*chain("used", 4))
        found = await client.find(*chain("old", 2))
        await client.release(found.ticket)
        # Two to four slots are granted ahead, so as many pages have to go.
        await client.put(*chain("new", 8))
        assert len((await client.find(*chain("new", 8))).slots) == 8
        assert len((await client.find(*chain("old", 4))).slots) == 2, "the end of the oldest sequence went"
        assert server.stats().evictions_total > 0


async def test_pinned_pages_stay_until_they_are_released(place: Path) -> None:
    async with running(place, slots=8) as server, connected(server.socket) as reader:
        await reader.put(*chain("a", 3))
        found = await reader.find(*chain("a", 3))
        async with connected(server.socket) as writer:
            for name in "bcdefghij":
                await writer.put(name)
        reader.check(found.slots, found.crcs, *chain("a", 3))
        await reader.release(found.ticket)
        async with connected(server.socket) as writer:
            for name in "klmnopqr":
                await writer.put(name)
        assert (await reader.find(*chain("a", 3))).slots == []


async def test_a_client_that_vanishes_gives_back_what_it_held(place: Path) -> None:
    async with running(place, slots=8) as server:
        for round_ in range(20):
            async with connected(server.socket) as client:
                await client.put(f"page {round_}")
                await client.find(f"page {round_}")
                client.writer.transport.abort()
        async with connected(server.socket) as client:
            await client.put(*chain("a", 6))
            assert len((await client.find(*chain("a", 6))).slots) == 6


async def test_grants_wait_until_pins_are_let_go(place: Path) -> None:
    async with running(place, slots=4) as server, connected(server.socket) as reader:
        await reader.put(*chain("a", 3))
        found = await reader.find(*chain("a", 3))
        async with connected(server.socket) as writer:
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(writer.hear(Grant), 0.3)
        async with connected(server.socket) as writer:
            await reader.release(found.ticket)
            await writer.put("b")


async def test_a_page_that_is_here_already_costs_no_slot(place: Path) -> None:
    async with running(place, slots=8) as server, connected(server.socket) as one, connected(server.socket) as two:
        await one.put("a")
        before = await one.find("a")
        for _ in range(20):
            await two.put("a")
        assert (await two.find("a")).slots == before.slots
        assert server.stats().memory_pages == 1


async def test_a_corrupt_page_is_found_no_more(place: Path) -> None:
    async with running(place) as server, connected(server.socket) as client:
        await client.put(*chain("a", 3))
        client.say(Corrupt([key_of("a+")]))
        assert (await client.find(*chain("a", 3))).slots == [0]
        assert server.stats().corrupt_total == 1


async def test_layouts_share_nothing(place: Path) -> None:
    async with running(place, slots=32) as server:
        async with connected(server.socket) as client:
            await client.put("a")
        async with connected(server.socket, layout=LAYOUT[::-1]) as other:
            assert (await other.find("a")).slots == []


class TestBudget:
    async def test_memory_stays_within_it(self, place: Path) -> None:
        async with running(place, slots=10) as server, connected(server.socket) as client:
            assert client.segment.num_slots in (10, 11)
            assert client.segment.path.stat().st_size <= memory_for(10)

    async def test_a_layout_in_use_leaves_nothing_to_another(self, place: Path) -> None:
        async with (
            running(place) as server,
            connected(server.socket),
            connected(server.socket, layout=None) as other,
        ):
            other.say(Hello(VERSION, LAYOUT[::-1], PAGE_BYTES, "other"))
            assert "too little for 2 pages" in (await other.hear(Refused)).reason
            assert await other.is_ended()

    async def test_layouts_that_are_to_share_it_get_equal_parts(self, place: Path) -> None:
        """The ranks of one model, each with pages of its own."""
        layouts = [bytes([rank]) * 32 for rank in range(3)]
        async with AsyncExitStack() as stack:
            server = await stack.enter_async_context(running(place, slots=60))
            slots = []
            for layout in layouts:
                client = await stack.enter_async_context(connected(server.socket, layout=None))
                client.say(Hello(VERSION, layout, PAGE_BYTES, "rank", 3))
                slots.append((await client.hear(Welcome)).num_slots)
            assert max(slots) - min(slots) <= 1 and 3 * min(slots) >= 54

    async def test_a_layout_that_nobody_uses_makes_room(self, place: Path) -> None:
        async with running(place) as server:
            async with connected(server.socket) as client:
                await client.put("a")
            await until(lambda: server.stats().clients == 0)
            async with connected(server.socket, layout=LAYOUT[::-1]) as other:
                await other.put("b")
                assert server.stats().memory_pages == 1
            assert len(list((place / "shm").iterdir())) == 1

    async def test_pages_of_another_size_are_refused(self, place: Path) -> None:
        async with (
            running(place) as server,
            connected(server.socket),
            connected(server.socket, layout=None) as other,
        ):
            other.say(Hello(VERSION, LAYOUT, PAGE_BYTES + 1, "other"))
            assert "have 10000 bytes here" in (await other.hear(Refused)).reason

    async def test_another_version_is_refused(self, place: Path) -> None:
        async with running(place) as server, connected(server.socket, layout=None) as client:
            client.say(Hello(VERSION + 1, LAYOUT, PAGE_BYTES, "new"))
            assert f"speaks version {VERSION}" in (await client.hear(Refused)).reason

    async def test_too_little_room_reduces_it_and_is_said(
        self, place: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        room = segment_bytes(6, PAGE_BYTES, 0) + 4096
        free = room * 8 // 7
        monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=free))
        async with running(place, slots=1000) as server, connected(server.socket) as client:
            assert client.segment.num_slots in (5, 6)
            assert f"has room for {free - free // 8} bytes" in caplog.text

    async def test_slots_for_which_there_is_no_memory_are_not_granted(
        self, place: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A write to one would end the client with a bus error."""
        commit = Segment.commit
        monkeypatch.setattr(Segment, "commit", lambda self, index: index % 2 == 0 and commit(self, index))
        async with running(place) as server, connected(server.socket) as client:
            await client.put(*chain("a", 4))
            found = await client.find(*chain("a", 4))
            assert len(found.slots) == 4 and all(slot % 2 == 0 for slot in found.slots)
            await client.release(found.ticket)
            await client.put(*"bcdefghijkl")
            assert len((await client.find("l")).slots) == 1


async def until(condition) -> None:
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.01)


class TestBadClients:
    @pytest.mark.parametrize(
        "frame",
        [
            b"\xff\xff\xff\xff",
            b"\x05\x00\x00\x00hello",
            b"GET / HTTP/1.1\r\n\r\n",
            b"\x02\x00\x00\x00\x92\x63",
        ],
    )
    async def test_what_is_no_message_ends_that_connection_only(
        self, place: Path, frame: bytes, caplog: pytest.LogCaptureFixture
    ) -> None:
        async with running(place) as server, connected(server.socket) as good, connected(server.socket) as bad:
            bad.writer.write(frame)
            assert await bad.is_ended()
            await good.put("a")
            assert [record.levelno for record in caplog.records].count(logging.WARNING) == 1
            assert "The connection of 'test' ends" in caplog.text

    @pytest.mark.parametrize(
        "message",
        [
            Commit([Entry(9, key_of("a"), b"", 0)]),
            Commit([Entry(2**31 - 1, key_of("a"), b"", 0)]),
            Commit([Entry(0, key_of("a"), key_of("a"), 0)]),
            Release(1),
            Fetch(1, 1),
            Grant([1]),
            Hello(VERSION, LAYOUT, PAGE_BYTES, "again"),
        ],
    )
    async def test_messages_that_make_no_sense_end_that_connection_only(self, place: Path, message) -> None:
        async with running(place) as server, connected(server.socket) as good, connected(server.socket) as bad:
            bad.say(message)
            assert await bad.is_ended()
            await good.put("a")
            assert server.stats().clients == 1

    async def test_a_ticket_is_used_once_at_a_time(self, place: Path) -> None:
        async with running(place) as server, connected(server.socket) as client:
            client.say(Find(1, []))
            await client.hear(Found)
            client.say(Release(1))
            client.say(Find(1, []))
            await client.hear(Found)
            client.say(Find(1, []))
            assert await client.is_ended()

    async def test_a_client_that_says_nothing_at_first_is_sent_away(
        self, place: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("cluster.kv.server.HELLO_TIMEOUT_S", 0.1)
        async with running(place) as server, connected(server.socket, layout=None) as client:
            assert await client.is_ended()

    async def test_a_client_that_does_not_read_is_cut_off(self, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("cluster.kv.server.MAX_UNREAD_BYTES", 10_000)
        async with running(place) as server, connected(server.socket) as client:
            await client.put("a")
            with pytest.raises(ConnectionError):
                for ticket in range(10, 10**6):
                    client.say(Find(ticket, [key_of("a")] * 100))
                    await client.writer.drain()
            await until(lambda: server.stats().clients == 0)


class TestDirectory:
    async def test_two_hosts_do_not_share_one(self, place: Path) -> None:
        async with running(place) as server:
            with pytest.raises(HostError, match="another host is running there"):
                await KVServer(place / "host", HostConfig(2**20, segments=place / "shm")).start()
            async with connected(server.socket) as client:
                await client.put("a")

    async def test_a_file_in_its_place_is_an_error(self, place: Path) -> None:
        (place / "host").touch()
        with pytest.raises(HostError, match="cannot be used: File exists"):
            await KVServer(place / "host", HostConfig(2**20, segments=place / "shm")).start()


class TestProcess:
    """As `python -m cluster.kv.server`."""

    @staticmethod
    def start(place: Path, *more: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "cluster.kv.server", "--directory", str(place / "host"), *more]
        process = subprocess.Popen(
            [*command, "--segments", str(place / "shm")], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        assert process.stdout is not None
        assert process.stdout.readline() == f"KV host listening on {place}/host/kv.sock\n"
        return process

    async def test_it_ends_cleanly_when_it_is_told_to(self, place: Path) -> None:
        process = self.start(place, "--memory", "1MiB")
        async with connected(place / "host" / "kv.sock") as client:
            await client.put("a")
            process.send_signal(signal.SIGTERM)
            assert await asyncio.to_thread(process.wait, 20) == 0
            assert await client.is_ended()
        assert not list((place / "shm").iterdir())
        assert not (place / "host" / "kv.sock").exists()

    async def test_after_a_kill_another_takes_its_place(self, place: Path) -> None:
        process = self.start(place, "--memory", "1MiB")
        async with connected(place / "host" / "kv.sock") as client:
            await client.put("a")
            process.kill()
            assert await client.is_ended()
        process.communicate()
        assert len(list((place / "shm").iterdir())) == 1
        process = self.start(place, "--memory", "1MiB")
        try:
            assert not list((place / "shm").iterdir()), "the memory of the dead host is given back"
            async with connected(place / "host" / "kv.sock") as client:
                assert (await client.find("a")).slots == []
                await client.put("a")
        finally:
            process.terminate()
            process.communicate(timeout=20)

    def test_a_host_that_cannot_run_says_why(self, place: Path) -> None:
        process = self.start(place, "--memory", "1MiB")
        second = subprocess.run(
            [sys.executable, "-m", "cluster.kv.server", "--directory", str(place / "host"), "--memory", "1MiB"],
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert (second.returncode, second.stderr) == (1, f"{place}/host: another host is running there\n")
        process.terminate()
        process.communicate(timeout=20)


async def test_slots_are_found_by_the_size_of_a_page(place: Path) -> None:
    """Pages larger than the block they lie in, down to single bytes."""
    async with running(place, slots=16) as server:
        for number, page_bytes in enumerate((1, 4096, 4097, 8191)):
            async with connected(server.socket, layout=bytes([number]) * 32, page_bytes=page_bytes) as client:
                assert client.segment.stride == round_up(page_bytes)
                await client.put(*chain("a", 3))
                found = await client.find(*chain("a", 3))
                client.check(found.slots, found.crcs, *chain("a", 3))
            await until(lambda: server.stats().clients == 0)
            assert isinstance(client, Client)
