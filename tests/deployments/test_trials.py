"""Who is suspected of ending replicas, and how suspects take turns."""

import asyncio
import random

import pytest

from deployments import trials
from deployments.backend import Loss
from deployments.trials import Court, Suspicion, Trial


def suspicion_of(*losses: Loss, alone: bool = True) -> Suspicion:
    found = Suspicion()
    for loss in losses:
        found.lost(loss, alone=alone)
    return found


def test_two_failures_in_a_row_make_a_suspect_and_two_more_alone_convict_it() -> None:
    assert not suspicion_of(Loss.FAILED).is_suspect
    assert suspicion_of(Loss.FAILED, Loss.GONE, Loss.FAILED).is_suspect
    assert not suspicion_of(*[Loss.FAILED] * 3).is_convicted
    assert suspicion_of(*[Loss.FAILED] * 4).is_convicted


def test_what_happened_while_others_were_there_proves_nothing() -> None:
    assert not suspicion_of(*[Loss.FAILED] * (trials.MOST_FAILURES - 1), alone=False).is_convicted


def test_two_silent_replicas_speak_against_a_request_like_one_that_failed() -> None:
    assert not suspicion_of(*[Loss.SILENT] * 3).is_suspect
    assert suspicion_of(*[Loss.SILENT] * 4).is_suspect
    assert not suspicion_of(*[Loss.SILENT] * 7).is_convicted
    assert suspicion_of(*[Loss.SILENT] * 8).is_convicted


def test_nobody_survives_eight_failures_with_little_between_them() -> None:
    found = Suspicion()
    for count in range(1, trials.MOST_FAILURES + 1):
        found.acquit()
        found.lost(Loss.FAILED, alone=False, brought=trials.MUCH - 1)
        assert found.is_suspect is (count >= trials.REPEATED)
        assert found.is_convicted is (count >= trials.MOST_FAILURES)


def test_a_long_answer_outlives_any_number_of_replicas_that_are_killed_around_it() -> None:
    found = Suspicion()
    for _ in range(100):
        found.acquit()
        found.lost(Loss.FAILED, alone=False, brought=trials.MUCH)
        assert not found.is_suspect


@pytest.mark.parametrize("seed", range(20))
def test_200_kills_at_random_convict_none_of_the_streams_that_they_hit(seed: int) -> None:
    """On two replicas, 32 streams at a time, of which each lives through one to five kills."""
    rng = random.Random(seed)
    streams: list[tuple[Suspicion, int]] = [(Suspicion(), 0)] * 32
    for kill in range(200):
        for place, (stream, end) in enumerate(streams):
            if kill >= end:
                stream, end = streams[place] = Suspicion(), kill + rng.randint(1, 5)
            if rng.random() < 0.5:
                brought = rng.choice([0, *range(1, 40)])
                if brought:
                    stream.acquit()
                stream.lost(Loss.FAILED, alone=rng.random() < 0.5, brought=brought)
            assert not stream.is_convicted


@pytest.mark.parametrize("loss", [Loss.MOVED, Loss.PAUSED])
def test_a_planned_move_clears_the_record(loss: Loss) -> None:
    assert not suspicion_of(*[Loss.FAILED] * 3, loss).is_suspect


def test_a_request_that_was_lost_repeatedly_is_tried_for_a_while_beyond_its_first_token(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(trials, "PROBATION_S", 0.05)

    async def scenario() -> None:
        court = Court()
        repeated = Suspicion()
        for _ in range(trials.REPEATED):
            repeated.lost(Loss.FAILED, alone=False, brought=1)
        async with Trial(court, repeated) as trial:
            trial.begin()
            trial.brought()
            assert trial.alone and court.seat.locked()
            await asyncio.sleep(0.2)
            assert not trial.alone and not court.seat.locked()
        async with Trial(court, suspicion_of(Loss.FAILED, Loss.FAILED)) as trial:
            trial.brought()
            assert not trial.alone and not court.seat.locked()

    asyncio.run(scenario())


def test_each_trial_may_take_twice_as_long_as_the_one_before() -> None:
    times = [suspicion_of(*[Loss.FAILED] * count, alone=False).trial_s() for count in (2, 3, 4)]
    assert times == [trials.TRIAL_S, 2 * trials.TRIAL_S, 4 * trials.TRIAL_S]


def test_one_suspect_at_a_time_and_none_beside_one_whose_time_was_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trials, "TRIAL_S", 0.02)

    async def scenario() -> None:
        court, suspicion = Court(), suspicion_of(Loss.FAILED, Loss.FAILED)
        first, second, third = (Trial(court, suspicion) for _ in range(3))
        await first.__aenter__()
        waiting = asyncio.ensure_future(second.__aenter__())
        await asyncio.sleep(0.05)
        assert first.alone and not waiting.done(), "its time does not run before it begins"
        first.begin()
        await waiting
        assert not first.alone and not second.alone
        first.end()
        second.end()
        second.end()
        async with third:
            assert third.alone
        async with Trial(court, Suspicion()) as none:
            assert not none.alone and not court.seat.locked(), "who is no suspect holds nobody up"

    asyncio.run(asyncio.wait_for(scenario(), 5))
