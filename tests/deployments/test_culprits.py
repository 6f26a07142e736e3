"""Requests that end their replicas, among others that are lost along with those."""

import asyncio
import time
from collections import Counter
from collections.abc import AsyncGenerator, Iterable
from contextlib import suppress
from dataclasses import replace

import pytest

from deployments import continuation, trials
from deployments.backend import GenerationFailed, ReplicaLost
from deployments.continuation import ContinuingBackend
from engine.sampling_params import SamplingParams
from engine.sequence import Emission, Request
from tests.deployments.lossy import Replicas, lost, make_request, tokens_of, wanted


class Shared(Replicas):
    """One replica at a time: a request that is poison ends it, and everybody there is lost."""

    def __init__(self, poison: str, brings_after_s: dict[str, float], ends_after_s: float = 0.01) -> None:
        super().__init__()
        self.failures: list[set[str]] = []
        """Who was there when it failed and had not had a token, each time."""
        self._poison = poison
        self._brings_after_s = brings_after_s
        self._ends_after_s = ends_after_s
        self._waiting: set[str] = set()
        self._failed = asyncio.Event()

    async def generate(self, request: Request) -> AsyncGenerator[Emission, None]:
        name, failed = request.request_id, self._failed
        self._waiting.add(name)
        try:
            if name == self._poison:
                await asyncio.sleep(self._ends_after_s)
                if failed is self._failed:
                    self.failures.append(set(self._waiting))
                    self._failed = asyncio.Event()
                    failed.set()
            with suppress(TimeoutError):
                await asyncio.wait_for(failed.wait(), self._brings_after_s[name])
                raise lost()
        finally:
            self._waiting.discard(name)
        async for emission in super().generate(request):
            yield emission


def run_together(replicas: Replicas, names: Iterable[str], max_tokens: int = 6) -> dict[str, object]:
    """What becomes of these requests."""

    async def scenario() -> dict[str, object]:
        backend = ContinuingBackend(replicas, timeout_s=60)
        requests = [Request(name, (1, 2, 3), SamplingParams(max_tokens=max_tokens)) for name in names]
        answers = await asyncio.gather(*(tokens_of(backend, each) for each in requests), return_exceptions=True)
        return dict(zip(names, answers, strict=True))

    return asyncio.run(asyncio.wait_for(scenario(), 30))


def test_suspects_are_tried_one_at_a_time_and_only_the_culprit_fails() -> None:
    innocent = {"a": 0.05, "b": 0.05, "c": 0.05}
    replicas = Shared("poison", {**innocent, "poison": 60.0})
    names = [*innocent, "poison"]
    answers = run_together(replicas, names)
    assert all(answers[name] == wanted(make_request()) for name in innocent)
    assert isinstance(answers["poison"], GenerationFailed)
    assert replicas.failures == [set(names)] * trials.SUSPECTED_AFTER + [{"poison"}] * trials.PROOFS


class Fragile(Replicas):
    """One replica at a time. A request that is poison ends it, with all that run there, soon after its first token."""

    def __init__(self, poison: str, ends_after_s: float) -> None:
        super().__init__()
        self.num_failures = 0
        self._poison = poison
        self._ends_after_s = ends_after_s

    def _fail(self) -> None:
        self.num_failures += 1

    async def generate(self, request: Request) -> AsyncGenerator[Emission, None]:
        began = self.num_failures
        timer: asyncio.TimerHandle | None = None
        async for emission in super().generate(request):
            if self.num_failures != began:
                raise lost()
            yield emission
            if timer is None and request.request_id == self._poison:
                timer = asyncio.get_running_loop().call_later(self._ends_after_s, self._fail)
            await asyncio.sleep(0.01)


def test_a_culprit_that_brings_a_token_every_time_fails_and_its_neighbours_do_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(trials, "PROBATION_S", 0.2)
    replicas = Fragile("poison", ends_after_s=0.05)
    names = ["a", "b", "c", "poison"]
    answers = run_together(replicas, names, max_tokens=100)
    assert all(answers[name] == wanted(make_request(max_tokens=100)) for name in names[:-1])
    assert isinstance(answers["poison"], GenerationFailed)
    assert replicas.num_failures == trials.REPEATED + trials.PROOFS


