"""The KV host of a node, as its replicas see it: a Unix socket, and behind it a store for each layout of pages.

Owns the socket, the connections and how the budgets are divided between layouts. Knows no Ray: `cluster.kv_host` runs
it in an actor, and `python -m cluster.kv.server` alone.
"""

import argparse
import asyncio
import contextlib
import fcntl
import logging
import os
import secrets
import shutil
import signal
import stat
from collections.abc import Sequence
from pathlib import Path

from cluster.kv.disk import DiskTier
from cluster.kv.host_config import HostConfig
from cluster.kv.peers import NoPeers, PageCopy, Peers
from cluster.kv.segment import FILE_PREFIX, Segment, SegmentError, remove_dead, round_up, segment_bytes
from cluster.kv.session import ClientSession, ProtocolError
from cluster.kv.slots import SlotError
from cluster.kv.stats import HostCounters, HostStats
from cluster.kv.store import CLOSE_PATIENCE_S, Store
from cluster.kv.tags import TAG_BYTES
from cluster.kv.wire import (
    PREFIX_BYTES,
    VERSION,
    Hello,
    Message,
    Refused,
    Welcome,
    WireError,
    body_length,
    decode,
    encode,
)

logger = logging.getLogger(__name__)

SOCKET_NAME = "kv.sock"
_LOCK_NAME = "kv.lock"
HELLO_TIMEOUT_S = 10.0
"""How long a connection may say nothing at first."""
MAX_UNREAD_BYTES = 32 * 2**20
"""What a client may leave unread before its connection ends."""
MAX_CLIENTS = 256
ROOM_FOR_OTHERS = 8
"""This part of the file system in memory is left to others: Ray's object store lies there too, and neither can do
without the memory that it was promised."""
MIN_SLOTS = 2
"""A store needs one slot to write to and one to read from."""
MAX_PAGE_BYTES = 2**30


class HostError(Exception):
    """A host that cannot run: says why, and what would let it."""


