"""Frame streams: who gets which emissions, merging, take-over, and what happens to a gateway that vanishes."""

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence

import pytest

from deployments.links import FrameStreams
from deployments.messages import Frame
from engine.sampling_params import SamplingParams
from engine.sequence import Emission, FinishReason, Request
from engine.stats import EngineStats

STATS = EngineStats(0, 0, 10, 10, 0, 0, 0, 0, 0)
WAIT_S = 5.0

Scenario = Callable[["Setting"], Awaitable[None]]


class Setting:
    """Frame streams with short times, and the aborts they asked for."""

    def __init__(self, **times: float) -> None:
        self.aborted: list[str] = []
        defaults = {"heartbeat_s": 0.05, "linger_s": 0.1, "grace_s": 0.1}
        self.streams = FrameStreams("replica-1", STATS, self._abort, **(defaults | times))

    def _abort(self, request_ids: Sequence[str]) -> None:
        self.aborted.extend(request_ids)


def run(scenario: Scenario, **times: float) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(WAIT_S):
            await scenario(Setting(**times))

    asyncio.run(bounded())


def request(request_id: str, n: int = 1) -> Request:
    return Request(request_id, (1,), SamplingParams(n=n))


def token(request_id: str, value: int, *, sample: int = 0, last: bool = False) -> Emission:
    return Emission(request_id, sample, (value,), finish_reason=FinishReason.STOP if last else None)


async def next_tokens(stream: AsyncGenerator[Frame, None]) -> list[tuple[str, int]]:
    """The tokens of the next frame that has any."""
    async for frame in stream:
        if frame.emissions:
            return [(emission.request_id, emission.token_ids[0]) for emission in frame.emissions]
    raise AssertionError("the stream ended")


def test_each_gateway_gets_its_own_requests() -> None:
    async def scenario(setting: Setting) -> None:
        streams = setting.streams
        streams.announce("g1", request("r1"))
        streams.announce("g2", request("r2"))
        first, second = streams.attach("g1"), streams.attach("g2")
        streams.publish([token("r1", 1), token("r2", 2), token("nobody's", 3)], STATS)
        assert await next_tokens(first) == [("r1", 1)]
        assert await next_tokens(second) == [("r2", 2)]

    run(scenario)


def test_first_frame_comes_at_once_and_is_empty() -> None:
    async def scenario(setting: Setting) -> None:
        frame = await anext(setting.streams.attach("g"))
        assert frame == Frame("replica-1", (), STATS)

    run(scenario, linger_s=60)


def test_tokens_wait_for_a_gateway_that_attaches_late() -> None:
    async def scenario(setting: Setting) -> None:
        setting.streams.announce("g", request("r"))
        setting.streams.publish([token("r", 1)], STATS)
        setting.streams.publish([token("r", 2, last=True)], STATS)
        assert await next_tokens(setting.streams.attach("g")) == [("r", 1), ("r", 2)]

    run(scenario)


def test_iterations_that_a_slow_reader_missed_are_one_frame() -> None:
    async def scenario(setting: Setting) -> None:
        setting.streams.announce("g", request("r"))
        stream = setting.streams.attach("g")
        await anext(stream)
        for value in range(5):
            setting.streams.publish([token("r", value)], STATS)
        assert await next_tokens(stream) == [("r", value) for value in range(5)]

    run(scenario)


def test_stream_gives_a_sign_of_life_while_a_request_has_no_tokens_yet() -> None:
    async def scenario(setting: Setting) -> None:
        setting.streams.announce("g", request("r"))
        stream = setting.streams.attach("g")
        frames = [await anext(stream) for _ in range(4)]
        assert all(frame.emissions == () for frame in frames)

    run(scenario)


def test_stream_ends_by_itself_once_idle_but_not_before_every_sample_has_finished() -> None:
    async def scenario(setting: Setting) -> None:
        streams = setting.streams
        streams.announce("g", request("r", n=2))
        stream = streams.attach("g")
        streams.publish([token("r", 1, sample=0, last=True)], STATS)
        assert await next_tokens(stream) == [("r", 1)]
        assert (await anext(stream)).emissions == ()
        assert streams.num_requests == 1
        streams.publish([token("r", 2, sample=1, last=True)], STATS)
        assert await next_tokens(stream) == [("r", 2)]
        assert streams.num_requests == 0
        assert [frame async for frame in stream] == []

    run(scenario)


