"""What the keeper of KV hosts makes of their snapshots and silences, and what keeps it from none of them."""

import asyncio
import itertools
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from cluster.config import KVTierConfig
from cluster.kv.stats import HostStats
from deployments import kv_hosts
from deployments.kv_hosts import MOST_MISSED, MOST_MISSED_AT_START, HostMeter, KVHosts, Silences
from monitoring.recorder import Delta, Recorder
from monitoring.store import MetricsStore

NONE = HostStats(*[0] * 12)
EVICTIONS = "manta:kv_host_evictions_total"
PAGES = "manta:kv_host_memory_pages"


def test_counters_grow_by_what_happened_since_the_last_look_and_survive_restarts() -> None:
    recorder = Recorder()
    meter = HostMeter(recorder)
    meter.update("a", replace(NONE, evictions_total=100))
    assert not recorder.drain().counters, "what happened before this keeper was counted by the one before"
    meter.update("a", replace(NONE, evictions_total=107))
    assert recorder.drain().counters == {(EVICTIONS, ("a",)): 7}
    meter.update("a", replace(NONE, evictions_total=2))
    assert recorder.drain().counters == {(EVICTIONS, ("a",)): 2}, "the host was started again"


def test_nodes_are_told_apart_and_gone_ones_show_nothing() -> None:
    recorder, store = Recorder(), MetricsStore("tiny")
    meter = HostMeter(recorder)
    for node, pages in (("a", 3), ("b", 5)):
        meter.update(node, replace(NONE, memory_pages=pages))
    store.push("keeper", recorder.drain())
    exposition = store.render().decode()
    assert f'{PAGES}{{model_name="tiny",node="a"}} 3.0' in exposition
    assert f'{PAGES}{{model_name="tiny",node="b"}} 5.0' in exposition
    meter.forget("a")
    store.push("keeper", recorder.drain())
    exposition = store.render().decode()
    assert 'node="a"' not in exposition and 'node="b"' in exposition


def misses_until_given_up(silences: Silences, node: str) -> int:
    return next(count for count in range(1, 100) if silences.timed_out(node))


def test_a_host_that_hangs_is_given_up_and_one_that_starts_has_more_time() -> None:
    silences = Silences()
    assert misses_until_given_up(silences, "a") == MOST_MISSED_AT_START
    silences.answered("a")
    silences.answered("b")
    assert misses_until_given_up(silences, "a") == MOST_MISSED
    assert misses_until_given_up(silences, "a") == MOST_MISSED_AT_START, "it is being started again"
    assert misses_until_given_up(silences, "b") == MOST_MISSED, "hosts are told apart"


def test_a_host_that_was_late_or_was_started_again_has_all_the_time_again() -> None:
    silences = Silences()
    for again, most in ((silences.answered, MOST_MISSED), (silences.gone, MOST_MISSED_AT_START)):
        silences.answered("a")
        assert not any(silences.timed_out("a") for _ in range(MOST_MISSED - 1))
        again("a")
        assert misses_until_given_up(silences, "a") == most


def test_silence_is_news_once_until_it_is_over() -> None:
    silences = Silences()
    assert [silences.is_news("a") for _ in range(3)] == [True, False, False]
    assert silences.is_news("b")
    silences.answered("a")
    assert silences.is_news("a")


class Host:
    """A host as its keeper reaches it."""

    def __init__(self, *, silent: bool = False, keeper: int = 0) -> None:
        self.keepers: list[int] = []
        """Who has renewed it, each time."""
        self.keeper = SimpleNamespace(remote=self._number)
        self.renew = SimpleNamespace(remote=self._renew)
        self._silent = silent
        self._keeper = keeper

    async def _number(self) -> int:
        return self._keeper

    async def _renew(self, keeper: int, config: KVTierConfig, others: dict[str, Any]) -> HostStats:
        self.keepers.append(keeper)
        if self._silent:
            await asyncio.Event().wait()
        return NONE


class Keeper(KVHosts):
    def __del__(self) -> None:  # type: ignore[override]
        """Unlike Serve, Python does not await it."""


