"""A KV host lives for as long as somebody wants it, and no longer, whatever hangs; the newest who does is obeyed."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

import pytest

from cluster import kv_host
from cluster.config import KVTierConfig
from cluster.kv.server import SOCKET_NAME, KVServer
from cluster.kv_host import KVHostActor, end_hosts, next_keeper

LEASE_S = 1.0
PATIENCE_S = 20.0
CONFIG = KVTierConfig(memory=2**20)

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


class Kills:
    """What Ray has been told to kill."""

    def __init__(self) -> None:
        self.actors: list[tuple[object, bool]] = []
        self.any = asyncio.Event()

    def kill(self, actor: object, *, no_restart: bool) -> None:
        self.actors.append((actor, no_restart))
        self.any.set()


@pytest.fixture
async def kills(monkeypatch: pytest.MonkeyPatch) -> Kills:
    made = Kills()
    monkeypatch.setattr(kv_host, "LEASE_S", LEASE_S)
    monkeypatch.setattr(kv_host.ray, "kill", made.kill)
    monkeypatch.setattr(kv_host.ray, "get_runtime_context", lambda: SimpleNamespace(current_actor="this one"))
    return made


@asynccontextmanager
async def started() -> AsyncIterator[KVHostActor]:
    """A host, without Ray. However the test has it close, it is closed in the end."""
    close = KVServer.close
    with TemporaryDirectory(prefix="mk-", dir="/tmp") as directory:
        made = KVHostActor.__new__(KVHostActor)
        await made.__init__(str(Path(directory, "host")), CONFIG, lambda: None)
        try:
            yield made
        finally:
            made._watching.cancel()
            await close(made._server)


@pytest.fixture
async def actor(kills: Kills) -> AsyncIterator[KVHostActor]:
    async with started() as made:
        yield made


def socket_of(actor: KVHostActor) -> Path:
    return actor._directory / SOCKET_NAME


class Handle:
    """An actor as Ray hands it out."""

    def __init__(self, actor: Any) -> None:
        self._actor = actor

    def __getattr__(self, name: str) -> SimpleNamespace:
        return SimpleNamespace(remote=getattr(self._actor, name))


class Silent:
    """An actor that never answers."""

    async def keeper(self) -> int:
        await asyncio.Event().wait()
        raise AssertionError

    async def end(self, keeper: int) -> bool:
        await asyncio.Event().wait()
        raise AssertionError


async def hang(server: KVServer) -> None:
    await asyncio.Event().wait()


async def test_a_host_that_nobody_renews_any_more_ends_and_stays_away(actor: KVHostActor, kills: Kills) -> None:
    for _ in range(20):
        await asyncio.sleep(LEASE_S / 10)
        await actor.renew(1, CONFIG, {})
    assert socket_of(actor).exists() and not kills.actors, "it was renewed for two leases"
    await asyncio.wait_for(kills.any.wait(), PATIENCE_S)
    assert kills.actors == [("this one", True)]
    assert not socket_of(actor).exists()


async def test_a_host_that_takes_longer_to_start_than_its_lease_lives(
    kills: Kills, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = KVServer.start

    async def start_slowly(server: KVServer) -> None:
        await asyncio.sleep(1.5 * LEASE_S)
        await start(server)

    monkeypatch.setattr(KVServer, "start", start_slowly)
    async with started() as actor:
        await asyncio.sleep(LEASE_S / 2)
        assert socket_of(actor).exists() and not kills.actors


async def test_a_host_that_cannot_close_says_that_it_ends_and_does(
    actor: KVHostActor, kills: Kills, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kv_host, "CLOSE_TIMEOUT_S", 0.1)
    monkeypatch.setattr(KVServer, "close", hang)
    await actor.renew(1, CONFIG, {})
    assert await asyncio.wait_for(actor.end(1), PATIENCE_S)
    await asyncio.wait_for(kills.any.wait(), PATIENCE_S)
    assert kills.actors == [("this one", True)], "whoever had it end did not live to kill it"


async def test_a_host_that_fails_to_close_ends_all_the_same(
    actor: KVHostActor, kills: Kills, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fail(server: KVServer) -> None:
        raise OSError("no")

    monkeypatch.setattr(KVServer, "close", fail)
    await asyncio.wait_for(kills.any.wait(), PATIENCE_S)
    assert kills.actors == [("this one", True)]


async def test_a_keeper_that_starts_after_the_clock_was_set_back_is_obeyed(
    actor: KVHostActor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kv_host, "NUMBER_TIMEOUT_S", 0.1)
    before = 2 * time.time_ns()
    await actor.renew(before, CONFIG, {})
    keeper = await next_keeper([Handle(Silent()), Handle(actor)])
    await actor.renew(keeper, CONFIG, {})
    assert not await actor.end(before), "the one before has nothing to say any more"
    assert await actor.end(keeper)


async def test_a_keeper_of_new_hosts_is_numbered_by_the_clock(actor: KVHostActor) -> None:
    begin = time.time_ns()
    assert begin <= await next_keeper([Handle(actor)]) <= time.time_ns()
    assert begin <= await next_keeper([]) <= time.time_ns()


async def test_a_host_that_does_not_answer_is_ended_and_one_with_a_newer_keeper_is_not(
    actor: KVHostActor, kills: Kills, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kv_host, "END_TIMEOUT_S", 0.1)
    await actor.renew(2, CONFIG, {})
    newer, silent = Handle(actor), Handle(Silent())
    await asyncio.wait_for(end_hosts(1, [newer, silent]), PATIENCE_S)
    assert kills.actors == [(silent, True)]


async def test_a_configuration_that_cannot_be_begun_with_is_tried_again(
    actor: KVHostActor, monkeypatch: pytest.MonkeyPatch
) -> None:
    start, config = KVServer.start, KVTierConfig(memory=2**21)

    async def fail(server: KVServer) -> None:
        raise OSError("not now")

    monkeypatch.setattr(KVServer, "start", fail)
    with pytest.raises(OSError, match="not now"):
        await actor.renew(1, config, {})
    monkeypatch.setattr(KVServer, "start", start)
    await actor.renew(1, config, {})
    assert socket_of(actor).exists()
