"""Replicas and gateways that are to go, under streams: nothing is dropped, and the end is bounded in time."""

import asyncio
import re
import socket
import time
from dataclasses import dataclass
from pathlib import Path

import httpx
import openai

from tests.deployments.app.application import Application, scenario, stream_text
from tests.deployments.app.processes import below
from tests.deployments.fakes import OFFSET_FILE, write_fake_model
from tests.deployments.streams.clients import RESUMABLE

LONG = 3000
"""Tokens of a stream that lasts longer than a replica may take to drain: at 5 ms each, 15 s."""
DRAIN_S = 10.0


async def begin(application: Application, count: int, max_tokens: int) -> dict[str, "asyncio.Task[str]"]:
    """As many streams as are wanted, running; by their prompts."""
    client = application.client()

    async def one(prompt: str) -> str:
        stream = await client.completions.create(model="fake", prompt=prompt, max_tokens=max_tokens, stream=True)
        return await stream_text(stream)

    answers = {prompt: asyncio.ensure_future(one(prompt)) for prompt in (f"prompt {n:02}" for n in range(count))}
    await application.until(lambda: sum(application.metric("manta:num_requests_running")) == count)
    return answers


async def finish(application: Application, answers: dict[str, "asyncio.Task[str]"], max_tokens: int) -> None:
    for prompt, answer in answers.items():
        assert await answer == application.expected(prompt, max_tokens)


AWAY = "503"


@dataclass(frozen=True, slots=True)
class KeptAnswer:
    """A streamed answer that a client has had to the end, and may come back for."""

    url: str
    text: str

    def again(self) -> str:
        """Its events, or the status of an error."""
        answer = httpx.get(self.url, timeout=20)
        return answer.text if answer.status_code == 200 else str(answer.status_code)


async def kept_answer(application: Application) -> KeptAnswer:
    body = {"model": "fake", "prompt": "kept", "max_tokens": 20, "stream": True}
    async with httpx.AsyncClient(headers=RESUMABLE) as client:
        answer = await client.post(f"{application.url}/v1/completions", json=body, timeout=20)
    found = KeptAnswer(f"{application.url}/v1/streams/{answer.headers['x-manta-stream-id']}", answer.text)
    assert await asyncio.to_thread(found.again) == answer.text
    return found


def continued(application: Application, reason: str) -> float:
    """How many streams have gone on elsewhere for a reason."""
    (count,) = application.metric(f'manta:request_continuations_total{{[^}}]*reason="{reason}"[^}}]*}}')
    return count


@scenario
async def test_scaling_down_hands_streams_over_and_ends_long_before_they_do(application: Application) -> None:
    answers = await begin(application, 8, LONG)
    before = set(application.replicas())
    moved, lost = continued(application, "moved"), continued(application, "lost")
    begun = time.monotonic()
    await asyncio.to_thread(application.deploy, num_replicas=1)
    await application.until(lambda: len(application.replicas()) == 1)
    assert time.monotonic() - begun < DRAIN_S
    assert set(application.replicas()) < before, "the other replica stays"
    assert not any(answer.done() for answer in answers.values())
    await finish(application, answers, LONG)
    assert (continued(application, "moved"), continued(application, "lost")) == (moved + 4, lost)
    await asyncio.to_thread(application.deploy, num_replicas=2)
    await application.until(lambda: len(application.replicas()) == 2)


def gateways_of_the_proxy(application: Application) -> set[str]:
    """The addresses to which HAProxy sends requests, as the process says that takes new connections."""
    (directory,) = {
        Path(found).parent for found in re.findall(r"\S+/haproxy\.cfg", " ".join(below(application.pid).values()))
    }
    with socket.socket(socket.AF_UNIX) as admin:
        admin.connect(str(directory / "admin.sock"))
        admin.sendall(b"show servers state\n")
        _, names, *servers = admin.makefile().read().split("\n")
    states = [dict(zip(names.split()[1:], server.split(), strict=True)) for server in servers if server]
    return {f"http://{s['srv_addr']}:{s['srv_port']}" for s in states if "Gateway" in s["srv_name"]}


async def answers_until_the_proxy_has_another(application: Application) -> int:
    """Asks the only gateway over a connection that is kept open, as HAProxy does; returns how often it has answered."""
    (gateway,) = gateways_of_the_proxy(application)
    answers = 0
    async with httpx.AsyncClient(base_url=gateway, timeout=20) as client:
        while not await asyncio.to_thread(gateways_of_the_proxy, application) - {gateway}:
            await client.get("/health")
            answers += 1
            await asyncio.sleep(0.02)
    return answers


