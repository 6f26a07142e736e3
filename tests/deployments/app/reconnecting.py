"""A client that does not give up: it reads a stream to its end, over as many connections as that takes."""

import asyncio
import contextlib
import json
import re
import time
from dataclasses import dataclass, field
from typing import Any

import httpx
import pytest

from tests.deployments.streams.clients import RESUMABLE

SILENCE_S = 4.0
"""After which it gives a connection up, where that does not mean that it wants no more."""
PATIENCE_S = 120.0
CREATED = re.compile(r'"created":\d+,')


@dataclass
class Client:
    """One stream; `data` and `ids` are those of its events so far."""

    url: str
    path: str
    body: dict[str, Any]
    name: str
    headers: dict[str, str] = field(default_factory=dict)
    data: list[str] = field(default_factory=list)
    ids: list[str] = field(default_factory=list)
    connections: int = 0

    async def run(self) -> "Client":
        deadline = time.monotonic() + PATIENCE_S
        async with httpx.AsyncClient(base_url=self.url, timeout=self._timeout()) as http:
            while not self.data or self.data[-1] != "[DONE]":
                assert time.monotonic() < deadline, f"{self.name} was not to be had again after {len(self.data)} events"
                with contextlib.suppress(httpx.TransportError):
                    await self._read(http)
                http.timeout = self._timeout()
        return self

    def _timeout(self) -> httpx.Timeout:
        """Whoever has not asked for a resumable stream, nor come back yet, ends it with the connection: a machine that
        stops for seconds must not make this client do so."""
        may_close = self.headers.items() >= RESUMABLE.items() or bool(self.ids)
        return httpx.Timeout(SILENCE_S if may_close else PATIENCE_S, connect=SILENCE_S)

    async def _read(self, http: httpx.AsyncClient) -> None:
        self.connections += 1
        if not self.ids:
            asked = http.stream("POST", self.path, json=self.body, headers={**self.headers, "X-Request-Id": self.name})
        else:
            stream_id = self.ids[-1].partition(":")[0]
            asked = http.stream("GET", f"/v1/streams/{stream_id}", headers={"Last-Event-ID": self.ids[-1]})
        async with asked as response:
            if response.status_code != 200:
                assert response.status_code >= 500, (await response.aread()).decode()
                await asyncio.sleep(0.2)
                return
            event_id = ""
            async for line in response.aiter_lines():
                if line.startswith("id: "):
                    event_id = line[4:]
                elif line.startswith("data: "):
                    assert '"error"' not in line, line
                    self.ids.append(event_id)
                    # The second in which it was asked for differs from one time to the next.
                    self.data.append(CREATED.sub("", line[6:]))


def text_of(client: Client) -> list[tuple[str | None, str | None, int | None]]:
    """Text, end and completion tokens of each choice; logprobs are left out, for they may differ by rounding."""
    found: dict[int, list[str]] = {}
    ends: dict[int, str] = {}
    usage = None
    for chunk in map(json.loads, client.data[:-1]):
        usage = (chunk.get("usage") or {}).get("completion_tokens", usage)
        for choice in chunk["choices"]:
            found.setdefault(choice["index"], []).append(choice["delta"].get("content") or "")
            ends[choice["index"]] = choice["finish_reason"] or ends.get(choice["index"], "")
    assert client.data[-1] == "[DONE]"
    return [("".join(parts), ends[index], usage) for index, parts in sorted(found.items())]


def exact(event: str) -> tuple[dict[str, Any], list[Any]]:
    """A chunk without its logprobs, and those by themselves: of each token its own, and the best in order."""
    chunk = json.loads(event)
    tokens = [token for choice in chunk["choices"] for token in (choice.pop("logprobs", None) or {}).get("content", [])]
    return chunk, [
        (token["token"], token["logprob"], *(best["logprob"] for best in token["top_logprobs"])) for token in tokens
    ]


def rounded(event: str) -> tuple[dict[str, Any], list[Any]]:
    """As `exact`, of what may have been generated again: other sequences were in its steps, which rounds otherwise.

    Which of two tokens that are equally likely is named second may differ as well, but not how likely it is.
    """
    chunk, tokens = exact(event)
    return chunk, [(token, *(pytest.approx(value, abs=0.1) for value in values)) for token, *values in tokens]
