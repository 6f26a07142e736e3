"""The outermost layer of the HTTP side: request ids, the count of responses, and the catch-all.

Plain ASGI. Starlette's BaseHTTPMiddleware would put a task and a queue between the stream and the socket, and hide the
client's disconnect.
"""

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from deployments.api.connection import assign_request_id
from deployments.api.errors import explain
from monitoring.recorder import Recorder

_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})


class Edge:
    """Wraps the application."""

    def __init__(self, app: ASGIApp, recorder: Recorder, echo_request_id: bool) -> None:
        self._app = app
        self._recorder = recorder
        self._echo_request_id = echo_request_id

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = assign_request_id(scope)
        status = 0

        async def send_watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                if self._echo_request_id:
                    message["headers"] = [*message["headers"], (b"x-request-id", request_id.encode())]
            await send(message)

        try:
            await self._app(scope, receive, send_watched)
        except Exception as error:
            response = explain(error, request_id).response()
            if status == 0:
                await response(scope, receive, send_watched)
            else:
                raise  # Half a response cannot be mended: the server closes the connection.
        finally:
            self._count(scope, status)

    def _count(self, scope: Scope, status: int) -> None:
        # The client left before there was a status: 499, as nginx has it.
        family = f"{(status or 499) // 100}xx"
        method = scope["method"] if scope["method"] in _METHODS else "other"
        handler = getattr(scope.get("route"), "path", "none")
        self._recorder.increment("manta:http_requests_total", labels=(method, family, handler))