@scenario
async def test_a_new_version_of_everything_drops_nothing(application: Application) -> None:
    answers = await begin(application, 8, LONG)
    old, gateways = set(application.replicas()), set(application.gateways())
    refused: list[Exception] = []
    served = 0
    over = asyncio.Event()
    complete = await kept_answer(application)
    found: set[str] = set()
    asked = asyncio.create_task(answers_until_the_proxy_has_another(application))

    async def keep_asking() -> None:
        nonlocal served
        client = application.client()
        while not over.is_set():
            try:
                answer = await client.completions.create(model="fake", prompt="hello", max_tokens=5)
                assert answer.choices[0].text == application.expected("hello", 5)
                served += 1
            except openai.OpenAIError as error:
                refused.append(error)
            await asyncio.sleep(0.05)

    async def keep_coming_back() -> None:
        while not over.is_set():
            found.add(await asyncio.to_thread(complete.again))
            await asyncio.sleep(0.05)

    asking = asyncio.gather(keep_asking(), keep_coming_back())
    await asyncio.to_thread(application.deploy, args={"engine": {"model": application.model, "max_model_len": 5000}})
    await application.until(lambda: not old & set(application.replicas()), 40.0)
    assert set(application.gateways()) - gateways, "the gateways are new as well"
    await finish(application, answers, LONG)
    over.set()
    await asking
    assert refused == [] and served > 50
    assert await asked > 10, "a gateway answers until nobody asks it any more"
    assert await asyncio.to_thread(complete.again) == complete.text
    assert found <= {complete.text, AWAY}, "an answer that is complete is kept by whoever keeps streams"
    await application.until(lambda: not gateways & set(application.gateways()), 40.0)


@scenario
async def test_the_only_replica_is_replaced_in_bounded_time_and_its_streams_go_on(application: Application) -> None:
    await asyncio.to_thread(application.deploy, num_replicas=1)
    await application.until(lambda: len(application.replicas()) == 1)
    answers = await begin(application, 4, LONG)
    old = set(application.replicas())
    version = {"engine": {"model": application.model, "max_model_len": 4000}}
    deployed = asyncio.create_task(asyncio.to_thread(application.deploy, args=version))
    await application.until(lambda: not old & set(application.replicas()), 2 * DRAIN_S)
    assert not any(answer.done() for answer in answers.values())
    await deployed
    await finish(application, answers, LONG)


@scenario
async def test_every_answer_is_one_models_when_the_model_is_replaced_by_another(application: Application) -> None:
    other, offset, length = Path(application.model) / "other", 5, 1500
    other.mkdir()
    write_fake_model(other)
    (other / OFFSET_FILE).write_text(str(offset))
    answers = await begin(application, 8, length)
    whole = {application.expected("hello", 5): "old", application.expected("hello", 5, offset=offset): "new"}
    served: list[str] = []
    refused: list[int | None] = []
    over = asyncio.Event()

    async def keep_asking() -> None:
        client = application.client()
        while not over.is_set():
            try:
                answer = await client.completions.create(model="fake", prompt="hello", max_tokens=5)
                served.append(whole[answer.choices[0].text])
            except openai.APIStatusError as error:
                refused.append(error.status_code)
            await asyncio.sleep(0.05)

    asking = asyncio.ensure_future(keep_asking())
    begun, ended = time.monotonic(), dict.fromkeys(answers, 0.0)
    for prompt, answer in answers.items():
        answer.add_done_callback(lambda _, prompt=prompt: ended.update({prompt: time.monotonic()}))
    await asyncio.to_thread(application.deploy, args={"engine": {"model": str(other)}})
    for prompt, answer in answers.items():
        try:
            assert await answer == application.expected(prompt, length)
        except openai.APIError as error:
            # Nobody else can go on with it, and the last replica of its model does not wait for ever.
            assert "has been replaced by another one" in error.message
            assert ended[prompt] - begun > DRAIN_S
    await application.until(lambda: "new" in served[-1:], 40.0)
    over.set()
    await asking
    assert "old" in served
    assert set(refused) <= {503} and len(refused) < 20, "who comes while the model changes is told to come back"
    await asyncio.to_thread(application.deploy, args={"engine": {"model": application.model}})
