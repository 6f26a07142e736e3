"""Gateways over a scripted backend and the store's table; coroutines as tests, on asyncio."""

import pytest

from deployments.streams import keeper, messages
from tests.deployments.api.tiny import Script, text_model
from tests.deployments.streams.clients import ANSWERS
from tests.deployments.streams.gateways import Gateways


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
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
