"""An engine at steady load: as one request ends the next begins, and none of those that run began together.

Knows neither model nor ranks.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from benchmarks.workloads import Item
from engine.engine import Engine
from engine.sampling_params import SamplingParams
from engine.sequence import Request

_FIRST_PROMPT = 16


@dataclass(frozen=True, slots=True)
class Steady:
    """What was run in a while of steady load."""

    seconds: float
    num_tokens: int
    """Of prompts and of outputs."""
    bubbles: tuple[float, ...]
    """By rank, the share of this time in which it had nothing to run."""

    @property
    def tokens_per_second(self) -> float:
        return self.num_tokens / self.seconds

    def text(self) -> str:
        return f"{self.tokens_per_second:.1f} tokens/s, waiting {', '.join(f'{share:.1%}' for share in self.bubbles)}"


class Crowd:
    """The requests of an engine, of which so many run and as many wait."""

    def __init__(self, engine: Engine, items: Iterator[Item], sequences: int) -> None:
        """The first ones get short prompts, so that all of them soon decode, and shorter outputs, from a part of what
        was asked for to all of it, so that they end one by one."""
        self._engine = engine
        self._items = items
        self._sequences = sequences
        self._live: set[str] = set()
        self._added = 0
        self._first: set[str] = set()
        for number in range(1, sequences + 1):
            item = next(items)
            self._first.add(self._add(item.prompt[:_FIRST_PROMPT], max(1, item.output_tokens * number // sequences)))

    def step(self) -> None:
        """Raises RuntimeError where a request fails."""
        while len(self._live) < 2 * self._sequences:
            item = next(self._items)
            self._add(item.prompt, item.output_tokens)
        for emission in self._engine.step():
            if emission.error is not None:
                raise RuntimeError(f"request {emission.request_id} failed: {emission.error}")
            self._first.discard(emission.request_id)
            if emission.finish_reason is not None:
                self._live.discard(emission.request_id)

    @property
    def is_steady(self) -> bool:
        """Whether all that began together are past their prompts."""
        return not self._first

    def leave(self) -> None:
        """Ends all of them, and what is in flight."""
        for request_id in self._live:
            self._engine.abort(request_id)
        while self._engine.has_work():
            self._engine.step()

    def _add(self, prompt: Sequence[int], max_tokens: int) -> str:
        name, self._added = str(self._added), self._added + 1
        params = SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True)
        self._engine.add(Request(name, tuple(prompt), params))
        self._live.add(name)
        return name


def steady(
    engine: Engine,
    items: Iterator[Item],
    sequences: int,
    seconds: float,
    num_tokens: Callable[[], int],
    waited_s: Callable[[], Sequence[float]],
) -> Steady:
    """Runs `sequences` requests at a time until the load is steady and then for `seconds`; `num_tokens` and `waited_s`
    are what the engine has run and what its ranks have waited, in all."""
    crowd = Crowd(engine, items, sequences)
    while not crowd.is_steady:
        crowd.step()
    began, tokens, waited = time.perf_counter(), num_tokens(), waited_s()
    while time.perf_counter() - began < seconds:
        crowd.step()
    taken, run = time.perf_counter() - began, num_tokens() - tokens
    bubbles = tuple((after - before) / taken for before, after in zip(waited, waited_s(), strict=True))
    crowd.leave()
    return Steady(taken, run, bubbles)
