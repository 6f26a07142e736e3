"""One client of a KV host, from its Hello on: what its messages mean, and what it is told.

Owns the client's tickets and what is under way for them. Knows messages, not sockets: `send` is given.
"""

import asyncio
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any

from cluster.kv.slots import Page
from cluster.kv.store import Store, places
from cluster.kv.wire import Commit, Committed, Corrupt, Fetch, Find, Found, Grant, Message, Ready, Release

MAX_TICKETS = 65_536
"""Questions of one client that it has not released."""


class ProtocolError(Exception):
    """A client sent what makes no sense at this point: says what."""


@dataclass(slots=True, eq=False)
class _Ticket:
    """One Find, until it is released."""

    number: int
    keys: list[bytes]
    run: list[Page | None]
    """By page of the run: where it is pinned, or None."""
    peer: str = ""
    """The host that has the pages after those of this node."""
    work: set[asyncio.Task[None]] = field(default_factory=set)
    released: bool = False


class ClientSession:
    """What a host and one of its clients have between them."""

    def __init__(self, name: str, store: Store, send: Callable[[Message], None]) -> None:
        self.name = name
        self.store = store
        self._send = send
        self._tickets: dict[int, _Ticket] = {}
        self._granting: asyncio.Task[None] | None = None
        self._ended = False

    def receive(self, message: Message) -> None:
        """Does what a message asks for. Raises ProtocolError or SlotError, which end the connection."""
        match message:
            case Commit(entries):
                self._send(Committed(self.store.commit(self, entries)))
            case Find(ticket, keys):
                self._find(ticket, keys)
            case Fetch(ticket, count):
                found = self._ticket(ticket)
                self._work(found, self._fetch(found, min(count, len(found.run))))
            case Release(ticket):
                self._release(self._ticket(ticket))
            case Corrupt(keys):
                self.store.discard(keys)
            case _:
                raise ProtocolError(f"{type(message).__name__} is not for a host that has said Welcome")

    def top_up(self) -> None:
        """Grants slots if this client has less than half of what it may have."""
        if self._ended or self._granting is not None or 2 * self.store.table.num_granted(self) >= self.store.credit:
            return
        self._granting = asyncio.get_running_loop().create_task(self._grant())

    def end(self) -> None:
        """The connection is gone: gives back all slots and pins."""
        self._ended = True
        for ticket in list(self._tickets.values()):
            self._release(ticket)
        self.store.table.end(self)

    async def _grant(self) -> None:
        try:
            missing = self.store.credit - self.store.table.num_granted(self)
            slots = await self.store.grant(self, missing)
        finally:
            self._granting = None
        if slots and not self._ended:
            self._send(Grant(slots))
        elif self._ended:
            self.store.table.end(self)

    def _ticket(self, number: int) -> _Ticket:
        ticket = self._tickets.get(number)
        if ticket is None:
            raise ProtocolError(f"there is no ticket {number}")
        return ticket

    def _find(self, number: int, keys: list[bytes]) -> None:
        if number in self._tickets or len(self._tickets) >= MAX_TICKETS:
            raise ProtocolError(f"ticket {number} was not released, or {MAX_TICKETS} others")
        run = self.store.find(self, number, keys)
        ticket = self._tickets[number] = _Ticket(number, keys, run)
        if len(run) == len(keys):
            self._send(Found(number, *places(run, 0)))
        else:
            self._work(ticket, self._find_elsewhere(ticket))

    async def _find_elsewhere(self, ticket: _Ticket) -> None:
        here = len(ticket.run)
        ticket.peer, elsewhere = await self.store.find_elsewhere(ticket.keys[here:])
        self._send(Found(ticket.number, *places(ticket.run, elsewhere)))
        ticket.run += [None] * elsewhere

    async def _fetch(self, ticket: _Ticket, count: int) -> None:
        """Brings the first pages of a run into memory, piece by piece; says so as they come."""
        first = 0
        while first < count:
            last = first
            while last < count and (ticket.run[last] is not None or self._pin(ticket, last)):
                last += 1
            if last == first:
                await self._load(ticket, first, count)
                if ticket.run[first] is None:
                    self._send(Ready(ticket.number, first, [], []))
                    return
                continue
            pages = [page for page in ticket.run[first:last] if page is not None]
            self._send(Ready(ticket.number, first, [page.slot for page in pages], [page.crc for page in pages]))
            first = last

    async def _load(self, ticket: _Ticket, first: int, end: int) -> None:
        """Brings the pages from `first` on into memory, as many as are brought at once, and pins them."""
        keys = ticket.keys[first:end]
        index = {key: first + offset for offset, key in enumerate(keys)}
        await self.store.load(keys, ticket.peer, lambda key: self._pin(ticket, index[key]))

    def _pin(self, ticket: _Ticket, index: int) -> bool:
        """Pins a page of the run if it is in memory now."""
        if ticket.released or ticket.run[index] is not None:
            return not ticket.released
        ticket.run[index] = self.store.table.pin(self, ticket.number, ticket.keys[index])
        return ticket.run[index] is not None

    def _release(self, ticket: _Ticket) -> None:
        ticket.released = True
        del self._tickets[ticket.number]
        for task in ticket.work:
            task.cancel()
        self.store.release(self, ticket.number)

    def _work(self, ticket: _Ticket, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        ticket.work.add(task)
        task.add_done_callback(ticket.work.discard)
