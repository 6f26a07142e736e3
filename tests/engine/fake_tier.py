"""A tier that keeps the tokens of the fake device's pages, and that a test makes slow, forgetful or dead."""

import random
from collections.abc import Callable

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
    ) -> None:
        self.contents: Contents = {} if contents is None else contents
        self.offered: list[Save] = []
        self.loads: list[tuple[Load, int]] = []
        self._delay, self._choose, self._takes = delay, choose, takes
        self._max_saving = max_saving
        self._pending: list[tuple[int, Save | Load, list[int | None]]] = []
        self._stats = TierStats()
        self.polls_that_waited = 0

    def attach(self, runner: LedgerRunner) -> None:
        self._runner = runner

    def may_have(self, key: bytes) -> bool:
        return key in self.contents

    def room(self) -> int:
        return self._max_saving - sum(isinstance(job, Save) for _, job, _ in self._pending)

    def save(self, pages: list[Save]) -> None:
        assert len(pages) <= self.room()
        self.offered += pages
        self._pending += [(self._delay(), save, self._runner.page(save.page)) for save in pages]

    def load(self, load: Load) -> None:
        self._pending.append((self._delay(), load, []))

    def poll(self, timeout_s: float = 0.0) -> list[Answer]:
        self.polls_that_waited += timeout_s > 0
        due = [job for job in self._pending if job[0] <= 0]
        self._pending = [(left - 1, job, tokens) for left, job, tokens in self._pending if left > 0]
        return [self._answer(job, tokens) for _, job, tokens in due]

    def page_seconds(self) -> float:
        return 1e-6

    def stats(self) -> TierStats:
        return self._stats

    def close(self) -> None:
        self._pending.clear()

    def _answer(self, job: Save | Load, tokens: list[int | None]) -> Answer:
        if isinstance(job, Save):
            assert self._runner.page(job.page) == tokens, "a page was written to while it was copied"
            stored = self._takes()
            if stored:
                self.contents[job.key] = tokens
            return Saved(job.page, stored)
        there = 0
        while there < len(job.keys) and job.keys[there] in self.contents:
            there += 1
        count = self._choose(there)
        for key, page in zip(job.keys[:count], job.pages[:count], strict=True):
            self._runner.fill(page, self.contents[key])
        self.loads.append((job, count))
        return Loaded(job.ticket, count, 2.0, 1.0, 5.0)


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
