"""Which streams are kept, for how long, and what becomes of them when the store is away, full or new."""

import json

import pytest

from deployments.streams import keeper
from tests.deployments.api.tiny import Script, text_model
from tests.deployments.streams.clients import ANSWERS, RESUMABLE, ask, come_back, data_of, kept, until
from tests.deployments.streams.gateways import Gateways

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("fast")]


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


async def test_streams_that_are_not_kept_have_no_ids() -> None:
    gateways = Gateways(grace_s=0)
    await gateways.add()
    client = ask(gateways, 0)
    assert all(event.startswith("data: ") for event in await client.read())
    assert "x-manta-stream-id" not in client.headers
    assert gateways.store.reports == []
