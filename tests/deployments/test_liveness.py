"""When an iteration is taken for stuck."""

import pytest

from deployments.liveness import FACTOR, FIRST_S, FIRST_TOKEN_S, LEAST_S, RECENT, Pulse, patience, size_of


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def iterate(pulse: Pulse, clock: Clock, seconds: float, tokens: int = 1) -> None:
    pulse.began(lambda: tokens)
    clock.now += seconds
    pulse.finished()


def test_patience_follows_the_longest_recent_iteration_of_the_size() -> None:
    longest = {size_of(1): 0.02, size_of(8): 2.0, size_of(1024): 7.0}
    assert patience(longest, 1) == LEAST_S
    assert patience(longest, 8) == patience(longest, 15) == 2.0 * FACTOR
    assert patience(longest, 1024) == 7.0 * FACTOR


def test_a_size_that_was_never_seen_has_the_patience_of_the_next_larger_one() -> None:
    longest = {size_of(8): 2.0, size_of(1024): 7.0}
    assert patience(longest, 0) == patience(longest, 1) == 2.0 * FACTOR
    assert patience(longest, 100) == 7.0 * FACTOR
    assert patience(longest, 5000) == patience({}, 5000) == FIRST_S + 5000 * FIRST_TOKEN_S


def test_an_idle_engine_is_never_stuck() -> None:
    clock = Clock()
    pulse = Pulse(clock)
    assert pulse.stuck_for() is None
    iterate(pulse, clock, 0.01)
    clock.now += 1e6
    assert pulse.stuck_for() is None


def test_a_running_iteration_is_stuck_after_the_patience_and_not_before() -> None:
    clock = Clock()
    pulse = Pulse(clock)
    iterate(pulse, clock, 0.01)
    pulse.began(lambda: 1)
    clock.now += LEAST_S
    assert pulse.stuck_for() is None
    clock.now += 0.5
    assert pulse.stuck_for() == LEAST_S + 0.5
    pulse.finished()
    assert pulse.stuck_for() is None


@pytest.mark.parametrize("decodes", [1, RECENT, 10 * RECENT])
def test_a_long_prompt_after_short_iterations_is_not_stuck(decodes: int) -> None:
    """Three billion parameters on two cores: 0.15 s a token alone, 7 s for 1024 at once; the first time, and later."""
    clock = Clock()
    pulse = Pulse(clock)
    iterate(pulse, clock, 1.5, tokens=100)
    for _ in range(2):
        for _ in range(decodes):
            iterate(pulse, clock, 0.15, tokens=3)
        tokens = {"now": 0}
        pulse.began(lambda tokens=tokens: tokens["now"])
        assert pulse.stuck_for() is None, "what it runs is not decided yet"
        tokens["now"] = 1024
        clock.now += 7.0
        assert pulse.stuck_for() is None
        pulse.finished()


def test_a_long_prompt_does_not_hide_short_iterations_that_hang() -> None:
    clock = Clock()
    pulse = Pulse(clock)
    iterate(pulse, clock, 0.15)
    iterate(pulse, clock, 7.0, tokens=1024)
    pulse.began(lambda: 1)
    clock.now += LEAST_S + 0.1
    assert pulse.stuck_for() is not None


def test_long_iterations_are_usual_where_they_are_usual_and_forgotten_later() -> None:
    clock = Clock()
    pulse = Pulse(clock)
    iterate(pulse, clock, 4.0)
    pulse.began(lambda: 1)
    clock.now += 39.0
    assert pulse.stuck_for() is None
    pulse.finished()
    for _ in range(RECENT):
        iterate(pulse, clock, 0.01)
    pulse.began(lambda: 1)
    clock.now += LEAST_S + 1
    assert pulse.stuck_for() is not None


def test_iterations_without_a_token_tell_nothing_of_those_with_some() -> None:
    """They wait for pages, for milliseconds."""
    clock = Clock()
    pulse = Pulse(clock)
    for _ in range(RECENT):
        iterate(pulse, clock, 0.005, tokens=0)
    for tokens in (0, 1):
        pulse.began(lambda tokens=tokens: tokens)
        clock.now += FIRST_S - 1
        assert pulse.stuck_for() is None


def test_the_first_iteration_has_all_the_time_it_may_need() -> None:
    clock = Clock()
    pulse = Pulse(clock)
    pulse.began(lambda: 1024)
    clock.now += FIRST_S + 100
    assert pulse.stuck_for() is None
    clock.now += 1024 * FIRST_TOKEN_S
    assert pulse.stuck_for() is not None
