"""Who is suspected of ending replicas, and how suspects take turns."""

import asyncio

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


def test_nobody_is_convicted_by_what_happened_while_others_were_there() -> None:
    assert not suspicion_of(*[Loss.FAILED] * 50, alone=False).is_convicted


@pytest.mark.parametrize("loss", [Loss.MOVED, Loss.PAUSED])
def test_a_planned_move_clears_the_record(loss: Loss) -> None:
    assert not suspicion_of(*[Loss.FAILED] * 3, loss).is_suspect


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
