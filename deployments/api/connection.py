"""One client's connection: its body within a limit, its id, and whether it is still there."""

import asyncio
import re
import uuid
from collections.abc import Coroutine
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect, Request
from starlette.types import Receive, Scope

from deployments.api.errors import ApiError, ClientDisconnected

Result = TypeVar("Result")

MAX_REQUEST_ID = 128
_UNSAFE = re.compile(r"[^A-Za-z0-9._:-]")
_SCOPE_KEY = "manta.request_id"


def assign_request_id(scope: Scope) -> str:
    """The id the client sent in X-Request-Id, made safe for logs and headers, or a new one; kept in the scope."""
    sent = next((value for name, value in scope["headers"] if name == b"x-request-id"), b"")
    request_id = _UNSAFE.sub("", sent.decode("latin-1"))[:MAX_REQUEST_ID] or uuid.uuid4().hex
    scope[_SCOPE_KEY] = request_id
    return request_id


def request_id_of(scope: Scope) -> str:
    return scope[_SCOPE_KEY]


async def read_body(request: Request, limit: int) -> bytes:
    """The whole body. Raises ApiError 413 above `limit` bytes: at once if announced, else as soon as it is passed."""
    announced = request.headers.get("content-length", "")
    if announced.isdecimal() and int(announced) > limit:
        raise _too_large(limit)
    parts: list[bytes] = []
    size = 0
    try:
        async for part in request.stream():
            size += len(part)
            if size > limit:
                raise _too_large(limit)
            parts.append(part)
    except ClientDisconnect as error:
        raise ClientDisconnected from error
    return b"".join(parts)


async def unless_disconnected(receive: Receive, work: Coroutine[Any, Any, Result]) -> Result:
    """The result of `work`, which is cancelled and awaited if the client leaves or the caller is cancelled.

    Must be called once the body has been read: from then on the only message left to receive is the disconnect.
    Raises ClientDisconnected, and whatever `work` raises.
    """
    task = asyncio.create_task(work)
    gone = asyncio.create_task(_disconnected(receive))
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnected
        return task.result()
    finally:
        task.cancel()
        gone.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _too_large(limit: int) -> ApiError:
    # The rest of the body stays unread, so the connection cannot be used again.
    return ApiError(
        413, f"the request body is larger than {limit} bytes", code="request_too_large", headers={"Connection": "close"}
    )
