"""Clients of resumable streams: what they ask for, how they come back, and what they got."""

import asyncio
from collections.abc import Callable
from typing import Any

from tests.deployments.streams.gateways import CHAT, Connection, Gateways

ANSWERS = ("hello to the moon", "one two three four five", "Grüße über Häuser 日本語のテキスト 😀")
RESUMABLE = {"X-Manta-Resumable": "true"}
USAGE = {"stream_options": {"include_usage": True}}


def body_of(path: str, **changes: Any) -> dict[str, Any]:
    asked = {"messages": [{"role": "user", "content": "hi"}]} if path == CHAT else {"prompt": "hi"}
    return {"model": "tiny", "stream": True, **asked, **changes}


def ask(gateways: Gateways, gateway: int, path: str = CHAT, headers: Any = (), **changes: Any) -> Connection:
    return gateways.connect(gateway, path, body_of(path, **changes), {"X-Request-Id": "same", **dict(headers)})


def come_back(gateways: Gateways, gateway: int, last: str) -> Connection:
    """The client of that last event reconnects."""
    event_id = last.split("\n")[0].removeprefix("id: ")
    return gateways.connect(gateway, f"/v1/streams/{event_id.split(':')[0]}", headers={"Last-Event-ID": event_id})


def data_of(events: list[str]) -> list[str]:
    """The data, after a look at the ids."""
    lines = [event.split("\n") for event in events]
    numbers = [int(line[0].rpartition(":")[2]) for line in lines]
    assert numbers == list(range(1, len(numbers) + 1)), (
        "events are numbered in order, none is missing, none comes twice"
    )
    assert len({line[0].rpartition(":")[0] for line in lines}) == 1
    return [line[1] for line in lines]


async def until(condition: Callable[[], Any]) -> None:
    async with asyncio.timeout(5):
        while not condition():
            await asyncio.sleep(0.002)


async def kept(gateways: Gateways, client: Connection) -> None:
    """Returns when the store knows the client's stream."""
    await until(lambda: gateways.store.knows(client.stream_id))
