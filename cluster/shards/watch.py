"""Which rank of a group is lost, and why: judged by what each says, and for how long it has said nothing. Pure.

A rank that dies takes others with it: they fail at their connection to it, and say so, while it says nothing any more.
So a fault is not believed at once where another rank may turn out to be its cause, least of all one that says so.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

BEAT_S = 0.25
"""Between two beats of a rank."""
SILENCE_S = 1.5
"""After which a rank that says nothing is lost."""
LOADING_SILENCE_S = 30.0
"""The same while ranks load and get ready: imports and first touches of memory may keep a process from all else."""
QUIET_S = 0.75
"""After which it may well be."""
GRACE_S = 0.2
"""For the end of a process to be known: longer than Ray mostly takes to tell."""
SEARCH_S = 1.0
"""For the cause of faults that others are to blame for."""


@dataclass(frozen=True, slots=True)
class Loss:
    """The rank that is lost, and what was said by or of others meanwhile, which may follow from it."""

    rank: int
    reason: str
    others: tuple[tuple[int, str], ...] = ()


class Watch:
    """What is known of the ranks of one group. All methods are called on one thread."""

    def __init__(self, ranks: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._looked = clock()
        self._silence = SILENCE_S
        self._heard: dict[int, float] = {}
        """Ranks that are to be heard, with when they last were."""
        self._finished = [0] * ranks
        self._waited_s = [0.0] * ranks
        self._faults: dict[int, str] = {}
        self._gone: dict[int, str] = {}
        """Both in the order in which they came."""
        self._victims: set[int] = set()
        """Ranks whose fault is that they have lost others."""
        self._since: float | None = None
        """When the first sign of a loss was seen."""

    @property
    def finished(self) -> tuple[int, ...]:
        """Batches that each rank has finished, by its latest beat."""
        return tuple(self._finished)

    @property
    def waited_s(self) -> tuple[float, ...]:
        """Seconds that each rank had nothing to run, by its latest beat."""
        return tuple(self._waited_s)

    def arm(self, silence: float = SILENCE_S) -> None:
        """From now on each rank is to be heard, and is lost when it says nothing for so many seconds."""
        self._silence = silence
        self._heard = dict.fromkeys(range(len(self._finished)), self._clock())

    def beat(self, rank: int, finished: int, waited_s: float) -> None:
        self._finished[rank] = finished
        self._waited_s[rank] = waited_s
        if rank in self._heard:
            self._heard[rank] = self._clock()

    def fault(self, rank: int, reason: str, *, is_victim: bool = False) -> None:
        """It says that it cannot go on, or, as a victim, that others do not."""
        if rank not in self._faults:
            self._faults[rank] = reason
            if is_victim:
                self._victims.add(rank)

    def gone(self, rank: int, reason: str) -> None:
        """Its process has ended."""
        self._gone.setdefault(rank, reason)

    def verdict(self) -> Loss | None:
        """The loss, once its cause is as clear as it will be. Is to be asked every BEAT_S or so."""
        now = self._clock()
        self._forgive_own_absence(now)
        silent = self._silent_for(self._silence, now)
        if not (self._faults or self._gone or silent):
            return None
        if self._since is None:
            self._since = now
        # Whoever ended without a word did so first: those with a fault had the time to say it.
        wordless = {rank: why for rank, why in self._gone.items() if rank not in self._faults}
        if wordless:
            return self._loss(next(iter(wordless.items())))
        if silent:
            rank = silent[0]
            seconds = now - self._heard[rank]
            return self._loss((rank, f"silent for {seconds:.1f} s, after {self._finished[rank]} batches"))
        own = {rank: why for rank, why in self._faults.items() if rank not in self._victims}
        if own:
            return None if now - self._since < GRACE_S else self._loss(next(iter(own.items())))
        if now - self._since < SEARCH_S or self._silent_for(QUIET_S, now):
            return None
        return self._loss(next(iter(self._faults.items())))

    def _silent_for(self, seconds: float, now: float) -> list[int]:
        """Ranks of which nothing is known but that they have said nothing for so long."""
        known = self._faults.keys() | self._gone.keys()
        return [rank for rank, heard in self._heard.items() if rank not in known and now - heard >= seconds]

    def _forgive_own_absence(self, now: float) -> None:
        """Whoever was not there to listen, as its process or the machine was stopped, cannot say who was silent."""
        absent = now - self._looked - 2 * BEAT_S
        self._looked = now
        if absent > 0:
            self._heard = {rank: heard + absent for rank, heard in self._heard.items()}

    def _loss(self, cause: tuple[int, str]) -> Loss:
        rank, reason = cause
        said = self._faults | {other: why for other, why in self._gone.items() if other not in self._faults}
        return Loss(rank, reason, tuple((other, why) for other, why in said.items() if other != rank))
