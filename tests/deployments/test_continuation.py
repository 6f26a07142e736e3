"""Streams over a backend whose replicas are lost at chosen moments."""

import asyncio
import time
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deployments import continuation, trials
from deployments.backend import GenerationFailed, Loss, NotReady, ReplicaLost
from deployments.continuation import ContinuingBackend, Progress
from deployments.messages import ModelCard
from engine.batch import TokenLogprob
from engine.sampling_params import SamplingParams
from engine.sequence import Emission, FinishReason, Request
from tests.deployments.fakes import FakeEngine, token_at

Fault = Callable[[Request], AsyncGenerator[Emission, None]]


@dataclass
class Replicas:
    """A backend whose attempts end as they are told: after so many emissions, with an exception; then it works."""

    faults: list[tuple[int, Exception | FinishReason]] = field(default_factory=list)
    attempts: list[Request] = field(default_factory=list)

    async def generate(self, request: Request) -> AsyncGenerator[Emission, None]:
        self.attempts.append(request)
        left, fault = self.faults.pop(0) if self.faults else (-1, None)
        engine = FakeEngine(step_s=0)
        engine.add(request)
        while engine.has_work():
            for emission in engine.step():
                if left == 0:
                    if isinstance(fault, FinishReason):
                        yield Emission(request.request_id, emission.sample_index, finish_reason=fault)
                        return
                    assert fault is not None
                    raise fault
                left -= 1
                yield emission
                await asyncio.sleep(0)

    async def card(self) -> ModelCard:
        raise NotImplementedError

    async def ready(self) -> bool:
        return True

    async def metrics(self) -> bytes:
        return b""


def lost() -> ReplicaLost:
    return ReplicaLost("it was killed")


def make_request(n: int = 1, max_tokens: int = 6, **params: object) -> Request:
    return Request("r", (1, 2, 3), SamplingParams(n=n, max_tokens=max_tokens, **params))  # type: ignore[arg-type]


async def tokens_of(backend: ContinuingBackend, request: Request) -> list[list[int]]:
    found: list[list[int]] = [[] for _ in range(request.params.n)]
    async for emission in backend.generate(request):
        found[emission.sample_index].extend(emission.token_ids)
    return found


def wanted(request: Request) -> list[list[int]]:
    count = request.params.max_tokens or 0
    return [[token_at(request, sample, index) for index in range(count)] for sample in range(request.params.n)]


@given(
    n=st.integers(1, 4),
    max_tokens=st.integers(1, 8),
    # Not twice in a row without a token, nor again and again: that is another test's matter.
    cuts=st.lists(st.tuples(st.integers(1, 12), st.booleans()), max_size=trials.REPEATED),
)
def test_whatever_is_lost_every_sample_brings_its_tokens_once(
    n: int, max_tokens: int, cuts: list[tuple[int, bool]]
) -> None:
    replicas = Replicas([(after, FinishReason.MOVED if moved else lost()) for after, moved in cuts])
    request = make_request(n, max_tokens)
    assert asyncio.run(tokens_of(ContinuingBackend(replicas, timeout_s=1), request)) == wanted(request)


def test_an_attempt_is_given_what_came_before_it_and_not_the_samples_that_finished() -> None:
    progress = Progress(make_request(3))
    assert progress.rest().given == ()
    progress.note(Emission("r", 0, (7,)))
    progress.note(Emission("r", 2, (8, 9), finish_reason=FinishReason.STOP))
    rest = progress.rest()
    assert rest.given == ((7,), (), None) and rest.open_samples == (0, 1)
    assert not progress.done


def test_a_request_that_had_begun_elsewhere_goes_on_from_there_every_time() -> None:
    begun = replace(make_request(3, seed=5), given=((7,), None, ()), num_scored=2)
    progress = Progress(begun)
    assert progress.rest() == begun
    progress.note(Emission("r", 0, (8,)))
    progress.note(Emission("r", 2, (9,), finish_reason=FinishReason.LENGTH))
    assert progress.rest() == replace(begun, given=((7, 8), None, None))


def test_the_seed_is_drawn_once() -> None:
    replicas = Replicas([(1, lost())])
    asyncio.run(tokens_of(ContinuingBackend(replicas, timeout_s=1), make_request()))
    first, second = replicas.attempts
    assert first.params.seed is not None and first.params.seed == second.params.seed
    assert Progress(make_request()).rest().params.seed != first.params.seed
    assert Progress(make_request(seed=5)).rest().params.seed == 5


def test_logprobs_of_the_prompt_that_were_reported_are_not_asked_for_again() -> None:
    progress = Progress(make_request(prompt_logprobs=0))
    progress.note(Emission("r", 0, prompt_logprobs=(TokenLogprob(2, -1.0, 1),)))
    rest = progress.rest()
    assert rest.num_scored == 1 and rest.given == ((),)


