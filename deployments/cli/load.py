"""A load generator for OpenAI-compatible completion endpoints, and what it measures.

Owns arrivals, timestamps and their summary. Knows no terminal, and nothing about the server but its HTTP API.
"""

import asyncio
import math
import random
import statistics
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import httpx

from deployments.cli.client import EndpointError, headers, payload_of, refusal
from deployments.cli.errors import one_line

PERCENTILES = (50, 90, 99)
_FIRST_TOKEN_ID = 3
"""Ids below are special tokens in most vocabularies."""


@dataclass(frozen=True, slots=True)
class Call:
    """One request to send."""

    body: Mapping[str, Any]
    arrival: float | None = None
    """Seconds after the start at which it is due; None: as soon as there is a place for it (closed loop)."""


@dataclass(slots=True)
class Outcome:
    """What became of one request. Times are seconds of one monotonic clock."""

    start: float
    """When the request was due: waiting for a place in the client counts as latency, or a slow server would look fast
    (coordinated omission)."""
    chunk_times: list[float] = field(default_factory=list)
    """Arrival of every piece of the stream that carries output."""
    end: float = math.nan
    prompt_tokens: int = 0
    output_tokens: int = 0
    error: str | None = None

    @property
    def latency(self) -> float:
        return self.end - self.start

    @property
    def time_to_first(self) -> float:
        return self.chunk_times[0] - self.start

    @property
    def gaps(self) -> list[float]:
        """Seconds between consecutive pieces of the stream."""
        return [b - a for a, b in pairwise(self.chunk_times)]

    @property
    def time_per_output_token(self) -> float:
        """Mean seconds per output token after the first."""
        return (self.chunk_times[-1] - self.chunk_times[0]) / (self.output_tokens - 1)


@dataclass(frozen=True, slots=True)
class Distribution:
    """Mean and percentiles of a measured quantity, in its unit."""

    mean: float
    p50: float
    p90: float
    p99: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Distribution | None":
        """None for no values."""
        if not values:
            return None
        ordered = sorted(values)
        return cls(statistics.fmean(ordered), *(percentile(ordered, p) for p in PERCENTILES))


def percentile(ordered: Sequence[float], percent: float) -> float:
    """Linear interpolation between the two nearest ranks of ascending values, as numpy's default."""
    rank = (len(ordered) - 1) * percent / 100
    below = math.floor(rank)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (rank - below)


@dataclass(frozen=True, slots=True)
class Summary:
    """What a run measured. Latencies are of the successful requests, in seconds."""

    completed: int
    failed: int
    seconds: float
    prompt_tokens: int
    output_tokens: int
    ttft: Distribution | None
    itl: Distribution | None
    tpot: Distribution | None
    e2e: Distribution | None
    errors: dict[str, int]
    """How often each error message came."""

    @property
    def requests_per_second(self) -> float:
        return self.completed / self.seconds

    @property
    def output_tokens_per_second(self) -> float:
        return self.output_tokens / self.seconds

    @property
    def total_tokens_per_second(self) -> float:
        return (self.output_tokens + self.prompt_tokens) / self.seconds


def summarise(outcomes: Sequence[Outcome], seconds: float) -> Summary:
    """Puts the outcomes of a run of `seconds` together."""
    good = [outcome for outcome in outcomes if outcome.error is None]
    errors: dict[str, int] = {}
    for outcome in outcomes:
        if outcome.error is not None:
            errors[outcome.error] = errors.get(outcome.error, 0) + 1
    return Summary(
        completed=len(good),
        failed=len(outcomes) - len(good),
        seconds=seconds,
        prompt_tokens=sum(outcome.prompt_tokens for outcome in good),
        output_tokens=sum(outcome.output_tokens for outcome in good),
        ttft=Distribution.of([outcome.time_to_first for outcome in good if outcome.chunk_times]),
        itl=Distribution.of([gap for outcome in good for gap in outcome.gaps]),
        tpot=Distribution.of([o.time_per_output_token for o in good if o.chunk_times and o.output_tokens > 1]),
        e2e=Distribution.of([outcome.latency for outcome in good]),
        errors=errors,
    )


