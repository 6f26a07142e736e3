"""Streams that outlive their gateway, over the real HTTP application, a scripted backend and the store's table."""

import asyncio
import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from deployments.api import streams
from deployments.api.generation import READ_AHEAD
from deployments.backend import GenerationFailed, NotReady
from deployments.streams import keeper, messages
from tests.deployments.api.tiny import Script, text_model
from tests.deployments.streams.gateways import CHAT, COMPLETIONS, Connection, Gateways

pytestmark = pytest.mark.anyio

ANSWERS = ("hello to the moon", "one two three four five", "Grüße über Häuser 日本語のテキスト 😀")
RESUMABLE = {"X-Manta-Resumable": "true"}
USAGE = {"stream_options": {"include_usage": True}}
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


@pytest.fixture(autouse=True)
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keeper, "PERIOD_S", 0.01)
    monkeypatch.setattr(keeper, "LEAST_PERIOD_S", 0.005)
    monkeypatch.setattr(keeper, "IDLE_PERIOD_S", 0.02)
    # The second in which an answer was created stands in it.
    monkeypatch.setattr(messages.time, "time", lambda: 1_700_000_000.0)


@pytest.fixture
async def gateways() -> Gateways:
    found = Gateways(Script(text_model(), ANSWERS, delay=0.002))
    for _ in range(2):
        await found.add()
    return found


def body_of(path: str, **changes: Any) -> dict[str, Any]:
    asked = {"messages": [{"role": "user", "content": "hi"}]} if path == CHAT else {"prompt": "hi"}
    return {"model": "tiny", "stream": True, **asked, **changes}


def ask(gateways: Gateways, gateway: int, path: str = CHAT, headers: Any = (), **changes: Any) -> Connection:
    return gateways.connect(gateway, path, body_of(path, **changes), {"X-Request-Id": "same", **dict(headers)})


def come_back(gateways: Gateways, gateway: int, last: str) -> Connection:
    """The client of that last event reconnects."""
    event_id = last.split("\n")[0].removeprefix("id: ")
    return gateways.connect(gateway, f"/v1/streams/{event_id.split(':')[0]}", headers={"Last-Event-ID": event_id})


def data_of(events: list[str]) -> list[str]:
    """The data, after a look at the ids."""
    lines = [event.split("\n") for event in events]
    numbers = [int(line[0].rpartition(":")[2]) for line in lines]
    assert numbers == list(range(1, len(numbers) + 1)), (
        "events are numbered in order, none is missing, none comes twice"
    )
    assert len({line[0].rpartition(":")[0] for line in lines}) == 1
    return [line[1] for line in lines]


async def until(condition: Callable[[], Any]) -> None:
    async with asyncio.timeout(5):
        while not condition():
            await asyncio.sleep(0.002)


async def kept(gateways: Gateways, client: Connection) -> None:
    """Returns when the store knows the client's stream."""
    await until(lambda: gateways.store.knows(client.stream_id))


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


async def test_a_plain_client_that_leaves_frees_the_engine_and_its_stream_is_gone(gateways: Gateways) -> None:
    gateways.backend.script.answers = ("one two three four five " * 8,)
    client = ask(gateways, 0)
    first = await client.read(3)
    await client.leave()
    assert len(gateways.backend.closed_at) == 1
    await until(lambda: len(gateways.store.table) == 0)
    for gateway in (0, 1):
        back = come_back(gateways, gateway, first[-1])
        error = json.loads((await back.read())[0])["error"]
        assert (back.status, error["code"]) == (404, "stream_not_found")


async def test_a_client_that_stays_away_for_longer_than_the_grace_period_finds_nothing() -> None:
    gateways = Gateways(Script(text_model(), ("one two three four five " * 8,), delay=0.01), grace_s=0.1)
    await gateways.add()
    client = ask(gateways, 0, headers=RESUMABLE)
    first = await client.read(3)
    await client.leave()
    assert gateways.backend.closed_at == [], "it goes on for a while"
    await until(lambda: gateways.backend.closed_at)
    await until(lambda: len(gateways.store.table) == 0)
    back = come_back(gateways, 0, first[-1])
    await back.read()
    assert back.status == 404


async def test_what_is_complete_is_kept_for_a_while_and_ends_a_browsers_attempts(gateways: Gateways) -> None:
    client = ask(gateways, 0, headers=RESUMABLE)
    whole = await client.read()
    stream_id = client.stream_id
    await until(lambda: gateways.store.is_complete(stream_id))
    for gateway in (0, 1):
        again = gateways.connect(gateway, f"/v1/streams/{stream_id}?starting_after=2")
        assert await again.read() == whole[2:]
        # A browser's EventSource sends the id of its last event along with the query of its first request.
        over = gateways.connect(
            gateway,
            f"/v1/streams/{stream_id}?starting_after=2",
            headers={"Last-Event-ID": f"{stream_id}:{len(whole)}"},
        )
        assert (await over.read(), over.status) == ([], 204)
    assert len(gateways.backend.requests) == 1
    gateways.clock.now += gateways.config.streams.grace_s + 1
    late = gateways.connect(1, f"/v1/streams/{stream_id}")
    await late.read()
    assert late.status == 404


async def test_what_is_answered_and_was_not_asked_to_be_kept_is_not(gateways: Gateways) -> None:
    for _ in range(3):
        await ask(gateways, 0).read()
    told = len(gateways.store.reports)
    await until(lambda: len(gateways.store.reports) > told + 1)
    assert len(gateways.store.table) == 0


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


