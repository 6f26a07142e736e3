"""A tier that keeps the tokens of the fake device's pages, and that a test makes slow, forgetful or dead."""

import random
from collections.abc import Callable
from typing import NamedTuple

from engine.kv.tier import Answer, Load, Loaded, Save, Saved, TierStats
from tests.engine.fakes import LedgerRunner

Contents = dict[bytes, list[int | None]]


class FakeTier:
    """`contents` may be shared by the tiers of several engines: it is the host that outlives them.

    `delay` gives the number of polls that the next answer takes; `choose` how many of the pages that are there to load.
    """

    def __init__(
        self,
        contents: Contents | None = None,
        *,
        delay: Callable[[], int] = lambda: 0,
        choose: Callable[[int], int] = lambda count: count,
        takes: Callable[[], bool] = lambda: True,
        max_saving: int = 4,
        is_local: bool = True,
    ) -> None:
        """`is_local`: whether the contents are on this node, and not on another one."""
        self.contents: Contents = {} if contents is None else contents
        self.offered: list[Save] = []
        self.loads: list[tuple[Load, int]] = []
        self.looked: list[bytes] = []
        """What was asked for by `may_have`."""
        self.given_up: list[int] = []
        """Tickets of loads that were not waited for any more: they end at the next poll."""
        self._delay, self._choose, self._takes = delay, choose, takes
        self._max_saving = max_saving
        self._is_local = is_local
        self._host = self._hosts = 1
        self._pending: list[_Job] = []
        self._stats = TierStats()
        self.polls_that_waited = 0

    def attach(self, runner: LedgerRunner) -> None:
        self._runner = runner

    def end_host(self) -> None:
        """The host is gone with all that it had, what it has said that it would take too."""
        self._host = 0
        self.contents.clear()

    def start_host(self) -> None:
        """Another one takes its place."""
        self._hosts += 1
        self._host = self._hosts

    def slow_down(self, delay: int) -> None:
        """Every answer to what is asked from now on takes so many polls."""
        self._delay = lambda: delay

    def take(self, max_saving: int) -> None:
        """So many pages at a time, from now on."""
        self._max_saving = max_saving

    def hurry(self) -> None:
        """Answers everything at the next poll, from now on."""
        self._delay = lambda: 0
        self._pending = [job._replace(left=0) for job in self._pending]

    def host(self) -> int:
        return self._host

    def may_have(self, key: bytes) -> bool:
        self.looked.append(key)
        return self._is_local and self._host > 0 and key in self.contents

    def room(self) -> int:
        return self._max_saving - sum(isinstance(job.asked, Save) for job in self._pending)

    def save(self, pages: list[Save]) -> None:
        assert self._host, "nobody is there to take them"
        assert len(pages) <= self.room()
        self.offered += pages
        self._pending += [_Job(self._delay(), save, self._host, self._runner.page(save.page)) for save in pages]

    def load(self, load: Load) -> None:
        self._pending.append(_Job(self._delay(), load, self._host, []))

    def give_up(self, ticket: int) -> None:
        self.given_up.append(ticket)
        self._pending = [
            job._replace(left=0) if isinstance(job.asked, Load) and job.asked.ticket == ticket else job
            for job in self._pending
        ]

    def poll(self, timeout_s: float = 0.0) -> list[Answer]:
        self.polls_that_waited += timeout_s > 0
        due = [job for job in self._pending if job.left <= 0]
        self._pending = [job._replace(left=job.left - 1) for job in self._pending if job.left > 0]
        return [self._answer(job) for job in due]

    def page_seconds(self) -> float:
        return 1e-6

    def stats(self) -> TierStats:
        return self._stats

    def close(self) -> None:
        self._pending.clear()

    def _answer(self, job: "_Job") -> Answer:
        is_there = job.host == self._host > 0
        if isinstance(job.asked, Save):
            save = job.asked
            assert self._runner.page(save.page) == job.tokens, "a page was written to while it was copied"
            # As the real one: a page that nobody could find is dropped.
            stored = self._takes() and is_there and (not save.parent or save.parent in self.contents)
            if stored:
                self.contents[save.key] = job.tokens
            return Saved(save.page, stored)
        load = job.asked
        there = 0
        while is_there and there < len(load.keys) and load.keys[there] in self.contents:
            there += 1
        count = self._choose(there)
        for key, page in zip(load.keys[:count], load.pages[:count], strict=True):
            self._runner.fill(page, self.contents[key])
        self.loads.append((load, count))
        return Loaded(load.ticket, count, 2.0, 1.0, 5.0)


class _Job(NamedTuple):
    """What is not answered yet."""

    left: int
    """Polls until it is."""
    asked: Save | Load
    host: int
    tokens: list[int | None]
    """What a page to save held when it was given."""


def at_random(seed: int, contents: Contents) -> FakeTier:
    """Slow and unreliable: answers late, refuses pages, loads fewer than there are."""
    chance = random.Random(seed)
    return FakeTier(
        contents,
        delay=lambda: chance.randrange(4),
        choose=lambda count: chance.randint(0, count),
        takes=lambda: chance.random() < 0.8,
        max_saving=chance.randint(1, 4),
    )
