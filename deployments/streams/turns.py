"""In which order the tokens of several choices become events: by the tokens alone, never by when they arrive.

That makes an answer's events the same whichever gateway writes them and however often: choices take turns token by
token, those that have ended are left out. Choices wait for each other that way, so no more than a group of them does;
group follows group, as schedulers start first what came first. Pure.
"""

from collections import deque

from engine.sequence import Emission

GROUP = 32
"""Choices that take turns. More of them at once than an engine runs would hold the first back for the last."""


class Turns:
    """The tokens that have arrived and whose turn has not come."""

    def __init__(self, num_choices: int, group: int = GROUP) -> None:
        self._num_choices = num_choices
        self._size = group
        self._waiting: dict[int, deque[Emission]] = {}
        self._finished: set[int] = set()
        self._next_group = 0
        self._group: list[int] = []
        """Unfinished choices that take turns now."""
        self._at = 0
        self._open_group()

    def put(self, choice: int, step: Emission) -> None:
        """Adds what arrived for a choice; what comes after its end is dropped."""
        if choice not in self._finished:
            self._waiting.setdefault(choice, deque()).append(step)

    def take(self) -> tuple[int, Emission] | None:
        """The next step in order and its choice; None while the choice whose turn it is has nothing."""
        if not self._group:
            return None
        choice = self._group[self._at]
        queue = self._waiting.get(choice)
        if not queue:
            return None
        self._at = (self._at + 1) % len(self._group)
        return choice, queue.popleft()

    def finish(self, choice: int) -> None:
        """A choice has ended, with what was taken last of it: it has no more turns."""
        self._finished.add(choice)
        self._waiting.pop(choice, None)
        place = self._group.index(choice)
        del self._group[place]
        if place < self._at:
            self._at -= 1
        if not self._group:
            self._open_group()
        else:
            self._at %= len(self._group)

    def _open_group(self) -> None:
        end = min(self._next_group + self._size, self._num_choices)
        self._group = list(range(self._next_group, end))
        self._next_group, self._at = end, 0


def steps_of(emission: Emission) -> tuple[Emission, ...]:
    """An emission as emissions of one token each, so that how tokens were grouped leaves no trace."""
    if len(emission.token_ids) <= 1:
        return (emission,)
    last = len(emission.token_ids) - 1
    return tuple(
        emission._replace(
            token_ids=(token_id,),
            logprobs=emission.logprobs[place : place + 1],
            finish_reason=emission.finish_reason if place == last else None,
            stop_token_id=emission.stop_token_id if place == last else None,
            cached_tokens=emission.cached_tokens if place == 0 else 0,
        )
        for place, token_id in enumerate(emission.token_ids)
    )