async def test_without_a_store_streams_are_what_they_were(gateways: Gateways, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keeper, "OPENING_S", 0.05)
    gateways.store.is_away = True
    client = ask(gateways, 0)
    assert (await client.read())[-1].endswith("data: [DONE]\n\n")
    lost = gateways.connect(1, f"/v1/streams/{client.stream_id}")
    error = json.loads((await lost.read())[0])["error"]
    assert (lost.status, error["code"]) == (503, "not_ready")


async def test_a_store_that_was_started_anew_is_told_everything_again(gateways: Gateways) -> None:
    whole = await ask(gateways, 0).read()
    dying = await gateways.add()
    client = ask(gateways, dying)
    first = await client.read(4)
    await kept(gateways, client)
    gateways.store.table = gateways.new_table()
    first += await client.read(2)
    await until(lambda: len(gateways.store.table) == 1)
    gateways.stop(dying)
    await client.leave()
    assert data_of(first + await come_back(gateways, 1, first[-1]).read()) == data_of(whole)


async def test_streams_that_do_not_fit_are_not_kept_and_go_on(caplog: pytest.LogCaptureFixture) -> None:
    gateways = Gateways(Script(text_model(), ANSWERS, delay=0.002), max_streams=1)
    await gateways.add()
    fits = ask(gateways, 0)
    first = await fits.read(1)
    await kept(gateways, fits)
    # One that waits for the store's answer: it is not over before that has come.
    other = await ask(gateways, 0, headers=RESUMABLE).read()
    assert other[-1].endswith("data: [DONE]\n\n")
    assert data_of(first + await fits.read()) == data_of(other)
    assert sum("is full" in record.message for record in caplog.records) == 1


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


@pytest.mark.parametrize(
    ("path", "headers", "status"),
    [
        ("/v1/streams/" + "A" * 22, {}, 404),
        ("/v1/streams/short", {}, 404),
        ("/v1/streams/" + "A" * 22, {"Last-Event-ID": "B" * 22 + ":1"}, 400),
        ("/v1/streams/" + "A" * 22, {"Last-Event-ID": "A" * 22 + ":-1"}, 400),
        ("/v1/streams/" + "A" * 22 + "?starting_after=x", {}, 400),
        ("/v1/streams/" + "A" * 22 + "?starting_after=" + "9" * 400, {}, 400),
    ],
)
async def test_what_is_no_stream_is_refused(gateways: Gateways, path: str, headers: Any, status: int) -> None:
    client = gateways.connect(0, path, headers=headers)
    error = json.loads((await client.read())[0])["error"]
    assert client.status == status
    assert error["type"] == "invalid_request_error"


async def test_a_header_that_cannot_be_understood_is_refused(gateways: Gateways) -> None:
    client = ask(gateways, 0, headers={"X-Manta-Resumable": "maybe"})
    await client.read()
    assert client.status == 400


async def test_streams_that_are_not_kept_have_no_ids() -> None:
    gateways = Gateways(grace_s=0)
    await gateways.add()
    client = ask(gateways, 0)
    assert all(event.startswith("data: ") for event in await client.read())
    assert "x-manta-stream-id" not in client.headers
    assert gateways.store.reports == []


async def test_a_gateway_that_is_full_refuses_streams_that_may_be_left_and_takes_on_no_orphans() -> None:
    gateways = Gateways(Script(text_model(), ("one two three four five " * 8,), delay=0.01), max_queued_requests=1)
    full, dying = await gateways.add(), await gateways.add()
    reading = ask(gateways, full)
    await reading.read(1)
    refused = ask(gateways, full, headers=RESUMABLE)
    error = json.loads((await refused.read())[0])["error"]
    assert (refused.status, error["code"]) == (429, "rate_limit_exceeded")
    client = ask(gateways, dying)
    await client.read(1)
    await kept(gateways, client)
    gateways.stop(dying)
    gateways.lapse()
    await asyncio.sleep(0.1)
    assert gateways.counted("manta:adopted_streams_total") == 0
    await reading.leave()
    await asyncio.sleep(0.1)
    assert gateways.counted("manta:adopted_streams_total") == 1


@pytest.mark.parametrize("gateway", [0, 1])
async def test_a_stream_goes_on_at_a_gateway_that_is_full_as_it_was_admitted_before(gateway: int) -> None:
    answers = ("one two three four five " * 4,)
    gateways = Gateways(Script(text_model(), answers, delay=0.005), max_queued_requests=1)
    for _ in range(2):
        await gateways.add()
    whole = await ask(gateways, 0).read()
    client, other = ask(gateways, 0), ask(gateways, 1)
    first = await client.read(3)
    await other.read(1)
    await kept(gateways, client)
    # Its old connection is open, as far as anybody knows.
    back = come_back(gateways, gateway, first[-1])
    rest = await back.read()
    assert back.status == 200
    assert data_of(first + rest) == data_of(whole)
    refused = ask(gateways, 1)
    await refused.read()
    assert refused.status == 429
    assert (await other.read())[-1].endswith("data: [DONE]\n\n")


async def test_a_stream_that_a_gateway_cannot_go_on_with_now_is_not_lost(gateways: Gateways) -> None:
    script = gateways.backend.script
    script.answers, script.delay = ("one two three four five " * 8,), 0.01
    whole = await ask(gateways, 0).read()
    client = ask(gateways, 0)
    first = await client.read(3)
    await kept(gateways, client)
    gateways.stop(0)
    await client.leave()
    script.fail_after, script.error = 0, NotReady("the server is stopping")
    refused = await come_back(gateways, 1, first[-1]).read()
    assert "the server is stopping" in refused[-1]
    reported = len(gateways.store.reports)
    await until(lambda: len(gateways.store.reports) > reported + 1)
    script.fail_after = None
    rest = await come_back(gateways, 1, first[-1]).read()
    assert data_of(first + rest) == data_of(whole)


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
