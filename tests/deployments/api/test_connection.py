"""Servers that tell of a leaving client in other ways than uvicorn: by cancelling the application, or from send()."""

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from deployments.config import GatewayConfig
from deployments.gateway_app import build_http

pytestmark = pytest.mark.anyio

Message = dict[str, Any]


def scope(path: str = "/v1/chat/completions") -> dict[str, Any]:
    fixed = {"type": "http", "method": "POST", "query_string": b"", "headers": [], "root_path": "", "scheme": "http"}
    return {**fixed, "path": path, "raw_path": path.encode(), "http_version": "1.1", "asgi": {"spec_version": "2.4"}}


def receiving(**changes: Any) -> Callable[[], Awaitable[Message]]:
    """A client that sends one chat request and stays."""
    body = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], **changes}
    messages = [{"type": "http.request", "body": json.dumps(body).encode(), "more_body": False}]

    async def receive() -> Message:
        if not messages:
            await asyncio.Event().wait()
        return messages.pop()

    return receive


async def until(condition: Callable[[], Any]) -> None:
    async with asyncio.timeout(5):
        while not condition():
            await asyncio.sleep(0.005)


@pytest.mark.parametrize("stream", [True, False])
async def test_cancelling_the_application_ends_the_generation_at_once(make_app, backend, stream):
    backend.script.delay = 0.02
    backend.script.answers = ("one two three four five " * 8,)

    async def send(message: Message) -> None:
        pass

    running = asyncio.create_task(make_app()(scope(), receiving(stream=stream), send))
    await until(lambda: backend.emitted >= 3)
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert len(backend.closed_at) == 1


async def test_a_client_that_stops_reading_and_then_goes_ends_the_generation(make_app, backend):
    async def send(message: Message) -> None:
        if backend.emitted >= 3:
            await asyncio.Event().wait()  # The socket's buffer is full.

    running = asyncio.create_task(make_app()(scope(), receiving(stream=True), send))
    await until(lambda: backend.emitted >= 3)
    await asyncio.sleep(0.02)
    assert backend.emitted == 3, "a client that does not read must not be generated for without bound"
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert len(backend.closed_at) == 1


async def test_a_send_that_fails_ends_the_generation(make_app, backend, caplog):
    async def send(message: Message) -> None:
        if backend.emitted >= 3:
            raise OSError("broken pipe")

    await make_app()(scope(), receiving(stream=True), send)
    assert len(backend.closed_at) == 1
    assert caplog.records == []


@pytest.mark.parametrize(("echo", "expected"), [(True, [b"abc"]), (False, [])])
async def test_the_request_id_is_sent_unless_the_server_does_that_itself(backend, recorder, text, echo, expected):
    app = build_http(backend, GatewayConfig(), recorder, "1", load_text=lambda path: text, echo_request_id=echo)
    sent: list[Message] = []

    async def send(message: Message) -> None:
        sent.append(message)

    await app({**scope(), "headers": [(b"x-request-id", b"abc")]}, receiving(), send)
    assert [value for name, value in sent[0]["headers"] if name == b"x-request-id"] == expected
    assert json.loads(sent[1]["body"])["id"] == "chatcmpl-abc"