def test_request_announced_while_the_stream_lingers_is_served_by_it() -> None:
    async def scenario(setting: Setting) -> None:
        stream = setting.streams.attach("g")
        await anext(stream)
        waiting = asyncio.ensure_future(next_tokens(stream))
        await asyncio.sleep(0.05)
        setting.streams.announce("g", request("r"))
        await asyncio.sleep(0.1)
        setting.streams.publish([token("r", 1)], STATS)
        assert await waiting == [("r", 1)]

    run(scenario)


def test_second_attach_takes_the_stream_over() -> None:
    async def scenario(setting: Setting) -> None:
        setting.streams.announce("g", request("r"))
        old = setting.streams.attach("g")
        await anext(old)
        rest = asyncio.ensure_future(_collect(old))
        await asyncio.sleep(0)
        new = setting.streams.attach("g")
        await anext(new)
        assert await rest == []
        setting.streams.publish([token("r", 1)], STATS)
        assert await next_tokens(new) == [("r", 1)]
        await asyncio.sleep(0.2)
        assert setting.aborted == []

    run(scenario)


@pytest.mark.parametrize("attached_before", [False, True])
def test_requests_of_a_gateway_that_vanished_are_aborted_after_a_grace(attached_before: bool) -> None:
    async def scenario(setting: Setting) -> None:
        setting.streams.announce("g", request("r1"))
        setting.streams.announce("g", request("r2"))
        setting.streams.announce("other", request("r3"))
        other = setting.streams.attach("other")
        await anext(other)
        if attached_before:
            stream = setting.streams.attach("g")
            await anext(stream)
            await stream.aclose()
        await asyncio.sleep(0.05)
        assert setting.aborted == []
        await asyncio.sleep(0.1)
        assert sorted(setting.aborted) == ["r1", "r2"]
        setting.streams.publish([token("r1", 1)], STATS)
        assert setting.streams.num_requests == 1
        await other.aclose()

    run(scenario)


def test_gateway_that_comes_back_within_the_grace_loses_nothing() -> None:
    async def scenario(setting: Setting) -> None:
        setting.streams.announce("g", request("r"))
        stream = setting.streams.attach("g")
        await anext(stream)
        await stream.aclose()
        setting.streams.publish([token("r", 1)], STATS)
        again = setting.streams.attach("g")
        assert await next_tokens(again) == [("r", 1)]
        await asyncio.sleep(0.15)
        assert setting.aborted == []
        await again.aclose()

    run(scenario)


def test_forgotten_request_is_not_sent_any_more() -> None:
    async def scenario(setting: Setting) -> None:
        for name in ("r1", "r2"):
            setting.streams.announce("g", request(name))
        setting.streams.publish([token("r1", 1), token("r2", 2)], STATS)
        setting.streams.forget(["r1", "unknown"])
        setting.streams.publish([token("r1", 3), token("r2", 4)], STATS)
        assert await next_tokens(setting.streams.attach("g")) == [("r2", 2), ("r2", 4)]

    run(scenario)


async def _collect(stream: AsyncGenerator[Frame, None]) -> list[Frame]:
    return [frame async for frame in stream]


def test_a_replica_that_gives_up_tells_every_gateway_once() -> None:
    async def scenario(setting: Setting) -> None:
        streams = setting.streams
        streams.announce("g1", request("r1", n=2))
        streams.announce("g2", request("r2"))
        streams.publish([token("r1", 1)], STATS)
        streams.give_up("the engine is stuck")
        streams.publish([token("r1", 2), token("r2", 3)], STATS)

        async def read(gateway_id: str) -> list[Emission]:
            return [emission async for frame in streams.attach(gateway_id) for emission in frame.emissions]

        (first, moved), others = await asyncio.gather(read("g1"), read("g2"))
        assert first.token_ids == (1,)
        assert (moved.request_id, moved.finish_reason) == ("r1", FinishReason.MOVED)
        assert moved.error == "the engine is stuck"
        assert [emission.finish_reason for emission in others] == [FinishReason.MOVED]
        assert streams.num_requests == 0 and not setting.aborted

    run(scenario)
