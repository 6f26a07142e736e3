"""Whether an engine makes progress, judged by its own recent iterations. Pure: knows neither threads nor Ray.

Being busy is no illness: an engine may compute for seconds on end, and the longer the more tokens it runs at once. But
no iteration of a healthy one takes many times as long as those of its size before it.
"""

import time
from collections import deque
from collections.abc import Callable, Mapping

RECENT = 64
"""Iterations of one size that tell what is usual for it."""
FACTOR = 10.0
LEAST_S = 3.0
"""No iteration is called stuck earlier: the machine itself may stop for a moment."""
FIRST_S = 60.0
"""For the first iteration of its size: it touches memory that nobody has touched before."""
FIRST_TOKEN_S = 0.25
"""For each of its tokens besides: seven billion parameters on one core without arithmetic in 16 bits."""
_SIZES = 64


def size_of(tokens: int) -> int:
    """Iterations of one size differ by less than twice in their tokens."""
    return tokens.bit_length()


def patience(longest: Mapping[int, float], tokens: int) -> float:
    """Seconds after which an iteration of so many tokens is taken for stuck.

    `longest` are the seconds that recent iterations took at most, by size; where none was of this size, those of the
    next larger one tell. How long more tokens take than were ever run at once is anybody's guess.
    """
    usual = next((longest[size] for size in range(size_of(tokens), _SIZES) if size in longest), None)
    return FIRST_S + FIRST_TOKEN_S * tokens if usual is None else max(LEAST_S, FACTOR * usual)


class Pulse:
    """The iterations of one engine. `began` and `finished` are called on its thread, `stuck_for` on any other."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._recent: dict[int, deque[float]] = {}
        self._longest: dict[int, float] = {}
        """Of `_recent`: other threads read a number where they cannot read a queue."""
        self._began: float | None = None
        self._tokens: Callable[[], int] = int

    def began(self, tokens: Callable[[], int]) -> None:
        """An iteration begins. `tokens` tells on any thread how many it runs, once that is decided; 0 is none."""
        self._tokens = tokens
        self._began = self._clock()

    def finished(self) -> None:
        """The iteration that began last is over. One that ran no token tells nothing of those that do."""
        assert self._began is not None, "no iteration has begun"
        seconds, tokens = self._clock() - self._began, self._tokens()
        self._began = None
        if tokens:
            recent = self._recent.setdefault(size_of(tokens), deque(maxlen=RECENT))
            recent.append(seconds)
            self._longest[size_of(tokens)] = max(recent)

    def stuck_for(self) -> float | None:
        """Seconds since the running iteration began, if that is too long; None if all is well."""
        began = self._began
        if began is None:
            return None
        seconds = self._clock() - began
        is_stuck = seconds > patience(self._longest, self._tokens())
        # Another iteration may have begun meanwhile, and the tokens be its own.
        return seconds if is_stuck and self._began == began else None
