"""Several gateways over one scripted backend and one store of streams, in one process and without Ray."""

import asyncio
import json
from dataclasses import dataclass, field
from typing import Any

from fastapi import FastAPI

from deployments.config import GatewayConfig
from deployments.gateway_app import build_http
from deployments.streams.keeper import StreamKeeper
from deployments.streams.messages import Answer, Kept, Report
from deployments.streams.table import StreamTable
from deployments.text import TextModel
from monitoring.recorder import Recorder
from tests.deployments.api.tiny import FakeBackend, Script, card, text_model

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"


class Clock:
    """Seconds that pass when they are told to, beside those that do."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@dataclass
class LocalStore:
    """The table, called directly."""

    table: StreamTable
    is_away: bool = False
    reports: list[Report] = field(default_factory=list)

    def is_complete(self, stream_id: str) -> bool:
        return self.table._rows[stream_id].finished is not None

    def knows(self, stream_id: str) -> bool:
        return stream_id in self.table._rows

    def num_entries(self, stream_id: str) -> int:
        return len(self.table._rows[stream_id].log) if self.knows(stream_id) else 0

    async def report(self, report: Report) -> Answer:
        await asyncio.sleep(0)
        if self.is_away:
            raise ConnectionError("no store")
        self.reports.append(report)
        return self.table.report(report)

    async def claim(self, gateway_id: str, stream_id: str) -> Kept | None:
        await asyncio.sleep(0)
        if self.is_away:
            raise ConnectionError("no store")
        return self.table.claim(gateway_id, stream_id)


class Connection:
    """One client of a stream: reads as many events as it likes, then leaves without a word."""

    def __init__(self, app: FastAPI, method: str, path: str, body: bytes, headers: dict[str, str]) -> None:
        self.status = 0
        self.headers: dict[str, str] = {}
        self._parts: asyncio.Queue[bytes | None] = asyncio.Queue()
        self._left = asyncio.Event()
        self._wanted = asyncio.Semaphore(0)
        """Writes that the client has asked for: what is not read backs up to the server, as over a socket."""
        self._messages = [{"type": "http.request", "body": body, "more_body": False}]
        raw, _, query = path.partition("?")
        scope = {
            "type": "http",
            "method": method,
            "path": raw,
            "raw_path": raw.encode(),
            "query_string": query.encode(),
            "headers": [(name.lower().encode(), value.encode()) for name, value in headers.items()],
            "root_path": "",
            "scheme": "http",
            "http_version": "1.1",
            "asgi": {"spec_version": "2.3"},
        }
        self.task = asyncio.create_task(app(scope, self._receive, self._send))

    async def _receive(self) -> dict[str, Any]:
        if self._messages:
            return self._messages.pop()
        await self._left.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: Any) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            self.headers = {name.decode(): value.decode() for name, value in message["headers"]}
            return
        await self._wanted.acquire()
        if message["body"]:
            self._parts.put_nowait(message["body"])
        if not message.get("more_body"):
            self._parts.put_nowait(None)

    @property
    def stream_id(self) -> str:
        return self.headers["x-manta-stream-id"]

    async def read(self, count: int = 1_000_000) -> list[str]:
        """The next so many events, or those until the end."""
        found: list[str] = []
        async with asyncio.timeout(10):
            while len(found) < count:
                self._wanted.release()
                part = await self._parts.get()
                if part is None:
                    break
                found.append(part.decode())
        return found

    async def leave(self) -> None:
        """Closes the connection; returns when the server has noticed."""
        self._left.set()
        await asyncio.wait((self.task,))


class Gateways:
    """A cluster's HTTP side."""

    def __init__(self, script: Script | None = None, max_queued_requests: int = 100, **streams: float) -> None:
        text = text_model()
        self.text = text
        self.clock = Clock()
        self.backend = FakeBackend(script or Script(text, delay=0.002), card())
        self.config = GatewayConfig.model_validate({"max_queued_requests": max_queued_requests, "streams": streams})
        self.store = LocalStore(self.new_table())
        self.recorders: list[Recorder] = []
        self.keepers: list[StreamKeeper] = []
        self.apps: list[FastAPI] = []
        self.loaded: list[str] = []
        """Directories whose tokenizer a gateway has read."""

    def _load_text(self, path: str) -> TextModel:
        self.loaded.append(path)
        return self.text

    def new_table(self) -> StreamTable:
        config = self.config.streams
        return StreamTable(
            max_streams=config.max_streams,
            max_bytes=config.max_bytes,
            grace_s=config.grace_s,
            lease_s=config.lease_s,
            clock=self.clock,
        )

    async def add(self) -> int:
        """One more gateway, running; its number."""
        keeper = StreamKeeper(f"gateway-{len(self.apps)}", self.store)
        recorder = Recorder()
        load_text = {"load_text": self._load_text}
        app = build_http(self.backend, self.config, recorder, "1", keeper=keeper, **load_text)
        await app.router.lifespan_context(app).__aenter__()
        self.apps.append(app)
        self.keepers.append(keeper)
        self.recorders.append(recorder)
        return len(self.apps) - 1

    def connect(
        self, gateway: int, path: str, body: dict[str, Any] | None = None, headers: dict[str, str] | None = None
    ) -> Connection:
        """A request on a connection of its own; without a body it is a GET."""
        payload = b"" if body is None else json.dumps(body).encode()
        return Connection(self.apps[gateway], "GET" if body is None else "POST", path, payload, headers or {})

    def stop(self, gateway: int) -> None:
        """The gateway says no more to the store, as if it were dead or stopped."""
        task = self.keepers[gateway]._task
        assert task is not None
        task.cancel()
        self.keepers[gateway]._task = None

    async def wake(self, gateway: int) -> None:
        """The gateway reports again."""
        app = self.apps[gateway]
        await app.router.lifespan_context(app).__aenter__()

    def lapse(self) -> None:
        """Time passes, so that the leases of those who say nothing end."""
        self.clock.now += self.config.streams.lease_s + 1

    def counted(self, name: str) -> float:
        """A counter, over all gateways, since it was last asked for."""
        return sum(value for each in self.recorders for key, value in each.drain().counters.items() if key[0] == name)