def test_a_culprit_that_fails_its_replica_long_after_its_first_token_does_so_eight_times(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(trials, "PROBATION_S", 0.02)
    replicas = Fragile("poison", ends_after_s=0.1)
    assert isinstance(run_together(replicas, ["poison"], max_tokens=500)["poison"], GenerationFailed)
    assert replicas.num_failures == trials.MOST_FAILURES


def test_a_suspect_waits_for_its_trial_no_longer_than_for_a_replica() -> None:
    """Another one is tried for as long as it takes: its first token does not come."""

    losses: Counter[str] = Counter()

    class Endless(Replicas):
        async def generate(self, request: Request) -> AsyncGenerator[Emission, None]:
            losses[request.request_id] += 1
            if losses[request.request_id] <= trials.SUSPECTED_AFTER:
                raise lost()
            await asyncio.Event().wait()
            yield Emission("", 0)

    async def scenario() -> None:
        backend = ContinuingBackend(Endless(), timeout_s=0.2)
        requests = [replace(make_request(), request_id=name) for name in ("a", "b")]
        both = [asyncio.ensure_future(tokens_of(backend, request)) for request in requests]
        done, tried = await asyncio.wait(both, timeout=5, return_when=asyncio.FIRST_COMPLETED)
        assert len(done) == len(tried) == 1, "it waits although its time is over"
        with pytest.raises(GenerationFailed, match="no replica went on with the request"):
            done.pop().result()
        tried.pop().cancel()

    asyncio.run(scenario())


def test_a_long_prompt_holds_no_other_suspect_up_and_is_not_taken_for_the_culprit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The culprit needs longer than a trial to end its replica, and the innocent longer still for its first token."""
    monkeypatch.setattr(trials, "TRIAL_S", 0.05)
    replicas = Shared("poison", {"long": 0.5, "poison": 60.0}, ends_after_s=0.15)
    answers = run_together(replicas, ("long", "poison"))
    assert answers["long"] == wanted(make_request())
    assert isinstance(answers["poison"], GenerationFailed)
    assert len(replicas.failures) < 20


def test_a_trial_ends_after_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trials, "TRIAL_S", 0.02)

    losses: Counter[str] = Counter()

    class Slow(Replicas):
        async def generate(self, request: Request) -> AsyncGenerator[Emission, None]:
            losses[request.request_id] += 1
            if losses[request.request_id] <= trials.SUSPECTED_AFTER:
                raise lost()
            await asyncio.sleep(0.5)
            async for emission in super().generate(request):
                yield emission

    names = [f"r{number}" for number in range(8)]
    began = time.monotonic()
    answers = run_together(Slow(), names)
    assert all(answer == wanted(make_request()) for answer in answers.values())
    assert time.monotonic() - began < 2.5, "they waited for each other"


def test_suspects_do_not_gather_while_there_is_no_replica(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else all of them would be tried together once it is there, and who is to blame would be left to luck."""
    monkeypatch.setattr(trials, "TRIAL_S", 0.1)
    monkeypatch.setattr(continuation, "RETRY_AFTER_S", 0.01)

    class Restarting(Shared):
        """After each failure there is none for longer than a trial."""

        back_at = 0.0

        async def ready(self) -> bool:
            return time.monotonic() >= self.back_at

        async def generate(self, request: Request) -> AsyncGenerator[Emission, None]:
            while not await self.ready():
                await asyncio.sleep(0.01)
            try:
                async for emission in super().generate(request):
                    yield emission
            except ReplicaLost:
                self.back_at = time.monotonic() + 0.5
                raise

    innocent = {"a": 0.02, "b": 0.02, "c": 0.02}
    replicas = Restarting("poison", {**innocent, "poison": 60.0})
    answers = run_together(replicas, [*innocent, "poison"])
    assert all(answers[name] == wanted(make_request()) for name in innocent)
    assert replicas.failures[trials.SUSPECTED_AFTER :] == [{"poison"}] * trials.PROOFS
