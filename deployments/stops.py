"""Stop strings over a growing text. Pure: text in, text that may be shown out; knows no tokens.

A text stops where the first occurrence of a stop string is complete (of several that end at the same character, the
longest counts). That depends on the text alone, so any division of it into pieces gives the same result.
"""

from collections.abc import Sequence


class StopMatcher:
    """Watches one text for stop strings and holds back what may become one."""

    def __init__(self, stops: Sequence[str], *, include: bool = False) -> None:
        """`include`: the stop string itself is shown. Raises ValueError for an empty stop string."""
        if not all(stops):
            raise ValueError("a stop string must not be empty")
        self._stops = tuple(stops)
        self._include = include
        self._held = ""
        self.matched: str | None = None
        """The stop string that ended the text."""

    def push(self, text: str) -> str:
        """What may be shown now that `text` follows. Must not be called after a match."""
        assert self.matched is None, "the text has ended"
        if not self._stops:
            return text
        seen = self._held + text
        found = self._first(seen)
        if found is None:
            cut = len(seen) - self._num_undecided(seen)
            self._held = seen[cut:]
            return seen[:cut]
        self._held = ""
        start, self.matched = found
        return seen[: start + len(self.matched)] if self._include else seen[:start]

    def flush(self) -> str:
        """What was held back, once it is known that no more text follows."""
        held, self._held = self._held, ""
        return held

    def _first(self, seen: str) -> tuple[int, str] | None:
        """Start and text of the stop string that is complete first; the longest of those that end together."""
        found = [(start, stop) for stop in self._stops if (start := seen.find(stop)) >= 0]
        return min(found, key=lambda hit: (hit[0] + len(hit[1]), hit[0])) if found else None

    def _num_undecided(self, seen: str) -> int:
        """Length of the longest end of `seen` that is the beginning of a stop string."""
        longest = 0
        for stop in self._stops:
            for length in range(min(len(stop) - 1, len(seen)), longest, -1):
                if seen.endswith(stop[:length]):
                    longest = length
                    break
        return longest
