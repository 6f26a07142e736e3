"""The tier of a group over those of its ranks, all in one process."""

import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import zmq

from cluster.shards.door import Doors
from cluster.shards.tier import GroupTier, RankTier
from engine.batch import Batch, StepOutput
from engine.kv.tier import Tier
from tests.engine.fake_tier import FakeTier
from tests.engine.fakes import LedgerRunner

PATIENCE_S = 5.0
KEYS = [bytes([index]) * 32 for index in range(1, 9)]
PAGES, PAGE_TOKENS = 24, 2


@contextmanager
def group_of(*clients: Tier) -> Iterator[GroupTier]:
    """A group's tier over those of its ranks, once it has heard of all."""
    with TemporaryDirectory() as folder, zmq.Context() as context:
        doors = Doors(context, [True] * len(clients), "127.0.0.1", Path(folder))
        failures: list[Exception] = []
        ranks = [
            RankTier(door.connect(context, door.pages), client, failures.append)
            for door, client in zip(doors.of_ranks, clients, strict=True)
        ]
        made = GroupTier(doors.pages)
        try:
            yield made
        finally:
            for rank in ranks:
                rank.close()
            for socket in (*doors.work, *doors.pulse, *doors.pages):
                socket.close()
            doors.close()
        assert failures == []


def until(made: GroupTier, condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, "it did not come true in time"
        assert made.poll(0.01) == []


def is_quiet(made: GroupTier, seconds: float = 0.1) -> bool:
    """Whether nothing is answered for so long: by default, long enough for ranks to do what they should not."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if made.poll(0.01):
            return False
    return True


def filled(client: FakeTier) -> LedgerRunner:
    """A rank's pages; page n holds the number n."""
    runner = LedgerRunner(16, PAGE_TOKENS)
    for page in range(16):
        runner.fill(page, [page, page])
    client.attach(runner)
    return runner


class AllRanks:
    """Ranks in this process, every one of which runs every batch, `depth` of them in flight."""

    failure = None

    def __init__(self, runners: list[LedgerRunner], depth: int) -> None:
        self.depth = depth
        self._runners = runners
        self._outputs: deque[StepOutput] = deque()

    def submit(self, batch: Batch) -> None:
        self._outputs.append([runner.run(batch) for runner in self._runners][-1])

    def collect(self) -> StepOutput:
        return self._outputs.popleft()

    def close(self) -> None:
        pass
