"""A load of pages from a KV host that is under way: what is taken of what the host has, what has come, what it cost.

Books of one load and of what loads cost; sends nothing and copies nothing: that is the client's.
"""

from collections import Counter
from dataclasses import dataclass, field

from cluster.kv.wire import ELSEWHERE, ON_DISK, WireError
from engine.kv.costs import CopyCost, LoadPolicy
from engine.kv.tier import Load, Loaded

MEMORY_GUESS = 0.25e-9
"""Seconds a byte of a copy between the device and the host's memory, until copies have been measured."""
_FETCH_GUESS = 2e-9
_MEMORY = 0


class LoadCosts:
    """What it has cost to bring pages, by the medium on which they lay."""

    def __init__(self, page_bytes: int) -> None:
        self.memory = CopyCost(MEMORY_GUESS * page_bytes)
        self._media = {_MEMORY: self.memory} | {
            medium: CopyCost(_FETCH_GUESS * page_bytes) for medium in (ON_DISK, ELSEWHERE)
        }

    def page_seconds(self, medium: int) -> float:
        return self._media[medium].page_seconds

    def observe(self, medium: int, pages: int, seconds: float) -> None:
        self._media[medium].observe(pages, seconds)


@dataclass(slots=True)
class RunningLoad:
    """A load that has not been answered."""

    number: int
    """By which the host knows it."""
    load: Load
    began: float
    heard: float
    """When the host last said something of it."""
    found: bool = False
    """Whether the host has said what it has."""
    wanted: int = 0
    """Pages that were decided on."""
    copied: int = 0
    is_whole: bool = True
    """Whether all that was decided on has come, or still may."""
    fetched: float = 0.0
    """When pages were asked for that were not in memory."""
    predicted: float = 0.0
    slow: Counter[int] = field(default_factory=Counter)
    """Pages wanted of each medium but memory."""

    def decide(self, slots: list[int], costs: LoadCosts, choose: LoadPolicy, now: float) -> int:
        """Takes as many of the pages that the host has as it pays to wait for; of these, those before the first that
        is not in memory.

        `slots`: where each page lies, or the medium it has to be fetched from. Raises WireError.
        """
        if len(slots) > len(self.load.keys):
            raise WireError("more pages were found than were asked for")
        media = [min(slot, _MEMORY) for slot in slots]
        seconds = [costs.page_seconds(medium) for medium in media]
        self.heard, self.found = now, True
        self.wanted = choose(seconds, self.load.recompute_seconds)
        self.predicted = now - self.began + sum(seconds[: self.wanted])
        self.slow = Counter(medium for medium in media[: self.wanted] if medium != _MEMORY)
        if self.slow:
            self.fetched = now
        return next((place for place, slot in enumerate(slots[: self.wanted]) if slot < 0), self.wanted)

    def arrived(self, first: int, count: int, now: float) -> int | None:
        """Takes note that `count` pages from the `first` on are in memory; no page ends the load.

        Returns how many of these were copied before, None if all were. Raises WireError.
        """
        self.heard = now
        # Pages that were in memory from the beginning may be told of again.
        known = self.copied - first
        if known < 0 or first + count > self.wanted:
            raise WireError("pages came that were not next")
        if count == 0:
            self.cut_short()
        elif known >= count:
            return None
        return known

    def cut_short(self) -> None:
        """No more pages come, or are of use, than have been copied."""
        self.is_whole = self.copied == self.wanted
        self.wanted = self.copied

    def end(self, costs: LoadCosts, now: float) -> Loaded:
        """The answer to the engine; what was fetched tells what fetching costs.

        Only if all of it has come: how long the pages took that did, nobody knows.
        """
        if self.slow and self.is_whole and self.copied == self.wanted:
            for medium in self.slow:
                costs.observe(medium, self.slow.total(), now - self.fetched)
        recompute = self.load.recompute_seconds(0) - self.load.recompute_seconds(self.copied)
        return Loaded(self.load.ticket, self.copied, now - self.began, self.predicted, recompute)
