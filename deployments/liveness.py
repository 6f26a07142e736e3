"""Whether an engine makes progress, judged by its own recent iterations. Pure: knows neither threads nor Ray.

Being busy is no illness: an engine may compute for seconds on end. But no iteration of a healthy one takes many times
as long as those before it.
"""

import time
from collections import deque
from collections.abc import Callable

RECENT = 64
"""Iterations that tell what is usual."""
FACTOR = 10.0
LEAST_S = 3.0
"""No iteration is called stuck earlier: the machine itself may stop for a moment."""
FIRST_S = 60.0
"""For an engine that has not finished any: the first touches memory that nobody has touched before."""


def patience(recent: list[float]) -> float:
    """Seconds after which an iteration is taken for stuck, by the seconds that recent ones took."""
    return max(LEAST_S, FACTOR * max(recent)) if recent else FIRST_S


class Pulse:
    """The iterations of one engine. `began` and `finished` are called on its thread, `stuck_for` on any other."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._recent: deque[float] = deque(maxlen=RECENT)
        self._began: float | None = None
        self._patience = patience([])

    def began(self) -> None:
        self._began = self._clock()

    def finished(self) -> None:
        """The iteration that began last is over."""
        assert self._began is not None, "no iteration has begun"
        self._recent.append(self._clock() - self._began)
        self._began = None
        self._patience = patience(list(self._recent))

    def stuck_for(self) -> float | None:
        """Seconds since the running iteration began, if that is too long; None if all is well."""
        began = self._began
        if began is None:
            return None
        seconds = self._clock() - began
        return seconds if seconds > self._patience else None
