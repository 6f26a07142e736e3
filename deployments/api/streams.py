"""Streamed answers whose clients may come back, to this gateway or to another: GET /v1/streams/{id}.

Owns the rules. Every event has an id, and every stream is kept outside its gateway. A client that asked for it with
`X-Manta-Resumable: true`, or that has come back once, may be away for the grace period while its answer goes on. For
others a closed connection means what it always did: nobody wants the rest. The death of their gateway does not mean it.
"""

import asyncio
import re
import secrets
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextlib import aclosing
from itertools import count
from typing import Protocol

from starlette.datastructures import Headers
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from deployments.api.errors import ApiError
from deployments.api.live import LiveStream, taken_over
from deployments.api.meter import RequestMeter
from deployments.api.service import Service
from deployments.api.sse import EventStream
from deployments.backend import NotReady
from deployments.streams.keeper import Record, StoreAway, StreamKeeper
from deployments.streams.messages import Kept, StreamSpec
from deployments.streams.token_log import TokenLog
from monitoring.recorder import Recorder

RESUMABLE_HEADER = "X-Manta-Resumable"
STREAM_ID_HEADER = "X-Manta-Stream-Id"
RETRY_S = 0.5
"""How often a stream that has come here before its first token looks for a replica."""
_ID_BYTES = 16
"""Nobody guesses 128 bits: who knows a stream's id was told it."""
_ID = re.compile(r"[A-Za-z0-9_-]{22}")
MAX_EVENTS = 2**53


class Answering(Protocol):
    """Writes one answer."""

    def events(self) -> AsyncGenerator[bytes]:
        """Its framed events, one at a time."""


Rewrite = Callable[[Service, Record, RequestMeter], Awaitable[Answering]]


class Streams:
    """The streamed answers of one gateway."""

    def __init__(
        self, service: Service, keeper: StreamKeeper | None, recorder: Recorder, rewrites: Mapping[str, Rewrite]
    ) -> None:
        """`keeper`: None if streams end with their connection. `rewrites`: by kind, how an answer goes on."""
        self._service = service
        self._keeper = keeper
        self._recorder = recorder
        self._rewrites = rewrites
        self._grace_s = service.config.streams.grace_s
        self._live: dict[str, LiveStream] = {}

    def start(self) -> None:
        """Begins to keep streams, and to take on those of gateways that died. Needs a running loop."""
        if self._keeper is not None:
            self._keeper.start(self._adopt, self._service.room)

    def respond(self, headers: Headers, spec: StreamSpec, answer: Callable[[Record | None], Answering]) -> Response:
        """Streams a new answer. Raises ApiError for a header that cannot be understood."""
        resumable = _wants_resumable(headers)
        if self._keeper is None:
            return EventStream(self._unkept(answer))
        self.start()
        record = Record(secrets.token_urlsafe(_ID_BYTES), spec)

        async def begin() -> Answering:
            return answer(record)

        events = self._read_new(record, begin) if resumable else self._attended(record, begin)
        return EventStream(events, headers={STREAM_ID_HEADER: record.stream_id})

    async def resume(self, http: HttpRequest) -> Response:
        """The rest of a stream, wherever it began. Raises ApiError: 404 if there is none of that id, or no more."""
        stream_id = http.path_params["stream_id"]
        after = position(stream_id, http.headers.get("last-event-id"), http.query_params.get("starting_after"))
        if self._keeper is None or not _ID.fullmatch(stream_id):
            raise _not_found()
        self.start()
        live = self._live.get(stream_id)
        while live is None or not live.has(after):
            kept = await self._take_over(stream_id, self._keeper)
            if isinstance(kept, Kept):
                return await self._again(kept, after)
            live = kept
        self._recorder.increment("manta:resumed_streams_total")
        return EventStream(live.read(after), headers={STREAM_ID_HEADER: stream_id})

    async def _take_over(self, stream_id: str, keeper: StreamKeeper) -> LiveStream | Kept:
        """Goes on with a stream from what is known of it, here or in the store; a complete one is only handed back."""
        record = keeper.local(stream_id)
        if record is None:
            try:
                kept = await keeper.claim(stream_id)
            except StoreAway as error:
                raise NotReady(str(error)) from error
            if kept is None:
                raise _not_found()
            if kept.finished:
                return kept
            if stream_id in self._live:  # Another connection of the same client was faster.
                return self._live[stream_id]
            successor = _record_of(kept, attended=True)
        else:
            if record.finished:
                return Kept(stream_id, record.spec, record.log.since(0), finished=True)
            successor = Record(stream_id, record.spec, record.log.copy())
            successor.num_sent, successor.announced = record.num_sent, record.announced
            keeper.add(successor, urgent=False)
            record.take_away()
        return self._go_on(successor, expected=True)

    def _go_on(self, record: Record, *, expected: bool) -> LiveStream:
        async def rewrite() -> Answering:
            # What has not begun would be refused: whatever ended its gateway may have ended the replicas too.
            while not (len(record.log) or await self._service.backend.ready()):
                await asyncio.sleep(RETRY_S)
            return await self._rewrites[record.spec.kind](self._service, record, self._service.meter())

        return self._launch(record, rewrite, expected=expected, again=True)

    async def _again(self, kept: Kept, after: int) -> Response:
        """A complete answer from its log, without its first events."""
        record = _record_of(kept, attended=True)
        # Everything of it has been counted when it was generated.
        uncounted = RequestMeter(Recorder(), clock=lambda: 0.0)
        answer = await self._rewrites[kept.spec.kind](self._service, record, uncounted)
        events = self._from(answer, after)
        first = await anext(events, None)
        if first is None:
            return Response(status_code=204)  # Which tells browsers to stop reconnecting.
        self._recorder.increment("manta:resumed_streams_total")
        return EventStream(_with_first(first, events), headers={STREAM_ID_HEADER: kept.stream_id})

    def _adopt(self, kept: Kept) -> None:
        """Goes on with the stream of a gateway that fell silent, before its client comes back."""
        if kept.stream_id not in self._live:
            self._recorder.increment("manta:adopted_streams_total")
            self._go_on(_record_of(kept, attended=False), expected=False)

    def _launch(
        self, record: Record, begin: Callable[[], Awaitable[Answering]], *, expected: bool, again: bool = False
    ) -> LiveStream:
        """Writes a stream's events from now on, read or not. `expected`: a client is about to read it. `again`: it was
        admitted before."""

        def attended(is_attended: bool) -> None:
            record.attended = is_attended

        def ended() -> None:
            if self._live.get(record.stream_id) is live:
                del self._live[record.stream_id]

        events = self._written(record, begin, keep=True, again=again)
        live = LiveStream(events, grace_s=self._grace_s, expected=expected, attended=attended, ended=ended)
        self._live[record.stream_id] = live
        record.on_taken = live.take_away
        return live

    async def _read_new(self, record: Record, begin: Callable[[], Awaitable[Answering]]) -> AsyncGenerator[bytes]:
        """A new stream's events, which are written on when this is closed."""
        async with aclosing(self._launch(record, begin, expected=True).read(0)) as events:
            async for event in events:
                yield event

    async def _attended(self, record: Record, begin: Callable[[], Awaitable[Answering]]) -> AsyncGenerator[bytes]:
        """A stream's events, which are written no further when this is closed."""
        async with aclosing(self._written(record, begin, keep=False)) as events:
            async for event in events:
                if record.taken:
                    raise taken_over()
                yield event

    async def _written(
        self, record: Record, begin: Callable[[], Awaitable[Answering]], *, keep: bool, again: bool = False
    ) -> AsyncGenerator[bytes]:
        """A stream's events as they are written, and the record of it.

        `keep`: also once it is complete; then the first event comes when the store knows the stream and no earlier.
        Others do not wait: most of their clients never come back, and all of them want their first token soon.

        `again`: it has been admitted before, here or at a gateway that may be gone. To refuse it now would destroy it.
        """
        assert self._keeper is not None
        complete = False
        with self._service.counted() if again else self._service.admitted():
            try:
                self._keeper.add(record, urgent=keep)
                answer = await begin()
                async with aclosing(answer.events()) as events:
                    async for event in events:
                        if keep and not record.settled.is_set():
                            await self._keeper.opened(record)
                        yield event
                complete = True
            except NotReady:
                if again:
                    self._keeper.leave(record)
                raise
            finally:
                if complete and keep:
                    self._keeper.finish(record)
                else:
                    self._keeper.drop(record)

    async def _from(self, answer: Answering, after: int) -> AsyncGenerator[bytes]:
        """The events after number `after`."""
        with self._service.admitted():
            async with aclosing(answer.events()) as events:
                numbers = count(1)
                async for event in events:
                    if next(numbers) > after:
                        yield event

    async def _unkept(self, answer: Callable[[Record | None], Answering]) -> AsyncGenerator[bytes]:
        with self._service.admitted():
            async with aclosing(answer(None).events()) as events:
                async for event in events:
                    yield event


