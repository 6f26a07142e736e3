"""A gateway's side of the store of streams: what it goes on with, and one report of it all up to ten times a second.

Owns when the store is told what, and what follows from its answers; not how an answer is written, nor how it reaches a
client. A store that is away stops no stream: tokens wait here, and what is lost with a gateway is generated again.
"""

import asyncio
import contextvars
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

from deployments.streams.messages import Answer, Growth, Kept, Opened, Report, StreamSpec
from deployments.streams.token_log import TokenLog

logger = logging.getLogger(__name__)

PERIOD_S = 0.1
"""Between reports. A stream that is over before the next one costs none."""
LEAST_PERIOD_S = 0.02
"""Between reports of streams that wait for them: those that begin in between share one."""
IDLE_PERIOD_S = 2.0
"""How often a gateway that has nothing to say asks for orphaned streams."""
MENTION_S = 1.0
"""Longest silence about a stream that brings nothing, so that its lease does not end."""
CALL_TIMEOUT_S = 5.0
OPENING_S = 1.0
"""How long the first event of a stream that is to be resumable waits for the store to know the stream."""
KEEP_UNSENT_S = 60.0
"""How long a complete answer waits here for a store that is away."""
MAX_UNSENT_CLOSED = 10_000
MAX_OPENED_BYTES = 16 * 2**20
MAX_ADOPTED = 64
"""Orphans taken on at once."""


class StoreAway(Exception):
    """The store of streams does not answer."""


class StoreClient(Protocol):
    """The store, wherever it is. Both raise some exception when it cannot be reached."""

    async def report(self, report: Report) -> Answer: ...

    async def claim(self, gateway_id: str, stream_id: str) -> Kept | None: ...


class Record:
    """One stream as this gateway keeps it."""

    def __init__(self, stream_id: str, spec: StreamSpec, log: TokenLog | None = None, *, attended: bool = True) -> None:
        """`log`: what came of it elsewhere."""
        self.stream_id = stream_id
        self.spec = spec
        self.log = TokenLog() if log is None else log
        self.attended = attended
        """Whether a client reads it."""
        self.finished: float | None = None
        """When the answer was complete, if it is; it is kept nevertheless."""
        self.taken = False
        """Whether somebody else goes on with it: then this gateway must not."""
        self.on_taken: Callable[[], None] = lambda: None
        self.settled = asyncio.Event()
        """Set once the store has answered for it, whatever it said."""
        self.num_sent: int | None = None
        """Entries that the store has; None while it does not know the stream."""
        self.announced = False
        """Whether the store may have heard of it."""
        self._told: tuple[float, bool] = (0.0, attended)

    def news(self, now: float) -> Growth | None:
        """What the store is to be told now, None if that can wait."""
        assert self.num_sent is not None
        told_at, told_attended = self._told
        grown = len(self.log) > self.num_sent or self.attended != told_attended or self.finished is not None
        if not grown and now - told_at < MENTION_S:
            return None
        self._told = (now, self.attended)
        return Growth(
            self.stream_id, self.num_sent, self.log.since(self.num_sent), self.attended, self.finished is not None
        )

    def whole(self, now: float) -> Opened:
        self.announced = True
        self._told = (now, self.attended)
        return Opened(self.stream_id, self.spec, self.log.since(0), self.attended, self.finished is not None)

    def take_away(self) -> None:
        """Somebody else goes on with it."""
        self.taken = True
        self.settled.set()
        self.on_taken()


