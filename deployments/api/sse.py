"""Server-sent events as OpenAI frames them: `data: <json>` and an empty line.

Owns the life of a stream: the status is sent with the first event and not before, so that early failures have a status
of their own; a later failure is an event; a silent stream is kept open with comments, which clients ignore; and however
the stream ends, its source has been closed.
"""

import asyncio
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from types import MappingProxyType

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from deployments.api.connection import request_id_of, unless_disconnected
from deployments.api.errors import ClientDisconnected, explain

KEEP_ALIVE_S = 10.0
"""Longest silence: proxies close connections that say nothing for half a minute or more."""
_KEEP_ALIVE = b": keep-alive\n\n"
_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}


def event(payload: bytes) -> bytes:
    """One event. `payload` is JSON without raw line breaks, as every JSON encoder writes it."""
    return b"data: " + payload + b"\n\n"


class EventStream(Response):
    """A response that is written while it is made. `events` are framed already."""

    def __init__(
        self,
        events: AsyncGenerator[bytes],
        keep_alive_s: float = KEEP_ALIVE_S,
        headers: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        super().__init__(headers={**_HEADERS, **headers}, media_type="text/event-stream")
        del self.headers["content-length"]
        self._events = events
        self._keep_alive_s = keep_alive_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await unless_disconnected(receive, self._run(scope, receive, send))
        except (ClientDisconnected, OSError):  # Servers that speak ASGI 2.4 raise OSError from send().
            return

    async def _run(self, scope: Scope, receive: Receive, send: Send) -> None:
        body = _Body(send, self.raw_headers)
        keeping_alive = asyncio.create_task(body.keep_alive(self._keep_alive_s))
        try:
            async with aclosing(self._events) as events:
                while True:
                    try:
                        part = await anext(events)
                    except StopAsyncIteration:
                        break
                    except Exception as error:
                        explanation = explain(error, request_id_of(scope))
                        if not body.begun:
                            await explanation.response()(scope, receive, send)
                            return
                        # No [DONE] after this: a client must not take a broken answer for a whole one.
                        await body.write(event(explanation.body()))
                        break
                    await body.write(part)
            await body.end()
        finally:
            keeping_alive.cancel()


class _Body:
    """What has been sent of a response. Every write is whole events, so that a comment may come between any two."""

    def __init__(self, send: Send, headers: list[tuple[bytes, bytes]]) -> None:
        self._send = send
        self._headers = headers
        self._is_silent = True
        self.begun = False
        """Whether the status is out."""

    async def write(self, part: bytes) -> None:
        self._is_silent = False
        if not self.begun:
            self.begun = True
            await self._send({"type": "http.response.start", "status": 200, "headers": self._headers})
        await self._send({"type": "http.response.body", "body": part, "more_body": True})

    async def end(self) -> None:
        await self._send({"type": "http.response.body", "body": b"", "more_body": False})

    async def keep_alive(self, period_s: float) -> None:
        """Writes a comment whenever nothing was written for a period, until cancelled."""
        while True:
            self._is_silent = True
            await asyncio.sleep(period_s)
            if self._is_silent:
                await self.write(_KEEP_ALIVE)
