"""Streams that outlive their gateway, over the real HTTP application, a scripted backend and the store's table."""

import asyncio
import json
from dataclasses import replace
from typing import Any

import pytest

from deployments.api import streams
from deployments.api.generation import READ_AHEAD
from deployments.backend import GenerationFailed
from tests.deployments.streams.clients import ANSWERS, RESUMABLE, USAGE, ask, come_back, data_of, kept, until
from tests.deployments.streams.gateways import CHAT, COMPLETIONS, Gateways

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("fast")]


KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "greedy chat": (CHAT, {"temperature": 0, **USAGE}),
    "seeded chat of two": (CHAT, {"n": 2, "seed": 7, **USAGE}),
    "unseeded chat of three": (CHAT, {"n": 3}),
    "chat, logprobs": (CHAT, {"n": 2, "logprobs": True, "top_logprobs": 2}),
    "chat, usage all along": (
        CHAT,
        {"n": 2, "stream_options": {"include_usage": True, "continuous_usage_stats": True}},
    ),
    "stop strings": (CHAT, {"n": 2, "stop": ["the moon", "two"], **USAGE}),
    "length": (COMPLETIONS, {"max_tokens": 4}),
    "several prompts": (COMPLETIONS, {"prompt": ["a", "bc", "d"], "n": 2, "max_tokens": 20, **USAGE}),
    "echo, logprobs": (COMPLETIONS, {"echo": True, "logprobs": 2, "max_tokens": 20, "n": 2}),
    "token ids": (COMPLETIONS, {"return_token_ids": True, "max_tokens": 20}),
}


