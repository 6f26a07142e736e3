"""A KV host lives for as long as somebody wants it."""

import asyncio
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace

import pytest

from cluster import kv_host
from cluster.config import KVTierConfig
from cluster.kv.server import SOCKET_NAME
from cluster.kv_host import KVHostActor

LEASE_S = 1.0
PATIENCE_S = 20.0


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.mark.anyio
async def test_a_host_that_nobody_renews_any_more_ends_and_stays_away(monkeypatch: pytest.MonkeyPatch) -> None:
    killed: list[tuple[object, bool]] = []
    ended = asyncio.Event()

    def kill(actor: object, *, no_restart: bool) -> None:
        killed.append((actor, no_restart))
        ended.set()

    monkeypatch.setattr(kv_host, "LEASE_S", LEASE_S)
    monkeypatch.setattr(kv_host.ray, "kill", kill)
    monkeypatch.setattr(kv_host.ray, "get_runtime_context", lambda: SimpleNamespace(current_actor="this one"))
    config = KVTierConfig(memory=2**20)
    with TemporaryDirectory(prefix="mk-", dir="/tmp") as directory:
        socket = Path(directory, "host", SOCKET_NAME)
        actor = KVHostActor.__new__(KVHostActor)
        await actor.__init__(str(socket.parent), config, lambda: None)
        for _ in range(20):
            await asyncio.sleep(LEASE_S / 10)
            await actor.renew(1, config, {})
        assert socket.exists() and not killed, "it was renewed for two leases"
        await asyncio.wait_for(ended.wait(), PATIENCE_S)
        assert killed == [("this one", True)]
        assert not socket.exists()
