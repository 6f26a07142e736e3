"""One replica, from requests to token ids: ties the scheduler's decisions to the executor's work.

Knows no text, no HTTP and no device. Not thread-safe: one thread owns an engine; others may read `step_tokens`,
`failure` and what never changes.
"""

import itertools
import secrets
from collections import deque
from pathlib import Path

from engine.executor import Executor
from engine.kv.keys import root_key
from engine.limits import Limits, check_request
from engine.scheduler import Scheduler
from engine.sequence import Emission, Order, Request, Sequence
from engine.stats import EngineStats

_HEAD_START = 2**62
TIER_WAIT_S = 0.005
"""For how long a step waits for pages when nothing else can be done; requests that come meanwhile wait as long."""


class Engine:
    """`add` requests, call `step` while there is work, hand out what it returns."""

    def __init__(
        self,
        scheduler: Scheduler,
        executor: Executor,
        limits: Limits,
        *,
        eos_token_ids: tuple[int, ...] = (),
        model_path: Path | None = None,
        prefix_caching: bool = True,
        namespace: str = "",
    ) -> None:
        """Without `prefix_caching`, the samples of one request are all that share pages. `namespace` names all besides
        tokens that pages depend on: engines that share a tier find only those of their own."""
        self._scheduler = scheduler
        self._executor = executor
        self._in_flight: deque[int] = deque()
        """Tokens of each batch."""
        self.step_tokens = 0
        """Tokens that were in flight in the running iteration, or the latest one, when it waited for the oldest."""
        self._arrivals = itertools.count()
        self._sequence_ids = itertools.count()
        self._prefix_caching = prefix_caching
        self._root = (namespace, "salt") if prefix_caching else (namespace, "arrival", secrets.token_hex(16))
        self.limits = limits
        self.eos_token_ids = eos_token_ids
        self.model_path = model_path

    @property
    def max_model_len(self) -> int:
        return self.limits.max_model_len

    @property
    def vocab_size(self) -> int:
        return self.limits.vocab_size

    @property
    def failure(self) -> Exception | None:
        """Why it can compute no more, if so, although nothing has been asked of it since. Any thread may ask."""
        return self._executor.failure

    def add(self, request: Request) -> None:
        """Queues a request. Raises InvalidRequest if it can never be served; nothing is queued then."""
        check_request(request, self.limits)
        self._scheduler.add(self._sequences(request))

    def abort(self, request_id: str) -> None:
        """Ends a request; it emits nothing more. Unknown and finished requests are ignored."""
        self._scheduler.abort(request_id)

    def has_work(self) -> bool:
        return self._scheduler.has_work()

    def step(self) -> list[Emission]:
        """Runs one iteration and returns what it brought; with a deep executor, keeps `depth` of them in flight.

        Where all sequences wait for pages of the tier there is nothing to run, and it waits a moment for those.
        """
        self.step_tokens = sum(self._in_flight)
        while len(self._in_flight) < self._executor.depth:
            batch = self._scheduler.plan()
            if batch is None:
                break
            self._in_flight.append(batch.num_tokens)
            self.step_tokens += batch.num_tokens
            self._executor.submit(batch)
        if not self._in_flight:
            self._scheduler.settle(TIER_WAIT_S)
            return []
        output = self._executor.collect()
        self._in_flight.popleft()
        return self._scheduler.commit(output)

    def stats(self) -> EngineStats:
        return self._scheduler.stats()

    def close(self) -> None:
        self._executor.close()
        self._scheduler.offload.close()

    def _sequences(self, request: Request) -> list[Sequence]:
        params, prompt = request.params, request.prompt_token_ids
        max_tokens = self.limits.max_output(request)
        stop_token_ids = frozenset(params.stop_token_ids) | (
            frozenset() if params.ignore_eos else frozenset(self.eos_token_ids)
        )
        seed = secrets.randbits(63) if params.seed is None else params.seed
        # A stream that goes on from elsewhere has had its turn in the queue.
        arrival = next(self._arrivals) - (_HEAD_START if request.given else 0)
        own = (request.cache_salt or "") if self._prefix_caching else str(arrival)
        root = root_key(*self._root, own)
        return [
            Sequence(
                sequence_id=next(self._sequence_ids),
                request=request,
                order=Order(request.priority, arrival, sample_index),
                seed=seed,
                stop_token_ids=stop_token_ids,
                max_tokens=max_tokens,
                tokens=[*prompt, *(request.given[sample_index] or ())] if request.given else list(prompt),
                num_scored=request.num_scored,
                root=root,
            )
            for sample_index in request.open_samples
        ]
