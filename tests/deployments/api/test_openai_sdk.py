"""The OpenAI SDK, unchanged, against the API over a real socket."""

import asyncio
from collections.abc import AsyncIterator

import openai
import pytest
from openai import AsyncOpenAI

from deployments.backend import GenerationFailed, NotReady
from tests.deployments.api.serving import serving

pytestmark = pytest.mark.anyio

HI = [{"role": "user", "content": "hi"}]
ANSWER = "hello to the moon"


@pytest.fixture
async def sdk(make_app) -> AsyncIterator[AsyncOpenAI]:
    with serving(make_app()) as url:
        async with AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=10) as sdk:
            yield sdk


async def test_chat(sdk):
    answer = await sdk.chat.completions.create(model="tiny", messages=HI, temperature=0.5, user="someone")
    assert answer.choices[0].message.content == ANSWER
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


async def test_streamed_chat_with_usage(sdk):
    options = {"include_usage": True}
    chunks = [
        chunk
        async for chunk in await sdk.chat.completions.create(
            model="tiny", messages=HI, stream=True, stream_options=options
        )
    ]
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == ANSWER
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens > 0


async def test_the_sdks_own_stream_accumulator_accepts_the_chunks(sdk, backend):
    backend.script.answers = ("one", "two three")
    async with sdk.chat.completions.stream(model="tiny", messages=HI, n=2, logprobs=True) as stream:
        async for _ in stream:
            pass
        whole = await stream.get_final_completion()
    assert [choice.message.content for choice in whole.choices] == ["one", "two three"]
    assert "".join(entry.token for entry in whole.choices[1].logprobs.content) == "two three"


async def test_three_samples_with_logprobs(sdk):
    answer = await sdk.chat.completions.create(model="tiny", messages=HI, n=3, logprobs=True, top_logprobs=2)
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert all(len(entry.top_logprobs) == 2 for entry in answer.choices[2].logprobs.content)


async def test_completions(sdk, text):
    answer = await sdk.completions.create(model="tiny", prompt=["a", "b"], logprobs=1, echo=True)
    assert [choice.text for choice in answer.choices] == ["a" + ANSWER, "b" + ANSWER]
    assert answer.choices[0].logprobs.tokens[0] == "a"
    assert answer.choices[0].logprobs.token_logprobs[0] is None
    stream = await sdk.completions.create(model="tiny", prompt=text.encode("a"), stream=True, max_tokens=50)
    assert "".join([chunk.choices[0].text async for chunk in stream]) == ANSWER


async def test_vllms_parameters_pass_as_extra_body(sdk, backend):
    await sdk.chat.completions.create(model="tiny", messages=HI, extra_body={"top_k": 5, "min_p": 0.1})
    assert (backend.requests[0].params.top_k, backend.requests[0].params.min_p) == (5, 0.1)


async def test_models(sdk):
    assert [model.id async for model in sdk.models.list()] == ["tiny"]
    assert (await sdk.models.retrieve("tiny")).owned_by == "manta"


async def test_errors_become_the_sdks_exceptions(sdk, backend):
    create = sdk.chat.completions.create
    with pytest.raises(openai.BadRequestError) as bad:
        await create(model="tiny", messages=HI, temperature=9)
    assert bad.value.param == "temperature"
    assert bad.value.type == "invalid_request_error"
    with pytest.raises(openai.BadRequestError) as long:
        await create(model="tiny", messages=HI, max_tokens=100_000)
    assert long.value.code == "context_length_exceeded"
    with pytest.raises(openai.NotFoundError) as missing:
        await create(model="other", messages=HI)
    assert missing.value.code == "model_not_found"
    backend.script.fail_after, backend.script.error = 0, NotReady("draining")
    with pytest.raises(openai.InternalServerError) as busy:
        await create(model="tiny", messages=HI, stream=True)
    assert busy.value.status_code == 503


async def test_a_failure_within_a_stream_raises_in_the_sdk(sdk, backend):
    backend.script.fail_after, backend.script.error = 3, GenerationFailed("the replica died")
    seen = ""
    with pytest.raises(openai.APIError, match="the replica died"):
        async for chunk in await sdk.chat.completions.create(model="tiny", messages=HI, stream=True):
            seen += chunk.choices[0].delta.content or ""
    assert ANSWER.startswith(seen)
    assert seen


async def test_leaving_an_sdk_stream_aborts_the_generation(sdk, backend):
    backend.script.delay = 0.02
    backend.script.answers = ("one two three four five " * 8,)
    stream = await sdk.chat.completions.create(model="tiny", messages=HI, stream=True)
    async for _ in stream:
        break
    await stream.close()
    async with asyncio.timeout(5):
        while not backend.closed_at:
            await asyncio.sleep(0.01)
    assert backend.emitted < 20
