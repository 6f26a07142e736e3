"""Pages that were copied to a KV host, until it has said which of them it keeps. Sends nothing; knows no clock."""

from collections import deque
from typing import NamedTuple

from cluster.kv.wire import WireError
from engine.kv.tier import Save


class _Commit(NamedTuple):
    saves: list[Save]
    """Those of its pages that are waited for."""
    sent: float


class Commits:
    """What was committed and not answered, oldest first: answers come in order."""

    def __init__(self) -> None:
        self._open: deque[_Commit] = deque()

    def add(self, saves: list[Save], now: float) -> None:
        self._open.append(_Commit(saves, now))

    def answered(self) -> list[Save]:
        """The pages that the next answer is about, but for those that were given up. Raises WireError."""
        if not self._open:
            raise WireError("the host answers a commit that was not sent")
        return self._open.popleft().saves

    def give_up(self, sent_before: float) -> list[Save]:
        """The pages of commits that are this old; whatever the host then says of them comes too late."""
        given_up: list[Save] = []
        for commit in self._open:
            if commit.sent <= sent_before:
                given_up += commit.saves
                commit.saves.clear()
        return given_up

    def end(self) -> list[Save]:
        """All pages that are waited for: nothing will be answered any more."""
        saves = [save for commit in self._open for save in commit.saves]
        self._open.clear()
        return saves

    def oldest(self) -> float:
        """When the oldest page that is waited for was sent; infinity if none is."""
        return min((commit.sent for commit in self._open if commit.saves), default=float("inf"))
