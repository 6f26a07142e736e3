"""The application in Ray with two gateways: one of them is killed, or stopped, while it serves streams."""

import asyncio
import contextlib
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from os import kill
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from cluster.ports import free_ports
from deployments.text import TextModel
from engine.sampling_params import SamplingParams
from engine.sequence import Request
from tests.deployments.app.processes import below
from tests.deployments.app.reconnecting import PATIENCE_S, Client
from tests.deployments.fakes import token_at, write_fake_model
from tests.deployments.streams.clients import RESUMABLE

ROOT = Path(__file__).parents[3]
NUM_TOKENS = 800
"""Four seconds of the fake engine."""


@dataclass
class Application:
    url: str
    pid: int
    text: TextModel

    def gateways(self) -> list[int]:
        return [pid for pid, command in below(self.pid).items() if ":Gateway" in command]

    def metric(self, name: str) -> float:
        lines = httpx.get(f"{self.url}/metrics", timeout=10).text.splitlines()
        return sum(float(line.rpartition(" ")[2]) for line in lines if re.match(rf"{name}(\{{|\s)", line))

    def text_of(self, prompt: str, count: int) -> str:
        """What the fake engine generates."""
        request = Request("", tuple(self.text.encode(prompt)), SamplingParams())
        return self.text.decode([token_at(request, 0, index) for index in range(count)])


@pytest.fixture(scope="module")
def application(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Application]:
    model = tmp_path_factory.mktemp("model")
    write_fake_model(model)
    (port,) = free_ports(1)
    command = [sys.executable, "-m", "tests.deployments.app.server", str(model), str(port), "2"]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdin is not None and process.stdout is not None
            assert any(line == "ready\n" for line in process.stdout), "the application did not start"
            found = Application(f"http://127.0.0.1:{port}", process.pid, TextModel.load(model))
            _until(lambda: len(found.gateways()) == 2)
            yield found
        finally:
            process.stdin.close()  # type: ignore[union-attr]
            process.wait(60)


def _until(condition: Any) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, "it did not come true in time"
        time.sleep(0.1)


def clients(application: Application, headers: dict[str, str]) -> list[Client]:
    """Two of each kind."""
    base = {"model": "fake", "stream": True, "max_tokens": NUM_TOKENS, "stream_options": {"include_usage": True}}
    chat = {**base, "messages": [{"role": "user", "content": "hello"}]}
    # Letters repeat after 26: from the 21st on everything is held back, for one and a half seconds, then it matches.
    stop = application.text_of("hello", 300)[20:]
    kinds: dict[str, tuple[str, dict[str, Any]]] = {
        "greedy": ("/v1/chat/completions", {**chat, "temperature": 0}),
        "seeded": ("/v1/chat/completions", {**chat, "n": 2, "seed": 7, "max_tokens": NUM_TOKENS // 2}),
        "unseeded": ("/v1/completions", {**base, "prompt": "hello there"}),
        "stopped": ("/v1/chat/completions", {**chat, "stop": [stop]}),
    }
    return [
        Client(application.url, path, body, f"{name}-{number}", headers)
        for name, (path, body) in kinds.items()
        for number in range(2)
    ]


async def undisturbed(application: Application, headers: dict[str, str]) -> dict[str, list[str]]:
    done = await asyncio.gather(*(client.run() for client in clients(application, headers)))
    assert all(client.connections == 1 for client in done)
    return {client.name: client.data for client in done}


async def disturbed(
    application: Application, headers: dict[str, str], how: signal.Signals
) -> tuple[dict[str, list[str]], int, int]:
    """What the clients got in the end, how many of them had to reconnect, and whom it hit."""
    running = [asyncio.create_task(client.run()) for client in clients(application, headers)]
    await asyncio.sleep(1.0)
    victim = application.gateways()[0]
    kill(victim, how)
    done = await asyncio.gather(*running)
    return {client.name: client.data for client in done}, sum(client.connections > 1 for client in done), victim


def test_the_streams_of_a_killed_gateway_end_at_another_one_as_if_nothing_had_happened(
    application: Application,
) -> None:
    wanted = asyncio.run(undisturbed(application, {}))
    assert all(data[-1] == "[DONE]" and '"usage":{"prompt_tokens"' in data[-2] for data in wanted.values())
    assert application.metric("manta:resumed_streams_total") == 0
    got, num_cut, _ = asyncio.run(disturbed(application, {}, signal.SIGKILL))
    assert num_cut > 0, "no stream was at the gateway that was killed"
    assert got == wanted
    _until(lambda: len(application.gateways()) == 2)
    _until(lambda: application.metric("manta:resumed_streams_total") >= num_cut)


@pytest.mark.parametrize("headers", [RESUMABLE, {}], ids=["lose-patience", "wait"])
def test_the_streams_of_a_stopped_gateway_go_on(application: Application, headers: dict[str, str]) -> None:
    """Clients that may leave and come back do so; all others wait until the gateway is ended, as it does not answer."""
    wanted = asyncio.run(undisturbed(application, headers))
    victim = 0
    try:
        got, num_cut, victim = asyncio.run(disturbed(application, headers, signal.SIGSTOP))
    finally:
        if victim:
            with contextlib.suppress(ProcessLookupError):
                kill(victim, signal.SIGCONT)
    assert num_cut > 0, "no stream was at the gateway that was stopped"
    assert got == wanted
    _until(lambda: len(application.gateways()) == 2)


def test_an_orphan_is_generated_before_anybody_comes_back(application: Application) -> None:
    adopted = application.metric("manta:adopted_streams_total")

    body = {"model": "fake", "prompt": "hello", "stream": True}
    # Whichever gateway has it: all of them end at once.
    client = Client(application.url, "/v1/completions", {**body, "max_tokens": 3 * NUM_TOKENS}, "orphan")

    async def orphan() -> None:
        running = asyncio.create_task(client.run())
        while len(client.data) < 100:
            await asyncio.sleep(0.05)
        for gateway in application.gateways():
            kill(gateway, signal.SIGKILL)
        running.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await running

    asyncio.run(orphan())
    _until(lambda: _ready(application.url))
    _until(lambda: application.metric("manta:adopted_streams_total") > adopted)
    time.sleep(3 * NUM_TOKENS * 0.005)
    began = time.monotonic()
    asyncio.run(client.run())
    assert time.monotonic() - began < 3.0, "it had not gone on"
    text = "".join(re.findall(r'"text":"(\w+)"', "".join(client.data)))
    assert text == application.text_of("hello", 3 * NUM_TOKENS)


def _ready(url: str) -> bool:
    try:
        return httpx.get(f"{url}/ready", timeout=5).status_code == 200
    except httpx.TransportError:
        return False


def test_the_sdk_notices_nothing(application: Application) -> None:
    with openai.OpenAI(base_url=f"{application.url}/v1", api_key="none", max_retries=0, timeout=60) as sdk:
        stream = sdk.completions.create(
            model="fake",
            prompt="hello",
            max_tokens=50,
            stream=True,
            extra_headers=RESUMABLE,
            stream_options={"include_usage": True},
        )
        chunks = list(stream)
    assert "".join(chunk.choices[0].text for chunk in chunks if chunk.choices) == application.text_of("hello", 50)
    assert chunks[-1].usage is not None and chunks[-1].usage.completion_tokens == 50