class KVServer:
    """Keeps pages for the replicas of this node. `start` and `close` are called once each."""

    def __init__(self, directory: Path, config: HostConfig, peers: Peers | None = None) -> None:
        """`directory`: where the socket is; made with mode 0700 if need be."""
        self.socket = directory / SOCKET_NAME
        self._config = config
        self._peers = peers or NoPeers()
        self._counters = HostCounters()
        self._stores: dict[bytes, Store] = {}
        self._sessions: dict[ClientSession, None] = {}
        self._connections: set[asyncio.Task[None]] = set()
        self._opening = asyncio.Lock()
        self._disk = (
            None
            if config.disk is None or config.disk_bytes <= 0
            else DiskTier(config.disk, config.disk_bytes, self._counters)
        )
        self._server: asyncio.Server | None = None
        self._lock = -1

    async def start(self) -> None:
        """Listens. Raises HostError if another host does, or if the directory is not ours."""
        self._lock = _take(self.socket.parent)
        for path in remove_dead(self._config.segments):
            logger.info("Removed %s, whose host is gone", path)
        if self._disk is not None:
            await self._disk.start()
        self.socket.unlink(missing_ok=True)
        try:
            self._server = await asyncio.start_unix_server(self._accept, self.socket)
        except OSError as error:
            raise HostError(f"{self.socket}: cannot be listened on: {error.strerror or error}") from None
        self.socket.chmod(0o600)

    async def close(self) -> None:
        """Ends all connections; removes the socket and all segments. Takes seconds at most, whatever hangs."""
        if self._server is not None:
            self._server.close()
        for connection in list(self._connections):
            connection.cancel()
        if self._connections:
            await asyncio.wait(self._connections, timeout=CLOSE_PATIENCE_S)
        await asyncio.gather(*(self._drop(layout) for layout in list(self._stores)))
        if self._disk is not None:
            await self._disk.close()
        if self._server is not None:
            self.socket.unlink(missing_ok=True)
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def stats(self) -> HostStats:
        """The host now."""
        stores = self._stores.values()
        return HostStats(
            memory_bytes=sum(store.table.num_pages * store.segment.page_bytes for store in stores),
            memory_pages=sum(store.table.num_pages for store in stores),
            disk_bytes=self._disk.num_bytes if self._disk else 0,
            disk_pages=self._disk.num_pages if self._disk else 0,
            clients=len(self._sessions),
            **vars(self._counters),
        )

    def have(self, layout: bytes, keys: Sequence[bytes]) -> int:
        """How many of these keys, from the first on, are at this host. For other hosts."""
        store = self._stores.get(layout)
        if store is None:
            return 0
        return next((index for index, key in enumerate(keys) if not store.has(key)), len(keys))

    async def pages(self, layout: bytes, keys: Sequence[bytes]) -> list[PageCopy]:
        """The longest run of these pages that is here, cut to one piece. For other hosts."""
        store = self._stores.get(layout)
        return [] if store is None else await store.copies(keys)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._connections.add(task)
        name = "a client that has not said its name"
        session: ClientSession | None = None
        try:
            hello = await asyncio.wait_for(_read(reader), HELLO_TIMEOUT_S)
            if not isinstance(hello, Hello):
                raise ProtocolError(f"expected Hello, got {type(hello).__name__}")
            name = repr(hello.name[:80])
            session = await self._welcome(hello, writer)
            while session is not None:
                session.receive(await _read(reader))
                self._top_up(session.store)
                await writer.drain()
        except (WireError, ProtocolError, SlotError) as error:
            logger.warning("The connection of %s ends: %s", name, error)
        except (asyncio.IncompleteReadError, ConnectionError, TimeoutError):
            logger.debug("%s is gone", name)
        except asyncio.CancelledError:  # by `close`; nobody waits for more
            pass
        except Exception:
            logger.exception("The connection of %s ends", name)
        finally:
            if session is not None:
                self._sessions.pop(session, None)
                session.end()
                self._top_up(session.store)
            writer.close()
            self._connections.discard(task)

    async def _welcome(self, hello: Hello, writer: asyncio.StreamWriter) -> ClientSession | None:
        """Finds or opens the store that the client asks for; None if there is none, and the client knows why."""
        try:
            async with self._opening:
                store = await self._store(hello)
                session = ClientSession(hello.name, store, lambda message: _send(writer, message))
                self._sessions[session] = None
        except (HostError, SegmentError) as error:
            logger.warning("Refused %r: %s", hello.name[:80], error)
            _send(writer, Refused(str(error)))
            with contextlib.suppress(ConnectionError, TimeoutError):
                await asyncio.wait_for(writer.drain(), HELLO_TIMEOUT_S)
            return None
        segment = store.segment
        _send(writer, Welcome(str(segment.path), segment.num_slots, segment.num_disk))
        session.top_up()
        return session

    async def _store(self, hello: Hello) -> Store:
        """The store of the client's layout. Raises HostError, SegmentError."""
        if hello.version != VERSION:
            raise HostError(f"this host speaks version {VERSION} of the protocol, the client {hello.version}")
        if len(self._sessions) >= MAX_CLIENTS:
            raise HostError(f"there are {MAX_CLIENTS} clients already")
        if not 1 <= hello.page_bytes <= MAX_PAGE_BYTES:
            raise HostError(f"a page has from 1 to {MAX_PAGE_BYTES} bytes, not {hello.page_bytes}")
        store = self._stores.get(hello.layout)
        if store is None:
            store = await self._open(hello.layout, hello.page_bytes, hello.parts)
        elif store.segment.page_bytes != hello.page_bytes:
            raise HostError(
                f"pages of this layout have {store.segment.page_bytes} bytes here, the client's {hello.page_bytes}"
            )
        return store

    async def _open(self, layout: bytes, page_bytes: int, parts: int) -> Store:
        """A new store, with its part of the budget, if those that are in use leave as much."""
        in_use = {session.store.layout for session in self._sessions}
        for other in [other for other in self._stores if other not in in_use]:
            await self._drop(other)
        disk = None if self._disk is None else await self._disk.open(layout, page_bytes, parts)
        try:
            segment = self._make_segment(page_bytes, parts, num_disk=disk.table.num_slots if disk else 0)
        except (HostError, SegmentError):
            if disk is not None:
                await disk.close()
            raise
        if disk is not None:
            disk.show_tags(segment.disk_tags)
        store = Store(layout, segment, disk, self._peers, self._counters)
        store.on_free = lambda: self._top_up(store)
        self._stores[layout] = store
        logger.info("Keeping up to %d pages of %d bytes in %s", segment.num_slots, page_bytes, segment.path)
        return store

    def _make_segment(self, page_bytes: int, parts: int, num_disk: int) -> Segment:
        left = self._config.memory_bytes - sum(_size(store.segment) for store in self._stores.values())
        left = min(left, self._config.memory_bytes // parts)
        free = shutil.disk_usage(self._config.segments).free
        room = free - free // ROOM_FOR_OTHERS
        if room < left:
            logger.warning("%s has room for %d bytes, not the %d to be used", self._config.segments, room, left)
        fixed = segment_bytes(0, page_bytes, num_disk)
        # The tags, two places for each slot, are rounded up to whole blocks.
        num_slots = (min(left, room) - fixed) // (round_up(page_bytes) + 2 * TAG_BYTES)
        while num_slots > 0 and segment_bytes(num_slots, page_bytes, num_disk) > min(left, room):
            num_slots -= 1
        if num_slots < MIN_SLOTS:
            raise HostError(
                f"{max(0, min(left, room))} of {self._config.memory_bytes} bytes are left, "
                f"too little for {MIN_SLOTS} pages of {page_bytes}"
            )
        path = self._config.segments / f"{FILE_PREFIX}{os.getpid()}-{secrets.token_hex(4)}"
        return Segment.create(path, num_slots, page_bytes, num_disk)

    async def _drop(self, layout: bytes) -> None:
        store = self._stores.pop(layout)
        logger.info("Dropping %s", store.segment.path)
        await store.close()

    def _top_up(self, store: Store) -> None:
        for session in self._sessions:
            if session.store is store:
                session.top_up()


def _size(segment: Segment) -> int:
    return segment_bytes(segment.num_slots, segment.page_bytes, segment.num_disk)


async def _read(reader: asyncio.StreamReader) -> Message:
    """The next message. Raises IncompleteReadError at the end, WireError for what is none."""
    return decode(await reader.readexactly(body_length(await reader.readexactly(PREFIX_BYTES))))


def _send(writer: asyncio.StreamWriter, message: Message) -> None:
    if writer.is_closing():
        return
    writer.write(encode(message))
    if writer.transport.get_write_buffer_size() > MAX_UNREAD_BYTES:
        logger.warning("A client has left %d bytes unread: its connection ends", MAX_UNREAD_BYTES)
        writer.transport.abort()


def _take(directory: Path) -> int:
    """Makes a directory this host's alone; the descriptor that is returned holds it. Raises HostError."""
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = directory.lstat()
        if status.st_uid != os.geteuid() or not stat.S_ISDIR(status.st_mode):
            raise HostError(f"{directory}: expected a directory of user {os.geteuid()}")
        directory.chmod(0o700)
        lock = os.open(directory / _LOCK_NAME, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise HostError(f"{directory}: cannot be used: {error.strerror}") from None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(lock)
        raise HostError(f"{directory}: another host is running there") from None
    return lock


async def _run(directory: Path, config: HostConfig) -> None:
    """Serves until SIGTERM or SIGINT."""
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    server = KVServer(directory, config)
    try:
        await server.start()
        print(f"KV host listening on {server.socket}", flush=True)
        await stop.wait()
    finally:
        await server.close()


def main(arguments: Sequence[str] | None = None) -> None:
    """A host without Ray, for tests and measurements."""
    from engine.config import parse_bytes

    parser = argparse.ArgumentParser(prog="python -m cluster.kv.server", description=main.__doc__)
    parser.add_argument("--directory", type=Path, required=True, help="where the socket is to be")
    parser.add_argument("--memory", type=parse_bytes, required=True, help='of pages in memory, such as "1GiB"')
    parser.add_argument("--segments", type=Path, default=HostConfig(0).segments, help="folder in memory [%(default)s]")
    parser.add_argument("--disk", type=Path, help="folder of the disk tier [none]")
    parser.add_argument("--disk-bytes", type=parse_bytes, default=2**32, help="of pages on disk [4GiB]")
    options = parser.parse_args(arguments)
    config = HostConfig(options.memory, options.disk, options.disk_bytes, options.segments)
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
    try:
        asyncio.run(_run(options.directory, config))
    except HostError as error:
        parser.exit(1, f"{error}\n")


if __name__ == "__main__":
    main()