@dataclass(frozen=True, slots=True)
class Plan:
    """What load to put on an endpoint."""

    model: str
    num_prompts: int
    input_tokens: tuple[int, int]
    """Lengths are drawn uniformly from low..high."""
    output_tokens: tuple[int, int]
    vocab_size: int
    """Token ids of the prompts are drawn below this."""
    text: bool = False
    """Prompts are sent as words rather than token ids, about one token each."""
    rate: float | None = None
    """Requests per second of a Poisson process (open loop); None sends the next when one ends (closed loop)."""
    concurrency: int | None = None
    """Requests in flight at most."""
    seed: int = 0

    def calls(self) -> list[Call]:
        """The requests, the same for the same plan."""
        rng = random.Random(self.seed)
        now = 0.0
        calls = []
        for _ in range(self.num_prompts):
            ids = [rng.randrange(_FIRST_TOKEN_ID, self.vocab_size) for _ in range(rng.randint(*self.input_tokens))]
            body = {
                "model": self.model,
                "prompt": " ".join(f"w{i}" for i in ids) if self.text else ids,
                "max_tokens": rng.randint(*self.output_tokens),
                "temperature": 0,
                "ignore_eos": True,
                "stream": True,
                "stream_options": {"include_usage": True},
            }
            if self.rate is not None:
                now += rng.expovariate(self.rate)
            calls.append(Call(body, None if self.rate is None else now))
        return calls


async def run(
    url: str,
    calls: Sequence[Call],
    *,
    concurrency: int | None,
    on_done: Callable[[Outcome], None],
    transport: httpx.AsyncBaseTransport | None = None,
) -> float:
    """Sends the calls, each at its arrival or as soon after as `concurrency` allows. Returns the run's seconds.

    A failed request is an outcome with an error; only cancellation ends a run early.
    """
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    timeout = httpx.Timeout(None, connect=30.0)
    async with httpx.AsyncClient(
        base_url=url, headers=headers(), limits=limits, timeout=timeout, transport=transport
    ) as http:
        places = asyncio.Semaphore(concurrency or len(calls) or 1)
        begin = time.perf_counter()

        async def send(call: Call) -> None:
            async with places:
                start = time.perf_counter() if call.arrival is None else begin + call.arrival
                on_done(await perform(http, call.body, start))

        async with asyncio.TaskGroup() as group:
            for call in calls:
                if call.arrival is not None:
                    await asyncio.sleep(max(0.0, begin + call.arrival - time.perf_counter()))
                group.create_task(send(call))
        return time.perf_counter() - begin


async def perform(http: httpx.AsyncClient, body: Mapping[str, Any], start: float) -> Outcome:
    """One streamed completion, timed from `start`."""
    outcome = Outcome(start)
    finished = False
    try:
        async with http.stream("POST", "/v1/completions", json=body) as response:
            if response.status_code != 200:
                raise refusal(response.status_code, await response.aread())
            async for line in _lines(response):
                payload = payload_of(line)
                if payload is None:
                    continue
                finished = _note(outcome, payload, time.perf_counter()) or finished
        if not finished:
            raise EndpointError("the stream ended before the completion did")
    except (httpx.HTTPError, EndpointError) as error:
        outcome.error = one_line(error)
    outcome.end = time.perf_counter()
    # An endpoint that reports no usage sends, as far as anyone can tell, one token per piece.
    outcome.output_tokens = outcome.output_tokens or len(outcome.chunk_times)
    return outcome


def _note(outcome: Outcome, payload: Mapping[str, Any], now: float) -> bool:
    """Records one event of a stream; True if it ends the completion."""
    if usage := payload.get("usage"):
        outcome.prompt_tokens = usage["prompt_tokens"]
        outcome.output_tokens = usage["completion_tokens"]
    choices = payload.get("choices") or ()
    if any(choice.get("text") or choice.get("token_ids") for choice in choices):
        outcome.chunk_times.append(now)
    return any(choice.get("finish_reason") is not None for choice in choices)


async def _lines(response: httpx.Response) -> AsyncIterator[str]:
    """Lines of an event stream, each as soon as it is complete; httpx's own also splits at U+2028 and its like."""
    rest = b""
    async for data in response.aiter_bytes():
        *lines, rest = (rest + data).split(b"\n")
        for line in lines:
            yield line.decode().rstrip("\r")