def test_a_stream_that_was_complete_when_its_replica_went_is_complete() -> None:
    request = make_request(max_tokens=3)

    class Late(Replicas):
        async def generate(self, request: Request) -> AsyncGenerator[Emission, None]:
            async for emission in super().generate(request):
                yield emission
            raise lost()

    assert asyncio.run(tokens_of(ContinuingBackend(Late(), timeout_s=1), request)) == wanted(request)


def test_a_request_that_ends_every_replica_fails_after_four_of_them() -> None:
    replicas = Replicas([(0, lost())] * 9)
    with pytest.raises(GenerationFailed, match="4 replicas in a row failed with this request"):
        asyncio.run(tokens_of(ContinuingBackend(replicas, timeout_s=1), make_request()))
    assert len(replicas.attempts) == 4


def test_a_token_between_failures_or_a_planned_move_clears_the_record() -> None:
    moved = FinishReason.MOVED
    request = make_request(max_tokens=9)
    for last in ((1, lost()), (0, moved)):
        replicas = Replicas([*[(0, lost())] * 3, last, (0, lost())])
        assert asyncio.run(tokens_of(ContinuingBackend(replicas, timeout_s=1), request)) == wanted(request)


def test_replicas_that_are_gone_are_no_evidence_against_a_request(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(continuation, "RETRY_AFTER_S", 0.0)
    request = make_request()
    replicas = Replicas([(0, ReplicaLost("it was scaled away", Loss.GONE))] * 20)
    assert asyncio.run(tokens_of(ContinuingBackend(replicas, timeout_s=1), request)) == wanted(request)


def test_a_request_that_silences_every_replica_fails_after_eight_of_them() -> None:
    replicas = Replicas([(0, ReplicaLost("it was stopped", Loss.SILENT))] * 20)
    with pytest.raises(GenerationFailed, match="4 replicas in a row failed with this request"):
        asyncio.run(tokens_of(ContinuingBackend(replicas, timeout_s=60), make_request()))
    assert len(replicas.attempts) == 8


@pytest.mark.parametrize(
    ("loss", "most"), [(Loss.FAILED, trials.MOST_FAILURES), (Loss.SILENT, 2 * trials.MOST_FAILURES)]
)
def test_a_token_before_each_failure_does_not_let_a_request_end_replicas_for_ever(loss: Loss, most: int) -> None:
    replicas = Replicas([(1, ReplicaLost("it died", loss))] * 99)
    with pytest.raises(GenerationFailed, match=r"\d replicas failed with this request"):
        asyncio.run(tokens_of(ContinuingBackend(replicas, timeout_s=60), make_request(max_tokens=500)))
    assert len(replicas.attempts) <= most


def test_who_is_gone_may_not_be_so_for_ever() -> None:
    now = iter(range(0, 1000, 7))
    replicas = Replicas([(0, ReplicaLost("silent", Loss.GONE))] * 99)
    backend = ContinuingBackend(replicas, timeout_s=20, clock=lambda: float(next(now)))
    with pytest.raises(GenerationFailed, match="no replica went on with the request within 20 s"):
        asyncio.run(tokens_of(backend, make_request()))
    assert len(replicas.attempts) == 4


def test_every_interruption_is_counted_by_its_reason() -> None:
    counted: list[str] = []
    losses = [(1, ReplicaLost("", loss)) for loss in Loss]
    backend = ContinuingBackend(Replicas([*losses, (1, FinishReason.MOVED)]), timeout_s=1, count=counted.append)
    asyncio.run(tokens_of(backend, make_request(max_tokens=9)))
    assert counted == ["lost", "lost", "lost", "moved", "paused", "moved"]


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


def test_without_a_replica_it_waits_and_goes_on_when_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(continuation, "RETRY_AFTER_S", 0.0)
    request = make_request()
    replicas = Replicas([(2, lost()), (0, NotReady("none")), (0, NotReady("none")), (0, NotReady("none"))])
    assert asyncio.run(tokens_of(ContinuingBackend(replicas, timeout_s=60), request)) == wanted(request)


def test_it_does_not_wait_for_ever() -> None:
    now = iter(range(0, 1000, 7))
    replicas = Replicas([(2, lost()), *[(0, NotReady("none"))] * 20])
    backend = ContinuingBackend(replicas, timeout_s=10, clock=lambda: float(next(now)))
    with pytest.raises(GenerationFailed, match="no replica went on with the request within 10 s"):
        asyncio.run(tokens_of(backend, make_request()))


def test_a_request_that_no_replica_ever_took_is_not_ready() -> None:
    with pytest.raises(NotReady):
        asyncio.run(tokens_of(ContinuingBackend(Replicas([(0, NotReady("none"))]), timeout_s=10), make_request()))


def test_other_failures_are_final() -> None:
    with pytest.raises(GenerationFailed, match="not finite"):
        asyncio.run(
            tokens_of(ContinuingBackend(Replicas([(2, GenerationFailed("not finite"))]), timeout_s=1), make_request())
        )
