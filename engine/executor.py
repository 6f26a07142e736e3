"""The boundary between deciding and computing: batches go in, step outputs come out in the same order."""

from collections import deque
from typing import Protocol

from engine.batch import Batch, StepOutput


class Executor(Protocol):
    """Runs batches in the order they were submitted."""

    @property
    def depth(self) -> int:
        """Batches that may be in flight at once: 1 for one device, the number of stages for a pipeline."""

    @property
    def failure(self) -> Exception | None:
        """Why no batch can be run any more, if so. Any thread may ask, and something may fail while nothing runs."""

    def submit(self, batch: Batch) -> None:
        """Starts a batch. At most `depth` may be uncollected."""

    def collect(self) -> StepOutput:
        """Waits for the oldest uncollected batch."""

    def close(self) -> None:
        """Releases the device."""


class BatchRunner(Protocol):
    """What `LocalExecutor` drives: `engine.runner.Runner`, or a fake in the scheduler's tests."""

    def run(self, batch: Batch) -> StepOutput: ...


class LocalExecutor:
    """Runs each batch in the calling thread.

    A thread of its own would overlap little: kernels run without the GIL, so that whoever delivers a step's emissions
    does so during the next step as it is. Two wake-ups a step cost more than what is left, below hundreds of sequences.
    """

    depth = 1
    failure = None
    """What runs in this process fails in `collect`, or not at all."""

    def __init__(self, runner: BatchRunner) -> None:
        self._runner = runner
        self._submitted: deque[Batch] = deque()

    def submit(self, batch: Batch) -> None:
        assert len(self._submitted) < self.depth, "submit() without collect()"
        self._submitted.append(batch)

    def collect(self) -> StepOutput:
        return self._runner.run(self._submitted.popleft())

    def close(self) -> None:
        self._submitted.clear()
