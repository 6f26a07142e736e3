"""What a streamed token costs a gateway: CPU time from the emission to the framed event, with and without the store.

`python -m benchmarks.gateway_cost` streams the same answers through the HTTP application, over a backend that has them
ready, as the gateway runs it but for the sockets; the store's calls are pickled as they would be for another process.
"""

import argparse
import asyncio
import json
import pickle
import time
from collections.abc import AsyncGenerator
from typing import Any

from fastapi import FastAPI

from deployments.backend import Backend
from deployments.config import GatewayConfig
from deployments.gateway_app import build_http
from deployments.messages import ModelCard
from deployments.streams.keeper import StreamKeeper
from deployments.streams.messages import Answer, Kept, Report
from deployments.streams.table import StreamTable
from engine.models.source import BUILT_IN, resolve_model
from engine.sequence import Emission, FinishReason, Request
from monitoring.recorder import Recorder

ROUNDS = 3


class Ready:
    """A backend whose tokens are there at once, one an iteration of the event loop."""

    def __init__(self, card: ModelCard) -> None:
        self._card = card

    async def card(self) -> ModelCard:
        return self._card

    async def ready(self) -> bool:
        return True

    async def metrics(self) -> bytes:
        return b""

    async def generate(self, request: Request) -> AsyncGenerator[Emission, None]:
        last = request.params.max_tokens or 1
        for count in range(1, last + 1):
            await asyncio.sleep(0)
            reason = FinishReason.LENGTH if count == last else None
            for sample in range(request.params.n):
                token = 300 + (7 * count + sample) % 500
                yield Emission(request.request_id, sample, (token,), finish_reason=reason)


class PickledStore:
    """The table, behind what a call to another process does to its arguments."""

    def __init__(self, config: GatewayConfig) -> None:
        streams = config.streams
        self._table = StreamTable(
            max_streams=streams.max_streams,
            max_bytes=streams.max_bytes,
            grace_s=streams.grace_s,
            lease_s=streams.lease_s,
            clock=time.monotonic,
        )
        self.seconds = 0.0
        """CPU that would have been the store's."""

    async def report(self, report: Report) -> Answer:
        sent = pickle.dumps(report, protocol=5)
        began = time.process_time()
        answer = pickle.dumps(self._table.report(pickle.loads(sent)), protocol=5)
        self.seconds += time.process_time() - began
        loaded: Answer = pickle.loads(answer)
        return loaded

    async def claim(self, gateway_id: str, stream_id: str) -> Kept | None:
        return self._table.claim(gateway_id, stream_id)


async def one(app: FastAPI, body: bytes, headers: list[tuple[bytes, bytes]]) -> None:
    """One client, which reads everything at once."""
    messages = [{"type": "http.request", "body": body, "more_body": False}]
    path = "/v1/chat/completions"
    scope: dict[str, Any] = {"type": "http", "method": "POST", "path": path, "raw_path": path.encode()}
    scope |= {"query_string": b"", "headers": headers, "root_path": "", "scheme": "http", "http_version": "1.1"}
    scope |= {"asgi": {"spec_version": "2.3"}}

    async def receive() -> Any:
        if not messages:
            await asyncio.Event().wait()
        return messages.pop()

    async def send(message: Any) -> None:
        assert message.get("status", 200) == 200, message

    await app(scope, receive, send)


async def measure(num_streams: int, num_tokens: int, n: int, *, kept: bool, resumable: bool) -> tuple[float, float]:
    """Microseconds of CPU a token, of the gateway and of the store."""
    source = resolve_model(BUILT_IN)
    card = ModelCard(BUILT_IN, str(source), 1_000_000, 1_000_000, (0,), 0, "")
    config = GatewayConfig(max_queued_requests=num_streams)
    backend: Backend = Ready(card)
    store = PickledStore(config)
    keeper = StreamKeeper("gateway", store) if kept else None
    app = build_http(backend, config, Recorder(), "1", keeper=keeper)
    asked = {"model": BUILT_IN, "messages": [{"role": "user", "content": "hi"}], "stream": True, "n": n}
    body = json.dumps({**asked, "max_tokens": num_tokens}).encode()
    headers = [(b"x-manta-resumable", b"true")] if resumable else []
    await one(app, body, headers)
    store.seconds = 0.0
    began = time.process_time()
    await asyncio.gather(*(one(app, body, headers) for _ in range(num_streams)))
    spent = time.process_time() - began
    total = num_streams * num_tokens * n
    return 1e6 * (spent - store.seconds) / total, 1e6 * store.seconds / total


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gateway_cost",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=2000)
    arguments = parser.parse_args()
    print(f"{'':34}{'gateway':>10}{'store':>10}   us a token, least of {ROUNDS}")
    for n in (1, 4):
        for name, kept, resumable in (
            ("not kept", False, False),
            ("kept", True, False),
            ("kept, client may leave", True, True),
        ):
            found = [
                asyncio.run(measure(arguments.streams, arguments.tokens, n, kept=kept, resumable=resumable))
                for _ in range(ROUNDS)
            ]
            gateway, store = (min(column) for column in zip(*found, strict=True))
            print(f"{f'n={n}, {name}':34}{gateway:10.1f}{store:10.2f}")


if __name__ == "__main__":
    main()
