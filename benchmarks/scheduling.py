"""Iteration-level and request-level scheduling on one engine: two ways to feed the same `add` and `step`.

Iteration-level (Orca, OSDI'22, section 3.1): requests join and leave the running batch between any two iterations.
Request-level: a batch is a fixed set of rows. It is taken from the queue, every row runs until the longest request has
ended (what a shorter one draws beyond its end is thrown away), and it is answered as a whole before the next is taken.
Knows neither model nor output format.
"""

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from benchmarks.workloads import Item
from engine.engine import Engine
from engine.sampling_params import SamplingParams
from engine.sequence import Request


class IdleSkippingClock:
    """Seconds of wall time since the start, without the waits for an arrival.

    An engine without work does nothing, so jumping over that time changes no measured latency, and a run at low load
    takes no longer than one at saturation.
    """

    def __init__(self) -> None:
        self._zero = time.perf_counter()

    def now(self) -> float:
        return time.perf_counter() - self._zero

    def skip_to(self, moment: float) -> None:
        """Moves on to `moment`, if it is still to come."""
        self._zero -= max(0.0, moment - self.now())


@dataclass(slots=True)
class Trace:
    """What one run over a list of items brought."""

    steps: int = 0
    tokens: int = 0
    seconds: float = 0.0
    normalised_latencies: list[float] = field(default_factory=list)
    """Per request: seconds from arrival to answer, per output token (Orca's metric)."""
    saturated_steps: int = 0
    """Iterations up to the last admission: the part of a run without a tail of half-empty batches."""
    saturated_tokens: int = 0
    saturated_seconds: float = 0.0

    @property
    def tokens_per_second(self) -> float:
        return self.saturated_tokens / self.saturated_seconds

    @property
    def tokens_per_step(self) -> float:
        return self.saturated_tokens / self.saturated_steps

    def note_saturated(self, now: float) -> None:
        """Everything so far happened with a queue that was not empty."""
        self.saturated_steps, self.saturated_tokens, self.saturated_seconds = self.steps, self.tokens, now


def iteration_level(engine: Engine, items: Sequence[Item]) -> Trace:
    """Submits every item when it arrives; the engine's own scheduler fills each iteration up to its batch limit."""
    trace, clock, queue = Trace(), IdleSkippingClock(), deque(enumerate(items))
    live: dict[str, Item] = {}
    while queue or live:
        if not live:
            clock.skip_to(queue[0][1].arrival)
        while queue and queue[0][1].arrival <= clock.now():
            index, item = queue.popleft()
            live[str(index)] = item
            engine.add(_request(index, item, item.output_tokens))
        finished, tokens = _step(engine, trace)
        trace.tokens += tokens
        for request_id in finished:
            item = live.pop(request_id)
            trace.normalised_latencies.append((clock.now() - item.arrival) / item.output_tokens)
        if queue or engine.stats().num_waiting:
            trace.note_saturated(clock.now())
    trace.seconds = clock.now()
    return trace


def request_level(engine: Engine, items: Sequence[Item], batch_limit: int, *, shrinks: bool = False) -> Trace:
    """Submits what has arrived, `batch_limit` items at most, each time the batch before has ended entirely.

    `shrinks` lets a request leave its batch when it ends, which spares its arithmetic but not an iteration: an engine
    without padding that still admits by batches. Only tokens that were asked for count.
    """
    trace, clock, queue = Trace(), IdleSkippingClock(), deque(enumerate(items))
    while queue:
        clock.skip_to(queue[0][1].arrival)
        batch: list[Item] = []
        while queue and len(batch) < batch_limit and queue[0][1].arrival <= clock.now():
            batch.append(queue.popleft()[1])
        longest = max(item.output_tokens for item in batch)
        for index, item in enumerate(batch):
            engine.add(_request(index, item, item.output_tokens if shrinks else longest))
        while engine.has_work():
            _step(engine, trace)
        now = clock.now()
        trace.tokens += sum(item.output_tokens for item in batch)
        trace.normalised_latencies += [(now - item.arrival) / item.output_tokens for item in batch]
        if len(batch) == batch_limit:
            trace.note_saturated(now)
    trace.seconds = clock.now()
    return trace


def _step(engine: Engine, trace: Trace) -> tuple[list[str], int]:
    """One iteration: the ids of the requests that it finished, and the tokens that it drew.

    Raises RuntimeError for a request that failed.
    """
    finished, tokens = [], 0
    for emission in engine.step():
        tokens += len(emission.token_ids)
        if emission.error is not None:
            raise RuntimeError(f"request {emission.request_id} failed: {emission.error}")
        if emission.finish_reason is not None:
            finished.append(emission.request_id)
    trace.steps += 1
    return finished, tokens


def _request(index: int, item: Item, max_tokens: int) -> Request:
    params = SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True)
    return Request(str(index), item.prompt, params)
