"""A backend that is closed under its requests."""

import asyncio
from collections.abc import AsyncGenerator

import pytest

from deployments.backend import GenerationFailed, NotReady
from deployments.draining import STOPPING, DrainingBackend
from deployments.messages import ModelCard
from engine.sampling_params import SamplingParams
from engine.sequence import Emission, FinishReason, Request


class Streams:
    """A backend whose requests bring tokens until they are let go, or ended; a deaf one's are not ended."""

    def __init__(self, deaf: bool = False) -> None:
        self.released = asyncio.Event()
        self._deaf = deaf
        self._ended: str | None = None

    def end(self, reason: str) -> None:
        self._ended = None if self._deaf else reason

    async def generate(self, request: Request) -> AsyncGenerator[Emission, None]:
        while not self.released.is_set():
            if self._ended:
                raise GenerationFailed(self._ended)
            yield Emission(request.request_id, 0, (1,))
            await asyncio.sleep(0.001)
        yield Emission(request.request_id, 0, (2,), finish_reason=FinishReason.STOP)

    async def card(self) -> ModelCard:
        raise NotImplementedError

    async def ready(self) -> bool:
        return True

    async def metrics(self) -> bytes:
        return b""


async def read(backend: DrainingBackend) -> list[Emission]:
    return [emission async for emission in backend.generate(Request("r", (1,), SamplingParams()))]


def test_without_requests_it_is_over_at_once_and_nothing_is_taken_any_more() -> None:
    async def run() -> None:
        streams = Streams()
        backend = DrainingBackend(streams, streams.end)
        assert await backend.ready()
        async with asyncio.timeout(1):
            assert await backend.drain(60) == 0
        with pytest.raises(NotReady, match=STOPPING):
            await backend.ready()
        with pytest.raises(NotReady, match=STOPPING):
            await read(backend)

    asyncio.run(run())


def test_requests_that_finish_in_time_are_not_touched() -> None:
    async def run() -> None:
        streams = Streams()
        backend = DrainingBackend(streams, streams.end)
        answers = [asyncio.ensure_future(read(backend)) for _ in range(3)]
        await asyncio.sleep(0.01)
        drain = asyncio.ensure_future(backend.drain(60))
        await asyncio.sleep(0.01)
        assert not drain.done()
        streams.released.set()
        async with asyncio.timeout(1):
            assert await drain == 0
        assert [(await answer)[-1].finish_reason for answer in answers] == [FinishReason.STOP] * 3

    asyncio.run(run())


def test_requests_that_do_not_are_told_so() -> None:
    async def run() -> None:
        streams = Streams()
        backend = DrainingBackend(streams, streams.end)
        answers = [asyncio.ensure_future(read(backend)) for _ in range(3)]
        await asyncio.sleep(0.01)
        assert await backend.drain(0.01) == 3
        for answer in answers:
            with pytest.raises(GenerationFailed, match=STOPPING):
                await answer

    asyncio.run(run())


def test_the_end_is_bounded_even_if_a_request_does_not_listen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deployments.draining.LAST_WORDS_S", 0.05)

    async def run() -> None:
        streams = Streams(deaf=True)
        backend = DrainingBackend(streams, streams.end)
        answer = asyncio.ensure_future(read(backend))
        await asyncio.sleep(0.01)
        async with asyncio.timeout(1):
            assert await backend.drain(0.01) == 1
        answer.cancel()

    asyncio.run(run())


def test_a_client_that_leaves_is_not_waited_for() -> None:
    async def run() -> None:
        streams = Streams()
        backend = DrainingBackend(streams, streams.end)
        stream = backend.generate(Request("r", (1,), SamplingParams()))
        await anext(stream)
        drain = asyncio.ensure_future(backend.drain(60))
        await asyncio.sleep(0.01)
        assert not drain.done()
        await stream.aclose()
        async with asyncio.timeout(1):
            assert await drain == 0

    asyncio.run(run())