@asynccontextmanager
async def keeping(monkeypatch: pytest.MonkeyPatch, start: Callable[..., dict[str, Host]]) -> AsyncIterator[None]:
    """A keeper in a hurry."""

    async def push(source: str, delta: Delta) -> None:
        pass

    monkeypatch.setattr(kv_hosts, "PERIOD_S", 0.01)
    monkeypatch.setattr(kv_hosts, "LOOK_EVERY_S", 0.01)
    monkeypatch.setattr(kv_hosts, "TAKE_OVER_S", 0.2)
    monkeypatch.setattr(kv_hosts, "configure_logging", lambda name: None)
    monkeypatch.setattr(kv_hosts, "start_hosts", start)
    monkeypatch.setattr(kv_hosts.serve, "get_replica_context", lambda: SimpleNamespace(app_name="served"))
    hub = SimpleNamespace(options=lambda method_name: SimpleNamespace(remote=push))
    keeper = Keeper.__new__(Keeper)
    await keeper.__init__(KVTierConfig(memory=2**20), hub)
    try:
        yield
    finally:
        for task in (*keeper._tasks, *keeper._renewals.values()):
            task.cancel()


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.01)


async def is_renewed(host: Host) -> None:
    """Returns once the host has been renewed some more times."""
    before = len(host.keepers)
    await until(lambda: len(host.keepers) > before + 3)


def test_a_control_plane_that_hangs_costs_no_host_its_lease(monkeypatch: pytest.MonkeyPatch) -> None:
    host, looks = Host(), itertools.count()
    looking, over = threading.Event(), threading.Event()

    def start(*arguments: object) -> dict[str, Host]:
        if next(looks):
            looking.set()
            over.wait(60)
        return {"a": host}

    async def scenario() -> None:
        try:
            async with keeping(monkeypatch, start):
                await until(looking.is_set)
                await is_renewed(host)
        finally:
            over.set()

    asyncio.run(scenario())


def test_a_host_that_hangs_and_a_kill_that_hangs_cost_no_other_host_its_lease(monkeypatch: pytest.MonkeyPatch) -> None:
    hosts = {"a": Host(silent=True), "b": Host()}
    killing, over = threading.Event(), threading.Event()

    def kill(host: Host, *, no_restart: bool) -> None:
        assert host is hosts["a"] and not no_restart
        killing.set()
        over.wait(60)

    monkeypatch.setattr(kv_hosts.ray, "kill", kill)
    monkeypatch.setattr(kv_hosts, "ANSWER_TIMEOUT_S", 1.0)
    monkeypatch.setattr(kv_hosts, "MOST_MISSED_AT_START", 2)

    async def scenario() -> None:
        try:
            async with keeping(monkeypatch, lambda *arguments: hosts):
                await until(lambda: hosts["a"].keepers)
                await is_renewed(hosts["b"])
                assert len(hosts["a"].keepers) == 1, "it still has time to answer"
                await until(killing.is_set)
                await is_renewed(hosts["b"])
        finally:
            over.set()

    asyncio.run(scenario())


def test_nodes_that_come_are_kept_and_those_that_go_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    old, new = Host(), Host()
    hosts = {"a": old}

    async def scenario() -> None:
        nonlocal hosts
        async with keeping(monkeypatch, lambda *arguments: hosts):
            await is_renewed(old)
            hosts = {"b": new}
            await is_renewed(new)
            before = len(old.keepers)
            await is_renewed(new)
            assert len(old.keepers) == before

    asyncio.run(scenario())


def test_it_is_numbered_after_the_keepers_before_it_whatever_the_clock_says(monkeypatch: pytest.MonkeyPatch) -> None:
    hosts = {"a": Host(keeper=10**20), "b": Host(keeper=5)}

    async def scenario() -> None:
        async with keeping(monkeypatch, lambda *arguments: hosts):
            await is_renewed(hosts["b"])

    asyncio.run(scenario())
    assert {keeper for host in hosts.values() for keeper in host.keepers} == {10**20 + 1}


def test_it_has_its_hosts_before_it_calls_itself_started(monkeypatch: pytest.MonkeyPatch) -> None:
    """Serve ends the keeper before it as soon as that is so, and that one would end the hosts."""
    hosts = {"a": Host(keeper=10**20), "b": Host(silent=True)}

    async def scenario() -> None:
        async with keeping(monkeypatch, lambda *arguments: hosts):
            assert hosts["a"].keepers == [10**20 + 1]

    asyncio.run(scenario())
