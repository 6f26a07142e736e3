"""Requests that come while an engine is in the middle of something: taken, refused, late, aborted."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence

import pytest

from deployments.engine_thread import EngineStopped, EngineThread
from deployments.intake import Intake
from deployments.links import FrameStreams
from deployments.ray_backend import ATTEMPT_TIMEOUT_S
from engine.errors import InvalidRequest
from engine.sampling_params import SamplingParams
from engine.sequence import Emission, FinishReason, Request
from engine.stats import EngineStats
from tests.deployments.fakes import CRASH_PROMPT, FakeEngine

STEP_S = 0.4
PATIENCE_S = 0.05
WAIT_S = 10.0


class Setting:
    """An engine whose iterations are long, and what leaves it for the gateway "g"."""

    def __init__(self, step_s: float) -> None:
        loop = asyncio.get_running_loop()

        def deliver(emissions: Sequence[Emission], stats: EngineStats) -> None:
            loop.call_soon_threadsafe(self.streams.publish, emissions, stats)

        self.fake = FakeEngine(step_s)
        self.engine = EngineThread(lambda: self.fake, deliver)
        self.streams = FrameStreams("replica", self.fake.stats(), self.engine.abort)
        self.intake = Intake(self.engine, self.streams, patience_s=PATIENCE_S)

    async def take(self, *requests: Request) -> list[float]:
        """The seconds that each took to be taken."""
        loop = asyncio.get_running_loop()
        seconds = []
        for request in requests:
            began = loop.time()
            await self.intake.take("g", request)
            seconds.append(loop.time() - began)
        return seconds

    async def emissions(self, request_id: str) -> list[Emission]:
        """All of a request."""
        found: list[Emission] = []
        async for frame in self.streams.attach("g"):
            found += [emission for emission in frame.emissions if emission.request_id == request_id]
            if found and found[-1].finish_reason is not None:
                break
        return found


def run(scenario: Callable[[Setting], Awaitable[None]], step_s: float = STEP_S) -> None:
    async def bounded() -> None:
        setting = Setting(step_s)
        await asyncio.wrap_future(setting.engine.start())
        try:
            async with asyncio.timeout(WAIT_S):
                await scenario(setting)
        finally:
            await asyncio.to_thread(setting.engine.close)

    asyncio.run(bounded())


def request(name: str, *tokens: int, max_tokens: int = 2, n: int = 1) -> Request:
    return Request(name, tokens or (1, 2), SamplingParams(max_tokens=max_tokens, n=n))


def test_nobody_waits_for_a_long_iteration_to_be_taken() -> None:
    async def scenario(setting: Setting) -> None:
        await setting.take(request("long", max_tokens=3))
        await asyncio.sleep(STEP_S / 4)
        (seconds,) = await setting.take(request("next"))
        assert PATIENCE_S <= seconds < STEP_S / 2 < ATTEMPT_TIMEOUT_S
        assert [len(emission.token_ids) for emission in await setting.emissions("next")] == [1, 1]

    run(scenario)


def test_an_idle_engine_answers_itself() -> None:
    async def scenario(setting: Setting) -> None:
        with pytest.raises(InvalidRequest, match="empty prompt"):
            await setting.intake.take("g", Request("bad", (), SamplingParams(max_tokens=1)))
        assert setting.streams.num_requests == 0
        await setting.take(request("good", max_tokens=1000))
        assert setting.streams.num_requests == 1

    run(scenario, step_s=0.001)


def test_what_is_refused_late_ends_with_the_reason() -> None:
    async def scenario(setting: Setting) -> None:
        await setting.take(request("long", max_tokens=3))
        await asyncio.sleep(STEP_S / 4)
        await setting.take(Request("bad", (), SamplingParams(max_tokens=1)))
        (end,) = await setting.emissions("bad")
        assert (end.finish_reason, end.error) == (FinishReason.ERROR, "empty prompt")
        assert setting.streams.num_requests == 1

    run(scenario)


def test_what_an_engine_that_fails_has_not_begun_goes_on_elsewhere_and_is_not_blamed() -> None:
    async def scenario(setting: Setting) -> None:
        await setting.take(request("long", max_tokens=3))
        await asyncio.sleep(STEP_S / 4)
        await setting.take(request("culprit", *CRASH_PROMPT))
        await asyncio.sleep(1.25 * STEP_S)
        await setting.take(request("innocent", n=2))
        ends = await setting.emissions("innocent")
        assert [emission.finish_reason for emission in ends] == [FinishReason.MOVED] * 2
        assert all(emission.error is None for emission in ends), "it is moved as planned, and no loss of its own"
        with pytest.raises(EngineStopped):
            await setting.intake.take("g", request("late"))

    run(scenario)


def test_a_request_that_was_given_up_while_it_waited_is_never_begun() -> None:
    async def scenario(setting: Setting) -> None:
        await setting.take(request("long", max_tokens=3))
        await asyncio.sleep(STEP_S / 4)
        taking = asyncio.create_task(setting.intake.take("g", request("gone", max_tokens=50)))
        await asyncio.sleep(PATIENCE_S / 2)
        taking.cancel()
        assert [len(emission.token_ids) for emission in await setting.emissions("long")] == [1, 1, 1]
        assert setting.streams.num_requests == 0
        assert not setting.fake.has_work()

    run(scenario)
