"""Threads that each compute alone, for work that is many small operators on separate pieces. Knows nothing of the work.

An operator that is divided among threads waits for the slowest of them; with a busy neighbour on the machine that is
some milliseconds for an operator that takes a tenth of one. Pieces that go to one thread each wait once, at the end.
"""

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from types import TracebackType
from typing import Self, TypeVar

import torch

Item = TypeVar("Item")


class Workers:
    """As many threads as torch's operators would use. A context: they end with it."""

    def __init__(self) -> None:
        count = torch.get_num_threads()
        self._pool = ThreadPoolExecutor(count)
        started = Barrier(count)
        for future in [self._pool.submit(_compute_alone, started) for _ in range(count)]:
            future.result()
        # A thread keeps the number that it has set; what is set last is what new threads begin with.
        torch.set_num_threads(count)

    def run(self, work: Callable[[Item], None], items: Iterable[Item]) -> None:
        """Does `work` on every item; raises what it raises."""
        for _ in self._pool.map(work, items):
            pass

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._pool.shutdown()


def _compute_alone(started: Barrier) -> None:
    torch.get_num_threads()  # The first question of a thread sets its number to the process's; only then is it its own.
    torch.set_num_threads(1)
    started.wait()
