"""An API over a scripted backend: in process through httpx, and on a real socket through uvicorn."""

from collections.abc import AsyncIterator, Callable

import httpx
import pytest

from deployments.config import GatewayConfig
from deployments.gateway_app import build_http
from monitoring.recorder import Recorder
from tests.deployments.api.tiny import FakeBackend, Script, card, text_model


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="session")
def text():
    return text_model()


@pytest.fixture
def backend(text) -> FakeBackend:
    return FakeBackend(Script(text), card())


@pytest.fixture
def recorder() -> Recorder:
    return Recorder()


@pytest.fixture
def make_app(backend, recorder, text) -> Callable:
    def make(**config: int):
        return build_http(backend, GatewayConfig(**config), recorder, version="1.2.3", load_text=lambda path: text)

    return make


@pytest.fixture
async def client(make_app) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(transport=httpx.ASGITransport(make_app()), base_url="http://manta") as client:
        yield client
