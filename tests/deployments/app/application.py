"""The running application, as the tests see it: over HTTP, and as processes."""

import asyncio
import json
import re
import subprocess
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import httpx
import openai

from deployments.text import TextModel
from engine.sampling_params import SamplingParams
from engine.sequence import Request
from tests.deployments.app.processes import below
from tests.deployments.fakes import token_at

START_S = 120.0


class Application:
    """The running application and what its answers must be."""

    def __init__(self, url: str, process: subprocess.Popen[str], text: TextModel, model: str) -> None:
        """`process`: runs `tests.deployments.app.server`."""
        self.url = url
        self.pid = process.pid
        self._process = process
        self._text = text
        self.model = model
        self._clients: list[openai.AsyncOpenAI] = []

    def wait_for(self, line: str) -> None:
        """Reads what the server prints until it has said so."""
        assert self._process.stdout is not None
        assert any(each == f"{line}\n" for each in self._process.stdout), "the application has ended"

    def deploy(self, **change: Any) -> None:
        """Changes the application, and returns once what is wanted runs; see `tests.deployments.app.server`."""
        assert self._process.stdin is not None
        print(json.dumps(change), file=self._process.stdin, flush=True)
        self.wait_for("deployed")

    def client(self) -> openai.AsyncOpenAI:
        """A client that lives until the end of the scenario."""
        url = f"{self.url}/v1"
        self._clients.append(openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0, timeout=60))
        return self._clients[-1]

    async def close_clients(self) -> None:
        """Left to the garbage collector they would be closed in the event loop of some other test."""
        while self._clients:
            await self._clients.pop().close()

    def expected(self, prompt: str, max_tokens: int, sample: int = 0, offset: int = 0) -> str:
        """The text that the fake engine generates for a prompt, with a model of that offset."""
        request = Request("", tuple(self._text.encode(prompt)), SamplingParams())
        return self._text.decode([token_at(request, sample, index, offset) for index in range(max_tokens)])

    def replicas(self) -> list[int]:
        """Process ids of the model's replicas."""
        return [pid for pid, command in below(self.pid).items() if ":LLMReplica" in command]

    def ranks(self) -> list[int]:
        """Process ids of the ranks of all replicas."""
        return [pid for pid, command in below(self.pid).items() if ":ShardActor" in command]

    def gateways(self) -> list[int]:
        return [pid for pid, command in below(self.pid).items() if ":Gateway" in command]

    def metric(self, name: str) -> list[float]:
        """The values of all series of a metric."""
        lines = httpx.get(f"{self.url}/metrics").text.splitlines()
        return [float(line.rpartition(" ")[2]) for line in lines if re.match(rf"{name}(\{{|\s)", line)]

    async def until(self, condition: Callable[[], bool], seconds: float = 20.0) -> None:
        deadline = time.monotonic() + seconds
        while not await asyncio.to_thread(condition):
            assert time.monotonic() < deadline, "it did not come true in time"
            await asyncio.sleep(0.1)


def scenario(run: Callable[[Application], Awaitable[None]]) -> Callable[[Application], None]:
    """Makes a test of a coroutine."""

    async def run_and_close(application: Application) -> None:
        try:
            await asyncio.wait_for(run(application), START_S)
        finally:
            await application.close_clients()

    def test(application: Application) -> None:
        asyncio.run(run_and_close(application))

    test.__doc__ = run.__doc__
    return test


async def stream_text(stream: AsyncIterator[openai.types.Completion]) -> str:
    return "".join([chunk.choices[0].text async for chunk in stream if chunk.choices])
