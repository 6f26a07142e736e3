"""What a tier answers, waited for."""

import time

from engine.kv.tier import Answer, Tier

PATIENCE_S = 20.0


def answers_of(tier: Tier, count: int) -> list[Answer]:
    """The next answers, so many at least."""
    found: list[Answer] = []
    deadline = time.monotonic() + PATIENCE_S
    while len(found) < count:
        assert time.monotonic() < deadline, f"{len(found)} answers came, {count} were due"
        found += tier.poll(0.01)
    return found
