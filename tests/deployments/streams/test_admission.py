"""Which streams a gateway goes on with, and which it refuses."""

import asyncio
import json
from typing import Any

import pytest

from deployments.backend import NotReady
from tests.deployments.api.tiny import Script, text_model
from tests.deployments.streams.clients import RESUMABLE, ask, come_back, data_of, kept, until
from tests.deployments.streams.gateways import Gateways

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("fast")]


@pytest.mark.parametrize(
    ("path", "headers", "status"),
    [
        ("/v1/streams/" + "A" * 22, {}, 404),
        ("/v1/streams/short", {}, 404),
        ("/v1/streams/" + "A" * 22, {"Last-Event-ID": "B" * 22 + ":1"}, 400),
        ("/v1/streams/" + "A" * 22, {"Last-Event-ID": "A" * 22 + ":-1"}, 400),
        ("/v1/streams/" + "A" * 22 + "?starting_after=x", {}, 400),
        ("/v1/streams/" + "A" * 22 + "?starting_after=" + "9" * 400, {}, 400),
    ],
)
async def test_what_is_no_stream_is_refused(gateways: Gateways, path: str, headers: Any, status: int) -> None:
    client = gateways.connect(0, path, headers=headers)
    error = json.loads((await client.read())[0])["error"]
    assert client.status == status
    assert error["type"] == "invalid_request_error"


async def test_a_header_that_cannot_be_understood_is_refused(gateways: Gateways) -> None:
    client = ask(gateways, 0, headers={"X-Manta-Resumable": "maybe"})
    await client.read()
    assert client.status == 400


async def test_a_gateway_that_is_full_refuses_streams_that_may_be_left_and_takes_on_no_orphans() -> None:
    gateways = Gateways(Script(text_model(), ("one two three four five " * 8,), delay=0.01), max_queued_requests=1)
    full, dying = await gateways.add(), await gateways.add()
    reading = ask(gateways, full)
    await reading.read(1)
    refused = ask(gateways, full, headers=RESUMABLE)
    error = json.loads((await refused.read())[0])["error"]
    assert (refused.status, error["code"]) == (429, "rate_limit_exceeded")
    client = ask(gateways, dying)
    await client.read(1)
    await kept(gateways, client)
    gateways.stop(dying)
    gateways.lapse()
    await asyncio.sleep(0.1)
    assert gateways.counted("manta:adopted_streams_total") == 0
    await reading.leave()
    await asyncio.sleep(0.1)
    assert gateways.counted("manta:adopted_streams_total") == 1


@pytest.mark.parametrize("gateway", [0, 1])
async def test_a_stream_goes_on_at_a_gateway_that_is_full_as_it_was_admitted_before(gateway: int) -> None:
    answers = ("one two three four five " * 4,)
    gateways = Gateways(Script(text_model(), answers, delay=0.005), max_queued_requests=1)
    for _ in range(2):
        await gateways.add()
    whole = await ask(gateways, 0).read()
    client, other = ask(gateways, 0), ask(gateways, 1)
    first = await client.read(3)
    await other.read(1)
    await kept(gateways, client)
    # Its old connection is open, as far as anybody knows.
    back = come_back(gateways, gateway, first[-1])
    rest = await back.read()
    assert back.status == 200
    assert data_of(first + rest) == data_of(whole)
    refused = ask(gateways, 1)
    await refused.read()
    assert refused.status == 429
    assert (await other.read())[-1].endswith("data: [DONE]\n\n")


async def test_a_stream_that_a_gateway_cannot_go_on_with_now_is_not_lost(gateways: Gateways) -> None:
    script = gateways.backend.script
    script.answers, script.delay = ("one two three four five " * 8,), 0.01
    whole = await ask(gateways, 0).read()
    client = ask(gateways, 0)
    first = await client.read(3)
    await kept(gateways, client)
    gateways.stop(0)
    await client.leave()
    script.fail_after, script.error = 0, NotReady("the server is stopping")
    refused = await come_back(gateways, 1, first[-1]).read()
    assert "the server is stopping" in refused[-1]
    reported = len(gateways.store.reports)
    await until(lambda: len(gateways.store.reports) > reported + 1)
    script.fail_after = None
    rest = await come_back(gateways, 1, first[-1]).read()
    assert data_of(first + rest) == data_of(whole)
