"""The application in Ray, over HTTP: two replicas with engines that generate known letters at a known pace."""

import asyncio
import signal
import time
from os import kill

import openai
import pytest

from tests.deployments.app.application import Application, scenario, stream_text
from tests.deployments.fakes import CRASH_PROMPT

NOTICED_S = 5.0
"""Within which a replica that says nothing has to be found, and its streams have to go on elsewhere."""
MARGIN_S = 1.0
"""For processes that share their cores with everything else that is tested."""


@scenario
async def test_stream_brings_every_token_in_order_and_the_usage(application: Application) -> None:
    stream = await application.client().completions.create(
        model="fake", prompt="hello", max_tokens=50, stream=True, stream_options={"include_usage": True}
    )
    chunks = [chunk async for chunk in stream]
    assert "".join(chunk.choices[0].text for chunk in chunks if chunk.choices) == application.expected("hello", 50)
    usage = chunks[-1].usage
    assert usage is not None and (usage.prompt_tokens, usage.completion_tokens) == (5, 50)


@scenario
async def test_chat_with_several_samples(application: Application) -> None:
    answer = await application.client().chat.completions.create(
        model="fake", messages=[{"role": "user", "content": "hello"}], max_tokens=20, n=3
    )
    assert [choice.message.content for choice in answer.choices] == [
        application.expected("hello", 20, sample) for sample in range(3)
    ]


@scenario
async def test_32_streams_at_once_are_right_and_shared_between_the_replicas(application: Application) -> None:
    client = application.client()

    async def one(prompt: str) -> str:
        stream = await client.completions.create(model="fake", prompt=prompt, max_tokens=600, stream=True)
        return await stream_text(stream)

    prompts = [f"prompt {chr(97 + index % 26)}{index:02}" for index in range(32)]
    answers = [asyncio.ensure_future(one(prompt)) for prompt in prompts]
    await application.until(lambda: sum(application.metric("manta:num_requests_running")) == 32)
    running = application.metric("manta:num_requests_running")
    assert len(running) == 2
    assert all(abs(count - 16) <= 2 for count in running), running
    for prompt, answer in zip(prompts, await asyncio.gather(*answers), strict=True):
        assert answer == application.expected(prompt, 600)


@scenario
async def test_disconnected_client_leaves_nothing_running(application: Application) -> None:
    await application.until(lambda: sum(application.metric("manta:num_requests_running")) == 0)
    generated = sum(application.metric("manta:generation_tokens_total"))
    stream = await application.client().completions.create(model="fake", prompt="hello", max_tokens=9000, stream=True)
    await anext(aiter(stream))
    await application.until(lambda: sum(application.metric("manta:num_requests_running")) == 1)
    await stream.close()
    await application.until(lambda: sum(application.metric("manta:num_requests_running")) == 0, 5.0)
    assert sum(application.metric("manta:generation_tokens_total")) - generated < 3000


@scenario
async def test_errors_are_those_of_the_api(application: Application) -> None:
    client = application.client()
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        await client.completions.create(model="other", prompt="hello")
    with pytest.raises(openai.BadRequestError, match="temperature"):
        await client.completions.create(model="fake", prompt="hello", temperature=-1)
    with pytest.raises(openai.BadRequestError) as refused:
        await client.completions.create(model="fake", prompt="hello" * 3000)
    assert refused.value.code == "context_length_exceeded"


@scenario
async def test_streams_of_a_killed_replica_go_on_elsewhere(application: Application) -> None:
    client = application.client()

    async def one(prompt: str) -> str:
        stream = await client.completions.create(model="fake", prompt=prompt, max_tokens=400, stream=True)
        return await stream_text(stream)

    async def three(prompt: str) -> list[str]:
        answer = await client.completions.create(model="fake", prompt=prompt, max_tokens=400, n=3)
        assert answer.usage is not None and answer.usage.completion_tokens == 3 * 400
        return [choice.text for choice in answer.choices]

    prompts = [f"prompt {letter}" for letter in "abcdefgh"]
    answers = [asyncio.ensure_future(one(prompt)) for prompt in prompts]
    samples = [asyncio.ensure_future(three(prompt)) for prompt in prompts[:4]]
    await asyncio.sleep(0.5)
    kill(application.replicas()[0], signal.SIGKILL)
    assert await asyncio.gather(*answers) == [application.expected(prompt, 400) for prompt in prompts]
    assert await asyncio.gather(*samples) == [
        [application.expected(prompt, 400, sample) for sample in range(3)] for prompt in prompts[:4]
    ]
    await application.until(lambda: len(application.replicas()) == 2, 60.0)


@scenario
async def test_streams_of_a_stopped_replica_go_on_elsewhere_and_it_is_replaced(application: Application) -> None:
    client = application.client()
    gaps = []

    async def one(prompt: str) -> str:
        stream = await client.completions.create(model="fake", prompt=prompt, max_tokens=2000, stream=True)
        text, last = "", time.monotonic()
        async for chunk in stream:
            gaps.append(time.monotonic() - last)
            last = time.monotonic()
            text += chunk.choices[0].text
        return text

    prompts = [f"prompt {letter}" for letter in "abcdefgh"]
    answers = [asyncio.ensure_future(one(prompt)) for prompt in prompts]
    await asyncio.sleep(0.5)
    stopped = application.replicas()[0]
    kill(stopped, signal.SIGSTOP)
    assert await asyncio.gather(*answers) == [application.expected(prompt, 2000) for prompt in prompts]
    assert 2.0 < max(gaps) < NOTICED_S + MARGIN_S, (
        "a stopped replica was not noticed in time, or none of these streams was on it"
    )
    await application.until(lambda: stopped not in application.replicas(), 60.0)
    await application.until(lambda: len(application.replicas()) == 2, 60.0)


@scenario
async def test_a_request_that_ends_every_replica_fails_alone(application: Application) -> None:
    client = application.client()

    async def one(prompt: str) -> str:
        stream = await client.completions.create(model="fake", prompt=prompt, max_tokens=1000, stream=True)
        return await stream_text(stream)

    prompts = [f"prompt {letter}" for letter in "abcdefgh"]
    answers = [asyncio.ensure_future(one(prompt)) for prompt in prompts]
    await asyncio.sleep(0.5)
    with pytest.raises(openai.InternalServerError, match="4 replicas in a row failed with this request"):
        await client.completions.create(model="fake", prompt=list(CRASH_PROMPT), max_tokens=5)
    assert await asyncio.gather(*answers) == [application.expected(prompt, 1000) for prompt in prompts]
    await application.until(lambda: len(application.replicas()) == 2, 60.0)
