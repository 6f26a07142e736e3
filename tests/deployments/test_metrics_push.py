"""Pushing metrics: only when there is news, nothing lost while the hub is away."""

import asyncio

from deployments.metrics_push import MetricsPusher
from monitoring.recorder import Delta, Recorder

COUNTER = "manta:generation_tokens_total"
GAUGE = "manta:num_requests_running"


class Hub:
    """Takes deltas, or refuses them while it is away."""

    def __init__(self) -> None:
        self.away = False
        self.taken: list[Delta] = []

    async def push(self, delta: Delta) -> None:
        if self.away:
            raise ConnectionError("no hub")
        self.taken.append(delta)

    @property
    def total(self) -> float:
        return sum(delta.counters.get((COUNTER, ()), 0) for delta in self.taken)


def test_nothing_is_sent_when_nothing_happened() -> None:
    hub, recorder = Hub(), Recorder()
    pusher = MetricsPusher(recorder, hub.push)
    recorder.set(GAUGE, 0)
    assert asyncio.run(pusher.push())
    assert not asyncio.run(pusher.push())
    assert len(hub.taken) == 1


def test_heartbeat_is_sent_even_then() -> None:
    hub = Hub()
    assert asyncio.run(MetricsPusher(Recorder(), hub.push).push(even_unchanged=True))
    assert len(hub.taken) == 1


def test_changed_gauge_is_news() -> None:
    hub, recorder = Hub(), Recorder()
    pusher = MetricsPusher(recorder, hub.push)
    for value in (1, 2, 2):
        recorder.set(GAUGE, value)
        asyncio.run(pusher.push())
    assert [delta.gauges[GAUGE, ()] for delta in hub.taken] == [1, 2]


def test_counts_wait_for_a_hub_that_is_away() -> None:
    hub, recorder = Hub(), Recorder()
    pusher = MetricsPusher(recorder, hub.push)
    hub.away = True
    for _ in range(3):
        recorder.increment(COUNTER, 10)
        asyncio.run(pusher.push())
    hub.away = False
    asyncio.run(pusher.push())
    assert hub.total == 30
    assert [delta.number for delta in hub.taken] == sorted({delta.number for delta in hub.taken})
