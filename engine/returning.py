"""Streams that go on from another replica, until they have brought a token here: somebody has been reading them.

Owns who they are and which of them are about to; the scheduler decides what others wait for.
"""

import time
from collections.abc import Callable, Iterable

from engine.policy import LEAST_CHUNK
from engine.sequence import Sequence


class Returning:
    """Sequences that go on from elsewhere and have not drawn a token."""

    def __init__(
        self,
        is_loading: Callable[[Sequence], bool],
        patience_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`is_loading`: whether pages of a sequence are on their way from the tier; others wait for those of one
        sequence for `patience_s`."""
        self._sequences: set[Sequence] = set()
        self._is_loading = is_loading
        self._patience_s = patience_s
        self._clock = clock
        self._loading_since: dict[Sequence, float] = {}
        self._first_since: float | None = None
        """Since when those that decode have waited for the ones that are near; None while none are."""

    def __bool__(self) -> bool:
        return bool(self._sequences)

    def __contains__(self, sequence: Sequence) -> bool:
        return sequence in self._sequences

    def add(self, sequences: Iterable[Sequence]) -> None:
        self._sequences.update(sequences)

    def discard(self, sequence: Sequence) -> None:
        """It has drawn a token, or is over; one that never was here is ignored."""
        self._sequences.discard(sequence)
        self._loading_since.pop(sequence, None)

    def near(self, running: Iterable[Sequence]) -> list[Sequence]:
        """Those of which next to nothing is to be computed, or may be, as they wait for the tier; in their order."""
        if not self._sequences:
            return []
        return [sequence for sequence in running if sequence in self._sequences and self._is_near(sequence)]

    def come_first(self, near: list[Sequence]) -> bool:
        """Whether those that decode here wait for the ones that are near, too.

        These have been silent since their replica died, and each decode of a long context beside them takes as long as
        it takes one of them to go on. The others wait for `patience_s` at most, and once until none is near.
        """
        if not near:
            self._first_since = None
            return False
        now = self._clock()
        if self._first_since is None:
            self._first_since = now
        return now - self._first_since < self._patience_s

    def _is_near(self, sequence: Sequence) -> bool:
        if not self._is_loading(sequence):
            return sequence.num_remaining <= LEAST_CHUNK
        # Pages in memory come within milliseconds. A tier that is slow, or says nothing, is not to stop everybody.
        now = self._clock()
        return now - self._loading_since.setdefault(sequence, now) <= self._patience_s
