"""A client that reads an answer to its end, over as many connections as that takes, and does no more than any may do.

A stream whose connection breaks, or says nothing for too long, is asked for again by its id and the number of its last
event. What cannot be asked for again, because nothing of it has come or because it is no stream, is asked for anew.
Knows the API and nothing of who is killed, nor when.
"""

import asyncio
import json
import time
from collections.abc import Sequence
from typing import Any

import httpx

from benchmarks.chaos_streams import Answer, Kind

SILENCE_S = 15.0
"""After which it takes a stream's connection for dead: a gateway sends a comment after 10 s without an event."""
PATIENCE_S = 180.0
"""For an answer, over all connections."""
_RETRY_S = 0.2
_RESUMABLE = {"X-Manta-Resumable": "true"}


class _Lost(Exception):
    """The connection is gone, or whoever should have answered it; says how."""


async def ask(
    http: httpx.AsyncClient,
    kind: Kind,
    *,
    comes_back: bool = False,
    silence_s: float = SILENCE_S,
    into: Answer | None = None,
) -> Answer:
    """Reads one answer to its end; an error is a part of it. Unless it `comes_back`, so is a lost connection.

    `into`: an empty answer to write to, for somebody who watches.
    """
    answer = Answer() if into is None else into
    answer.asked = time.monotonic()
    deadline = time.monotonic() + PATIENCE_S
    while True:
        try:
            await _connect(http, kind, answer, silence_s if comes_back else None)
            return answer
        except (_Lost, httpx.HTTPError) as error:
            reason = str(error) if isinstance(error, _Lost) else f"{type(error).__name__}: {error}"
        if not comes_back or time.monotonic() > deadline:
            answer.error = reason
            return answer
        await asyncio.sleep(_RETRY_S)
        if answer.stream_id:
            answer.resumed = True
        else:
            answer.repeated = True


async def ask_all(
    url: str,
    asked: Sequence[Kind],
    *,
    comes_back: bool = False,
    silence_s: float = SILENCE_S,
    into: Sequence[Answer] | None = None,
) -> list[Answer]:
    """The answers to all of them, asked at once."""
    answers = [Answer() for _ in asked] if into is None else into
    async with httpx.AsyncClient(base_url=url, timeout=PATIENCE_S) as http:
        asking = (
            ask(http, kind, comes_back=comes_back, silence_s=silence_s, into=answer)
            for kind, answer in zip(asked, answers, strict=True)
        )
        return await asyncio.gather(*asking)


async def _connect(http: httpx.AsyncClient, kind: Kind, answer: Answer, silence_s: float | None) -> None:
    """One connection, which brings the answer's end or an error; otherwise raises _Lost or httpx.HTTPError."""
    streams = bool(kind.body.get("stream"))
    options: dict[str, Any] = {}
    if streams and silence_s is not None:
        options["timeout"] = httpx.Timeout(silence_s)
    if answer.stream_id:
        position = {"Last-Event-ID": f"{answer.stream_id}:{answer.num_events}"}
        asked = http.stream("GET", f"/v1/streams/{answer.stream_id}", headers=position, **options)
    else:
        headers = _RESUMABLE if streams and silence_s is not None else {}
        asked = http.stream("POST", kind.path, json=kind.body, headers=headers, **options)
    async with asked as response:
        if response.status_code != 200:
            _refused(answer, response.status_code, (await response.aread()).decode(errors="replace"))
        elif streams:
            answer.stream_id = response.headers.get("x-manta-stream-id", "")
            await _read(response, answer)
        else:
            answer.take(json.loads(await response.aread()))


def _refused(answer: Answer, status: int, body: str) -> None:
    """Raises _Lost unless it is the API that refuses, for good."""
    reason = f"HTTP {status}: {body[:300]}"
    if status == 503 or (status >= 500 and '"error"' not in body):
        raise _Lost(reason)
    answer.error = reason


async def _read(response: httpx.Response, answer: Answer) -> None:
    event_id = ""
    async for line in response.aiter_lines():
        if line.startswith("id: "):
            event_id = line[4:]
        elif line.startswith("data: "):
            if event_id and event_id != f"{answer.stream_id}:{answer.num_events + 1}":
                answer.error = f"event {event_id} came after number {answer.num_events}"
                return
            answer.num_events += 1
            if line == "data: [DONE]":
                return
            answer.add(line[6:])
            if answer.error is not None:
                return
    raise _Lost("the stream ended without [DONE]")