class StreamKeeper:
    """The records of one gateway and the store's knowledge of them."""

    def __init__(self, gateway_id: str, store: StoreClient, clock: Callable[[], float] = time.monotonic) -> None:
        self._gateway_id = gateway_id
        self._store = store
        self._clock = clock
        self._records: dict[str, Record] = {}
        self._closed: list[str] = []
        self._busy = asyncio.Event()
        self._urgent = asyncio.Event()
        self._last_call = -IDLE_PERIOD_S
        self._is_away = False
        self._task: asyncio.Task[None] | None = None
        self._refused = False

    def start(self, adopt: Callable[[Kept], None], room: Callable[[], int]) -> None:
        """Begins to report, once. `adopt` goes on with an orphan; `room` says how many may come."""
        if self._task is None:
            # In a context of its own: Serve ends the calls made in that of an HTTP request together with the request.
            loop = asyncio.get_running_loop()
            self._task = loop.create_task(self._run(adopt, room), context=contextvars.Context())

    def add(self, record: Record, *, urgent: bool) -> None:
        """Goes on with a stream from now on. `urgent`: its first event waits for the store."""
        self._records[record.stream_id] = record
        self._busy.set()
        if urgent and record.num_sent is None:
            self._urgent.set()

    def local(self, stream_id: str) -> Record | None:
        return self._records.get(stream_id)

    def finish(self, record: Record) -> None:
        """The answer is complete; a client may still come for it."""
        record.finished = self._clock()
        self._urgent.set()

    def drop(self, record: Record) -> None:
        """Nobody will ask for the stream any more."""
        if self._forget(record) and record.announced:
            self._closed.append(record.stream_id)

    def leave(self, record: Record) -> None:
        """This gateway cannot go on with the stream now; one that can gets it when the lease has ended."""
        self._forget(record)

    async def opened(self, record: Record) -> None:
        """Returns once the store knows the stream, so that no event can come back as one of an unknown stream.

        Or once it is clear that this takes too long: a stream must not wait for its insurance.
        """
        if record.settled.is_set() or self._is_away:
            return
        try:
            async with asyncio.timeout(OPENING_S):
                await record.settled.wait()
        except TimeoutError:
            self._is_away = True

    async def claim(self, stream_id: str) -> Kept | None:
        """Takes a stream over from whichever gateway has it; None if nobody knows it. Raises StoreAway."""
        try:
            async with asyncio.timeout(CALL_TIMEOUT_S):
                return await self._store.claim(self._gateway_id, stream_id)
        except Exception as error:
            raise StoreAway("streams cannot be looked up now; try again soon") from error

    async def _run(self, adopt: Callable[[Kept], None], room: Callable[[], int]) -> None:
        while True:
            for orphan in await self._report(min(room(), MAX_ADOPTED)):
                adopt(orphan)
            await self._pause()

    async def _pause(self) -> None:
        """Until something is to be said, or it is time to ask."""
        await asyncio.sleep(LEAST_PERIOD_S)
        if not self._records and not self._closed and not await _set_within(self._busy, IDLE_PERIOD_S):
            return
        await _set_within(self._urgent, PERIOD_S)

    async def _report(self, room: int) -> tuple[Kept, ...]:
        """One call to the store; what it hands over."""
        self._busy.clear()
        self._urgent.clear()
        now = self._clock()
        records = tuple(self._records.values())
        opened = tuple(self._opened(records, now))
        grown = tuple(
            news for record in records if record.num_sent is not None and (news := record.news(now)) is not None
        )
        if not (opened or grown or self._closed) and now - self._last_call < IDLE_PERIOD_S:
            return ()
        self._last_call = now
        closed, self._closed = self._closed, []
        report = Report(self._gateway_id, opened, grown, tuple(closed), max(0, room))
        try:
            async with asyncio.timeout(CALL_TIMEOUT_S):
                answer = await self._store.report(report)
        except Exception as error:
            if records and not self._is_away:
                logger.warning("Streams are not kept for now: the store does not answer: %s", error)
            self._is_away = True
            self._closed = (closed + self._closed)[-MAX_UNSENT_CLOSED:]
            for record in records:
                if record.finished is not None and now - record.finished > KEEP_UNSENT_S:
                    self._forget(record)
            return ()
        self._is_away = False
        named = {record.stream_id: record for record in records}
        self._settle(answer, report, named)
        return answer.orphans

    def _opened(self, records: Sequence[Record], now: float) -> Iterator[Opened]:
        """Streams that the store does not know, as many as one call should carry: all of them after it was replaced."""
        num_bytes = 0
        for record in records:
            if record.num_sent is None:
                if num_bytes > MAX_OPENED_BYTES:
                    self._urgent.set()
                    return
                num_bytes += record.spec.num_bytes + record.log.num_bytes
                yield record.whole(now)

    def _settle(self, answer: Answer, report: Report, records: dict[str, Record]) -> None:
        for stream_id in answer.taken:
            self._forget(records[stream_id])
            records[stream_id].take_away()
        for stream_id in answer.refused:
            if not self._refused:
                logger.warning("The store of streams is full: from now on some streams end with their gateway")
                self._refused = True
            self._forget(records[stream_id])
            records[stream_id].settled.set()
        for stream_id in answer.unknown:
            records[stream_id].num_sent = None
            self._urgent.set()
        exceptions = {*answer.taken, *answer.refused, *answer.unknown}
        told: list[tuple[str, int, bool]] = [(each.stream_id, len(each.log), each.finished) for each in report.opened]
        told += [(each.stream_id, each.start + len(each.part), each.finished) for each in report.grown]
        for stream_id, num_sent, finished in told:
            if stream_id not in exceptions:
                record = records[stream_id]
                record.num_sent = num_sent
                record.settled.set()
                if finished:
                    self._forget(record)

    def _forget(self, record: Record) -> bool:
        """Whether it was known: another record of the stream may have taken its place."""
        if self._records.get(record.stream_id) is not record:
            return False
        del self._records[record.stream_id]
        return True


async def _set_within(event: asyncio.Event, seconds: float) -> bool:
    """Waits for the event, but no longer than that; whether it is set."""
    try:
        async with asyncio.timeout(seconds):
            await event.wait()
    except TimeoutError:
        return False
    return True
