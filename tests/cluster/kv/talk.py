"""A client of a KV host as plain as can be: one message at a time over a real socket, pages through real memory."""

import asyncio
import hashlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TypeVar

import numpy as np

from cluster.kv.checksum import crc32c
from cluster.kv.segment import Segment
from cluster.kv.wire import (
    PREFIX_BYTES,
    VERSION,
    Commit,
    Entry,
    Fetch,
    Find,
    Found,
    Grant,
    Hello,
    Message,
    Ready,
    Release,
    Welcome,
    body_length,
    decode,
    encode,
)

M = TypeVar("M")
LAYOUT = bytes(range(32))
PAGE_BYTES = 10_000


def key_of(name: str) -> bytes:
    return hashlib.blake2b(name.encode(), digest_size=32).digest()


def chain(name: str, count: int) -> list[str]:
    """The names of the pages of a sequence: each is the beginning of the next."""
    return [name + "+" * index for index in range(count)]


def content_of(name: str, page_bytes: int = PAGE_BYTES) -> np.ndarray:
    seed = int.from_bytes(key_of(name)[:4], "little")
    return np.random.default_rng(seed).integers(0, 256, page_bytes, dtype=np.uint8)


class Client:
    """Says what it is told to, and keeps what it hears in order."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer
        self.segment: Segment | None = None
        self.granted: list[int] = []
        self._heard: list[Message] = []
        self._tickets = 0

    def say(self, message: Message) -> None:
        self.writer.write(encode(message))

    async def hear(self, kind: type[M]) -> M:
        """The next message of a kind; others wait for their turn, grants are taken."""
        for message in self._heard:
            if isinstance(message, kind):
                self._heard.remove(message)
                return message
        while True:
            async with asyncio.timeout(20):
                prefix = await self.reader.readexactly(PREFIX_BYTES)
                message = decode(await self.reader.readexactly(body_length(prefix)))
            if isinstance(message, Grant):
                self.granted += message.slots
            if isinstance(message, kind):
                return message
            if not isinstance(message, Grant):
                self._heard.append(message)

    async def hello(self, layout: bytes = LAYOUT, page_bytes: int = PAGE_BYTES) -> Welcome:
        self.say(Hello(VERSION, layout, page_bytes, "test"))
        welcome = await self.hear(Welcome)
        self.segment = Segment.attach(Path(welcome.path))
        return welcome

    async def put(self, *names: str) -> None:
        """Writes pages, each the next of the one named by all but its last character; returns once they are there."""
        assert self.segment is not None
        for name in names:
            while not self.granted:
                await self.hear(Grant)
            slot = self.granted.pop(0)
            content = content_of(name, self.segment.page_bytes)
            self.segment.slot(slot)[:] = content
            parent = key_of(name[:-1]) if name.endswith("+") else b""
            self.say(Commit([Entry(slot, key_of(name), parent, crc32c(content))]))
        await self.release((await self.find(*names[-1:])).ticket)

    async def find(self, *names: str) -> Found:
        self._tickets += 1
        self.say(Find(self._tickets, [key_of(name) for name in names]))
        found = await self.hear(Found)
        assert found.ticket == self._tickets
        return found

    async def fetch(self, found: Found, count: int) -> tuple[list[int], list[int]]:
        """The slots and CRCs of the pages that came, in order; fewer than `count` if one could not be had."""
        slots: list[int] = []
        crcs: list[int] = []
        self.say(Fetch(found.ticket, count))
        while len(slots) < count:
            ready = await self.hear(Ready)
            assert (ready.ticket, ready.first) == (found.ticket, len(slots))
            if not ready.slots:
                break
            slots += ready.slots
            crcs += ready.crcs
        return slots, crcs

    async def release(self, ticket: int) -> None:
        self.say(Release(ticket))
        await self.writer.drain()

    def check(self, slots: list[int], crcs: list[int], *names: str) -> None:
        """Asserts that the slots hold the pages of these names."""
        assert self.segment is not None and len(slots) == len(crcs) == len(names)
        for slot, crc, name in zip(slots, crcs, names, strict=True):
            content = self.segment.slot(slot)
            assert crc32c(content) == crc
            assert np.array_equal(content, content_of(name, self.segment.page_bytes)), name

    async def is_ended(self) -> bool:
        """Whether the host ends this connection within seconds."""
        try:
            async with asyncio.timeout(10):
                while await self.reader.read(65536):
                    pass
        except ConnectionError:
            return True
        except TimeoutError:
            return False
        return True


@asynccontextmanager
async def connected(socket: Path, layout: bytes | None = LAYOUT, page_bytes: int = PAGE_BYTES) -> AsyncIterator[Client]:
    """A client that has said Hello, or with no layout one that has said nothing."""
    client = Client(*await asyncio.open_unix_connection(socket))
    try:
        if layout is not None:
            await client.hello(layout, page_bytes)
        yield client
    finally:
        client.writer.close()
        if client.segment is not None:
            client.segment.close()
