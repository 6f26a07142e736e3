"""A stream whose answer is written whether or not anybody reads it: for clients that may leave and come back.

Owns the latest events, the task that writes them, and the time that the client may be away. Knows neither what is in an
event nor where streams are kept.
"""

import asyncio
import contextvars
from collections import deque
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing

from deployments.api.errors import ApiError

MAX_BYTES = 256 * 1024
"""Events held for a client, in bytes. Older ones are written again when a client wants them."""


def taken_over() -> ApiError:
    """What a client is told whose stream goes on for another connection."""
    return ApiError(
        409,
        "this stream goes on at another connection, which asked for it later",
        kind="conflict_error",
        code="stream_taken_over",
    )


class LiveStream:
    """The events of one stream, numbered from 1, while they are written."""

    def __init__(
        self,
        events: AsyncGenerator[bytes],
        *,
        grace_s: float,
        expected: bool,
        attended: Callable[[bool], None],
        ended: Callable[[], None],
        max_bytes: int = MAX_BYTES,
    ) -> None:
        """`grace_s`: how long the events may be written for nobody; then their generator is closed. `expected`: a
        reader is on its way, and wants them from the first on. `attended` is told whether there is a reader whenever
        that changes; `ended` that the stream can be forgotten."""
        self._events = events
        self._grace_s = grace_s
        self._attended = attended
        self._forget = ended
        self._expected = expected
        self._max_bytes = max_bytes
        self._held: deque[bytes] = deque()
        self._num_bytes = 0
        self._num_dropped = 0
        self._reader: object | None = None
        """Identity of the one that reads now: a client that comes back replaces what is left of itself."""
        self._num_read = 0
        self._changed = asyncio.Event()
        self._room = asyncio.Event()
        self._over = False
        self._failure: Exception | None = None
        self._deadline: asyncio.TimerHandle | None = None
        # In a context of its own: it outlives the HTTP request that it is begun by.
        self._writing = asyncio.get_running_loop().create_task(self._write(), context=contextvars.Context())
        self._watch()

    def has(self, after: int) -> bool:
        """Whether the events after that number can be read here."""
        return after >= self._num_dropped

    async def read(self, after: int) -> AsyncGenerator[bytes]:
        """The events after number `after`, as they are written. Raises what their generator raised."""
        me = self._take_seat(after)
        try:
            while True:
                while self._num_read < self._num_dropped + len(self._held):
                    event = self._held[self._num_read - self._num_dropped]
                    self._num_read += 1
                    self._room.set()
                    yield event
                    if self._reader is not me:
                        raise taken_over()
                if self._over:
                    if self._failure is not None:
                        raise self._failure
                    return
                self._changed.clear()
                await self._changed.wait()
                if self._reader is not me:
                    raise taken_over()
        finally:
            if self._reader is me:
                self._reader = None
                self._room.set()
                self._watch()

    def take_away(self) -> None:
        """Ends it: somebody else goes on with the stream."""
        if not self._over:
            self._over, self._failure = True, taken_over()
            self._changed.set()
        self._stop_clock()
        self._writing.cancel()
        self._forget()

    def _take_seat(self, after: int) -> object:
        assert self.has(after), "those events are gone"
        self._reader = me = object()
        self._expected = False
        self._num_read = after
        self._changed.set()
        self._watch()
        return me

    async def _write(self) -> None:
        failure: Exception | None = None
        try:
            async with aclosing(self._events) as events:
                async for event in events:
                    self._held.append(event)
                    self._num_bytes += len(event)
                    self._changed.set()
                    while not self._trim():
                        self._room.clear()
                        await self._room.wait()
        except Exception as error:
            failure = error
        self._end(failure)

    def _trim(self) -> bool:
        """Drops the oldest events beyond the limit; False if a reader still wants them."""
        while self._num_bytes > self._max_bytes:
            if self._expected or (self._reader is not None and self._num_read <= self._num_dropped):
                return False
            self._num_bytes -= len(self._held.popleft())
            self._num_dropped += 1
        return True

    def _end(self, failure: Exception | None) -> None:
        if self._over:
            return
        self._over, self._failure = True, failure
        self._changed.set()
        if failure is None or self._reader is not None:
            # Who comes later finds the answer in the store, or was there to hear what went wrong.
            self._stop_clock()
            self._forget()

    def _watch(self) -> None:
        """Starts or stops the clock of a stream without a reader."""
        self._attended(self._reader is not None)
        if self._reader is not None or (self._over and self._failure is None):
            self._stop_clock()
        elif self._deadline is None:
            self._deadline = asyncio.get_running_loop().call_later(self._grace_s, self._expire)

    def _stop_clock(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _expire(self) -> None:
        self._deadline = None
        self._over = True
        self._writing.cancel()
        self._forget()
