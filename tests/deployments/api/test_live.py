"""A stream that is written whether or not anybody reads it."""

import asyncio
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field

import pytest

from deployments.api.errors import ApiError
from deployments.api.live import LiveStream

pytestmark = pytest.mark.anyio
EVENTS = [b"%04d" % number for number in range(1, 101)]


@dataclass
class Source:
    """Writes events when it is let, and remembers what became of it."""

    fail: Exception | None = None
    gate: asyncio.Event = field(default_factory=asyncio.Event)
    num_written: int = 0
    closed: bool = False
    attended: list[bool] = field(default_factory=list)
    forgotten: int = 0

    async def events(self) -> AsyncGenerator[bytes]:
        try:
            for event in EVENTS:
                await self.gate.wait()
                self.num_written += 1
                yield event
                await asyncio.sleep(0)
            if self.fail is not None:
                raise self.fail
        finally:
            self.closed = True

    def forget(self) -> None:
        self.forgotten += 1

    def stream(self, *, grace_s: float = 60.0, expected: bool = True, max_events: int = 10) -> LiveStream:
        return LiveStream(
            self.events(),
            grace_s=grace_s,
            expected=expected,
            attended=self.attended.append,
            ended=self.forget,
            max_bytes=4 * max_events,
        )


async def settle() -> None:
    for _ in range(500):
        await asyncio.sleep(0)


async def test_a_reader_gets_every_event_and_is_not_overtaken() -> None:
    source = Source()
    source.gate.set()
    stream = source.stream()
    await settle()
    assert source.num_written == 11, "the reader that is expected wants the first ones"
    events = stream.read(0)
    assert [await anext(events) for _ in range(5)] == EVENTS[:5]
    await settle()
    assert source.num_written == 16
    assert [event async for event in events] == EVENTS[5:]
    assert source.closed and source.forgotten == 1


async def test_without_a_reader_it_goes_on_and_holds_the_latest() -> None:
    source = Source()
    stream = source.stream(expected=False)
    source.gate.set()
    await settle()
    assert source.closed and source.forgotten == 1
    assert not stream.has(89) and stream.has(90)
    assert [event async for event in stream.read(95)] == EVENTS[95:]


async def test_a_reader_that_left_can_be_followed_by_another() -> None:
    source = Source()
    source.gate.set()
    stream = source.stream()
    first = stream.read(0)
    for event in EVENTS[:20]:
        assert await anext(first) == event
    source.gate.clear()
    await first.aclose()
    assert source.attended[-2:] == [True, False]
    second = stream.read(20)
    waiting = asyncio.ensure_future(anext(second))
    source.gate.set()
    assert await waiting == EVENTS[20]
    assert source.attended[-1]
    assert [event async for event in second] == EVENTS[21:]


async def test_the_newest_reader_gets_it() -> None:
    source = Source()
    stream = source.stream()
    older = asyncio.ensure_future(anext(stream.read(0)))
    await settle()
    newer = asyncio.ensure_future(anext(stream.read(0)))
    with pytest.raises(ApiError, match="another connection"):
        await older
    source.gate.set()
    assert await newer == EVENTS[0]


async def test_nobody_is_waited_for_longer_than_the_grace_period() -> None:
    source = Source()
    source.stream(grace_s=0.02)
    await settle()
    assert not source.closed
    await asyncio.sleep(0.05)
    await settle()
    assert source.closed and source.forgotten == 1


async def test_a_reader_stops_the_clock() -> None:
    source = Source()
    stream = source.stream(grace_s=0.02)
    reading = asyncio.ensure_future(anext(stream.read(0)))
    await asyncio.sleep(0.05)
    source.gate.set()
    assert await reading == EVENTS[0]


async def test_a_failure_reaches_who_reads_and_who_comes_back() -> None:
    source = Source(fail=ValueError("broken"))
    source.gate.set()
    stream = source.stream(expected=False)
    await settle()
    assert source.forgotten == 0, "somebody has to be told"
    with pytest.raises(ValueError, match="broken"):
        assert [event async for event in stream.read(90)] == EVENTS[90:]


async def test_what_is_taken_away_ends_and_is_forgotten() -> None:
    source = Source()
    stream = source.stream()
    reading = asyncio.ensure_future(anext(stream.read(0)))
    await settle()
    stream.take_away()
    with pytest.raises(ApiError, match="another connection"):
        await reading
    await settle()
    assert source.closed and source.forgotten >= 1