def position(stream_id: str, last_event_id: str | None, starting_after: str | None) -> int:
    """The number of the last event that a client has; 0 for none. Raises ApiError 400 for what cannot be one.

    `Last-Event-ID` wins: a browser that reconnects sends it along with the query of its first request.
    """
    if last_event_id is not None:
        stream, _, number = last_event_id.rpartition(":")
        if stream != stream_id:
            raise ApiError(400, "Last-Event-ID is not the id of an event of this stream; expected <stream id>:<number>")
        param = "Last-Event-ID"
    elif starting_after is not None:
        number, param = starting_after, "starting_after"
    else:
        return 0
    if not (number.isascii() and number.isdecimal() and len(number) <= 16 and int(number) <= MAX_EVENTS):
        raise ApiError(400, f"{param} must end in the number of an event, from 0 on", param=param, code="invalid_value")
    return int(number)


def _wants_resumable(headers: Headers) -> bool:
    value = headers.get(RESUMABLE_HEADER, "false").lower()
    if value not in ("true", "false"):
        raise ApiError(400, f"{RESUMABLE_HEADER} must be true or false", param=RESUMABLE_HEADER, code="invalid_value")
    return value == "true"


def _record_of(kept: Kept, *, attended: bool) -> Record:
    record = Record(kept.stream_id, kept.spec, TokenLog.of(kept.log), attended=attended)
    record.num_sent = len(kept.log)
    record.announced = True
    record.settled.set()
    return record


def _not_found() -> ApiError:
    return ApiError(
        404,
        "there is no such stream, or no longer: streams are kept while they are generated and for a while after",
        param="stream_id",
        code="stream_not_found",
    )


async def _with_first(first: bytes, events: AsyncGenerator[bytes]) -> AsyncGenerator[bytes]:
    async with aclosing(events):
        yield first
        async for event in events:
            yield event
