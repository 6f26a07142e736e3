"""When an iteration is taken for stuck."""

from deployments.liveness import FACTOR, FIRST_S, LEAST_S, RECENT, Pulse, patience


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def iterate(pulse: Pulse, clock: Clock, seconds: float) -> None:
    pulse.began()
    clock.now += seconds
    pulse.finished()


def test_patience_follows_the_longest_recent_iteration() -> None:
    assert patience([]) == FIRST_S
    assert patience([0.01, 0.02]) == LEAST_S
    assert patience([0.01, 2.0]) == 2.0 * FACTOR


def test_an_idle_engine_is_never_stuck() -> None:
    clock = Clock()
    pulse = Pulse(clock)
    iterate(pulse, clock, 0.01)
    clock.now += 1e6
    assert pulse.stuck_for() is None


def test_a_running_iteration_is_stuck_after_the_patience_and_not_before() -> None:
    clock = Clock()
    pulse = Pulse(clock)
    iterate(pulse, clock, 0.01)
    pulse.began()
    clock.now += LEAST_S
    assert pulse.stuck_for() is None
    clock.now += 0.5
    assert pulse.stuck_for() == LEAST_S + 0.5
    pulse.finished()
    assert pulse.stuck_for() is None


def test_long_iterations_are_usual_where_they_are_usual_and_forgotten_later() -> None:
    clock = Clock()
    pulse = Pulse(clock)
    iterate(pulse, clock, 4.0)
    pulse.began()
    clock.now += 39.0
    assert pulse.stuck_for() is None
    pulse.finished()
    for _ in range(RECENT):
        iterate(pulse, clock, 0.01)
    pulse.began()
    clock.now += LEAST_S + 1
    assert pulse.stuck_for() is not None


def test_the_first_iteration_has_all_the_time_it_may_need() -> None:
    clock = Clock()
    pulse = Pulse(clock)
    pulse.began()
    clock.now += FIRST_S - 1
    assert pulse.stuck_for() is None