@pytest.mark.parametrize("kind", KINDS)
async def test_what_a_killed_gateway_began_another_one_ends_with_the_same_bytes(gateways: Gateways, kind: str) -> None:
    path, changes = KINDS[kind]
    whole = await ask(gateways, 0, path, **changes).read()
    assert whole[-1].endswith("data: [DONE]\n\n")
    if "seed" not in kind:
        assert len(whole) > 4
    for count in {1, 2, len(whole) // 2, len(whole) - 1}:
        dying = await gateways.add()
        client = ask(gateways, dying, path, **changes)
        first = await client.read(count)
        await kept(gateways, client)
        gateways.stop(dying)
        await client.leave()
        rest = await come_back(gateways, 1, first[-1]).read()
        assert data_of(first + rest) == data_of(whole)


async def test_a_resumable_stream_can_be_resumed_from_its_first_event_on(gateways: Gateways) -> None:
    for _ in range(5):
        client = ask(gateways, 0, headers=RESUMABLE)
        await client.read(1)
        assert gateways.store.knows(client.stream_id)


async def test_an_orphan_goes_on_before_its_client_comes_back(gateways: Gateways) -> None:
    whole = await ask(gateways, 0, n=2, logprobs=True).read()
    dying = await gateways.add()
    client = ask(gateways, dying, n=2, logprobs=True)
    first = await client.read(5)
    stream_id = client.stream_id
    await until(lambda: gateways.store.num_entries(stream_id) >= 4)
    gateways.stop(dying)
    await client.leave()
    asked = len(gateways.backend.requests)
    gateways.lapse()
    await until(lambda: gateways.store.is_complete(stream_id))
    assert len(gateways.backend.requests) == asked + 1
    assert any(gateways.backend.requests[-1].given), "it was generated again from its first token"
    assert gateways.counted("manta:adopted_streams_total") == 1
    rest = await come_back(gateways, 1, first[-1]).read()
    assert data_of(first + rest) == data_of(whole)
    assert len(gateways.backend.requests) == asked + 1, "a complete answer is not generated again"


async def test_a_resumable_stream_goes_on_while_its_client_is_away(gateways: Gateways) -> None:
    whole = await ask(gateways, 0).read()
    client = ask(gateways, 0, headers=RESUMABLE)
    first = await client.read(3)
    await client.leave()
    emitted = gateways.backend.emitted
    await until(lambda: gateways.backend.emitted > emitted)
    second = await (back := come_back(gateways, 0, first[-1])).read(3)
    await back.leave()
    rest = await come_back(gateways, 0, second[-1]).read()
    assert data_of(first + second + rest) == data_of(whole)
    assert len(gateways.backend.requests) == 2, "nothing was generated twice"
    assert gateways.counted("manta:resumed_streams_total") == 2


async def test_a_client_that_comes_back_to_another_gateway_takes_its_stream_along(gateways: Gateways) -> None:
    whole = await ask(gateways, 0).read()
    client = ask(gateways, 0, headers=RESUMABLE)
    first = await client.read(3)
    await client.leave()
    closed = len(gateways.backend.closed_at)
    rest = await come_back(gateways, 1, first[-1]).read()
    assert data_of(first + rest) == data_of(whole)
    await until(lambda: len(gateways.backend.closed_at) == closed + 2)


async def test_the_latest_connection_of_a_client_gets_the_stream_and_an_older_one_is_told(gateways: Gateways) -> None:
    gateways.backend.script.answers = ("one two three four five " * 8,)
    for headers in ({}, RESUMABLE):
        for gateway in (0, 1):
            older = ask(gateways, 0, headers=headers)
            first = await older.read(3)
            await kept(gateways, older)
            newer = come_back(gateways, gateway, first[-1])
            second = await newer.read(2)
            left = await older.read()
            assert json.loads(left[-1].removeprefix("data: "))["error"]["code"] == "stream_taken_over"
            assert not any("[DONE]" in event for event in left)
            rest = await newer.read()
            assert data_of(first + second + rest)[-1] == "data: [DONE]"


async def test_a_gateway_that_was_only_slow_keeps_the_stream_that_its_client_still_reads(gateways: Gateways) -> None:
    gateways.backend.script.answers = ("one two three four five " * 8,)
    slow = await gateways.add()
    client = ask(gateways, slow)
    first = await client.read(3)
    await kept(gateways, client)
    gateways.stop(slow)
    gateways.lapse()
    await until(lambda: len(gateways.backend.requests) == 2)
    await gateways.wake(slow)
    await until(lambda: len(gateways.backend.closed_at) == 1)
    rest = await client.read()
    assert data_of(first + rest)[-1] == "data: [DONE]"
    assert len(gateways.backend.closed_at) == 2, "the one that had adopted it has given it up"


async def test_a_failure_that_nobody_was_there_to_hear_is_told_to_who_comes_back(gateways: Gateways) -> None:
    script = gateways.backend.script
    script.fail_after, script.error = 6, GenerationFailed("the kernel failed")
    client = ask(gateways, 0, headers=RESUMABLE)
    first = await client.read(3)
    await client.leave()
    await until(lambda: gateways.backend.closed_at)
    rest = await come_back(gateways, 0, first[-1]).read()
    assert json.loads(rest[-1].removeprefix("data: "))["error"]["message"] == "the kernel failed"
    assert not any("[DONE]" in event for event in rest)


async def test_choices_are_in_the_same_order_however_they_arrive(
    gateways: Gateways, monkeypatch: pytest.MonkeyPatch
) -> None:
    gateways.backend.script.answers = ANSWERS
    whole = await ask(gateways, 0, n=3, **USAGE).read()
    emissions = type(gateways.backend)._emissions

    def one_after_the_other(self: Any, request: Any) -> Any:
        return iter(sorted(emissions(self, request), key=lambda emission: -emission.sample_index))

    monkeypatch.setattr(type(gateways.backend), "_emissions", one_after_the_other)
    assert data_of(await ask(gateways, 0, n=3, **USAGE).read()) == data_of(whole)


async def test_a_stream_goes_on_as_what_it_began_as_after_the_model_was_replaced(gateways: Gateways) -> None:
    whole = await ask(gateways, 0).read()
    dying = await gateways.add()
    client = ask(gateways, dying)
    first = await client.read(3)
    await kept(gateways, client)
    gateways.stop(dying)
    await client.leave()
    before = gateways.backend.requests[-1]
    changes = {"name": "other", "path": "/models/other", "identity": "tiny-2", "max_model_len": 100}
    gateways.backend.model = replace(gateways.backend.model, **changes)
    fresh = await gateways.add()
    rest = await come_back(gateways, fresh, first[-1]).read()
    assert data_of(first + rest) == data_of(whole)
    after = gateways.backend.requests[-1]
    assert (after.model, after.params) == (before.model, before.params)
    assert after.model == "tiny-1"
    assert set(gateways.loaded) == {"/models/tiny"}, "it was written with another tokenizer"


async def test_a_stream_that_had_not_begun_waits_for_a_replica_at_its_new_gateway(
    gateways: Gateways, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streams, "RETRY_S", 0.01)
    whole = await ask(gateways, 0).read()
    await until(lambda: len(gateways.store.table) == 0)
    gateways.backend.script.delay = 5.0
    dying = await gateways.add()
    client = ask(gateways, dying)
    await until(lambda: len(gateways.store.table) == 1)
    gateways.stop(dying)
    await client.leave()
    asked = len(gateways.backend.requests)
    gateways.backend.is_ready, gateways.backend.script.delay = False, 0.002
    gateways.lapse()
    await until(lambda: gateways.counted("manta:adopted_streams_total"))
    await asyncio.sleep(0.05)
    assert len(gateways.backend.requests) == asked
    gateways.backend.is_ready = True
    (stream_id,) = gateways.store.table._rows
    await until(lambda: gateways.store.is_complete(stream_id))
    rest = await gateways.connect(1, f"/v1/streams/{stream_id}").read()
    assert data_of(rest) == data_of(whole)


async def test_what_is_generated_for_several_prompts_waits_for_a_client_that_does_not_read(gateways: Gateways) -> None:
    gateways.backend.script.answers = ("one two three four five " * 8,)
    gateways.backend.script.delay = 0.0
    client = ask(gateways, 0, COMPLETIONS, prompt=["a", "bc"], n=4, max_tokens=200)
    await client.read(1)
    for _ in range(3000):
        await asyncio.sleep(0)
    assert gateways.backend.emitted < 2 * READ_AHEAD
    assert (await client.read())[-1].endswith("data: [DONE]\n\n")
    assert gateways.backend.emitted > 4 * READ_AHEAD
