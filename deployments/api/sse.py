"""Server-sent events as OpenAI frames them: `data: <json>` and an empty line.

Owns the life of a stream: the status is sent with the first event and not before, so that early failures have a status
of their own; a later failure is an event; and however the stream ends, its source has been closed.
"""

from collections.abc import AsyncGenerator
from contextlib import aclosing

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from deployments.api.connection import request_id_of, unless_disconnected
from deployments.api.errors import ClientDisconnected, explain

_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}


def event(payload: bytes) -> bytes:
    """One event. `payload` is JSON without raw line breaks, as every JSON encoder writes it."""
    return b"data: " + payload + b"\n\n"


class EventStream(Response):
    """A response that is written while it is made. `events` are framed already."""

    def __init__(self, events: AsyncGenerator[bytes]) -> None:
        super().__init__(headers=_HEADERS, media_type="text/event-stream")
        del self.headers["content-length"]
        self._events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await unless_disconnected(receive, self._run(scope, receive, send))
        except (ClientDisconnected, OSError):  # Servers that speak ASGI 2.4 raise OSError from send().
            return

    async def _run(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with aclosing(self._events) as events:
            try:
                first = await anext(events)
            except Exception as error:
                await explain(error, request_id_of(scope)).response()(scope, receive, send)
                return
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            await send({"type": "http.response.body", "body": first, "more_body": True})
            while True:
                try:
                    part = await anext(events)
                except StopAsyncIteration:
                    break
                except Exception as error:
                    # No [DONE] after this: a client must not take a broken answer for a whole one.
                    part = event(explain(error, request_id_of(scope)).body())
                    await send({"type": "http.response.body", "body": part, "more_body": True})
                    break
                await send({"type": "http.response.body", "body": part, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})
