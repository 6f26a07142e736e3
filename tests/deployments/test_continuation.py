"""Streams over a backend whose replicas are lost at chosen moments."""

import asyncio
from collections.abc import AsyncGenerator
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deployments import continuation, trials
from deployments.backend import GenerationFailed, Loss, NotReady, ReplicaLost
from deployments.continuation import ContinuingBackend, Progress
from engine.batch import TokenLogprob
from engine.sequence import Emission, FinishReason, Request
from tests.deployments.lossy import Replicas, lost, make_request, tokens_of, wanted


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
