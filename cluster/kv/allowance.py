"""How fast pages may be saved: a bucket of them that fills with time. Knows neither pages nor the host."""

import sys
from collections.abc import Callable

BURST_S = 0.25
"""Seconds' worth of the bandwidth that may be used up at once."""


class Allowance:
    """How many pages the bandwidth for saving allows now."""

    def __init__(self, bandwidth: float | None, page_bytes: int, clock: Callable[[], float]) -> None:
        """`bandwidth`: bytes a second; None is no limit."""
        self._rate = None if bandwidth is None else bandwidth / page_bytes
        self._most = 0.0 if self._rate is None else max(1.0, self._rate * BURST_S)
        self._pages = self._most
        self._clock = clock
        self._filled = clock()

    def pages(self) -> int:
        """That may be taken now; negative while more were taken than that."""
        if self._rate is None:
            return sys.maxsize
        now = self._clock()
        self._pages = min(self._most, self._pages + (now - self._filled) * self._rate)
        self._filled = now
        return int(self._pages)

    def take(self, pages: int) -> None:
        """So many pages are to be copied."""
        if self._rate is not None:
            self._pages -= pages

    def give_back(self, pages: int) -> None:
        """So many of those that were taken were not copied after all."""
        if self._rate is not None:
            self._pages = min(self._most, self._pages + pages)
