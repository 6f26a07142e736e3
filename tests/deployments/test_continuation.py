"""Streams over a backend whose replicas are lost at chosen moments."""

import asyncio
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass, field, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deployments import continuation
from deployments.backend import GenerationFailed, NotReady, ReplicaLost
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


@settings(deadline=None)
@given(
    n=st.integers(1, 4),
    max_tokens=st.integers(1, 8),
    # Not twice in a row without a token: that is another test's matter.
    cuts=st.lists(st.tuples(st.integers(1, 12), st.booleans()), max_size=6),
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


def test_three_losses_in_a_row_without_a_token_fail_the_request() -> None:
    replicas = Replicas([(0, lost()), (0, lost()), (0, lost())])
    with pytest.raises(GenerationFailed, match="3 replicas in a row were lost with this request"):
        asyncio.run(tokens_of(ContinuingBackend(replicas, timeout_s=1), make_request()))
    assert len(replicas.attempts) == 3


def test_a_token_between_losses_or_a_planned_move_clears_the_record() -> None:
    moved = FinishReason.MOVED
    request = make_request(max_tokens=9)
    for faults in ([(0, lost()), (0, lost()), (1, lost())] * 3, [(0, lost()), (0, lost()), (0, moved)] * 3):
        backend = ContinuingBackend(Replicas(list(faults)), timeout_s=1)
        assert asyncio.run(tokens_of(backend, request)) == wanted(request)


def test_suspects_are_tried_one_at_a_time() -> None:
    """Two innocents and a culprit are lost together, twice; then only the culprit takes a replica with it."""
    running: set[str] = set()
    together: list[set[str]] = []
    losses = {"a": 2, "b": 2, "culprit": 99}

    class Shared(Replicas):
        async def generate(self, request: Request) -> AsyncGenerator[Emission, None]:
            running.add(request.request_id)
            try:
                await asyncio.sleep(0.01)
                if losses[request.request_id]:
                    losses[request.request_id] -= 1
                    if losses["culprit"] < 97:
                        together.append(set(running))
                    raise lost()
                async for emission in super().generate(request):
                    yield emission
            finally:
                running.discard(request.request_id)

    async def scenario() -> list[object]:
        backend = ContinuingBackend(Shared(), timeout_s=1)
        requests = [Request(name, (1, 2, 3), SamplingParams(max_tokens=500)) for name in losses]
        return await asyncio.gather(*(tokens_of(backend, each) for each in requests), return_exceptions=True)

    first, second, culprit = asyncio.run(scenario())
    assert first == second == wanted(make_request(max_tokens=500))
    assert isinstance(culprit, GenerationFailed)
    assert all("culprit" in group for group in together)


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
