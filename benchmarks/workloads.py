"""What is asked of an engine in a benchmark: prompts, output lengths and arrival times, all fixed by a seed.

Knows no engine and no clock.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice
from typing import NamedTuple

FIRST_TOKEN_ID = 3
"""Ids below are special tokens in the models of `benchmarks.models`, and in many others."""


class Range(NamedTuple):
    """A uniform distribution over the integers low..high, both included."""

    low: int
    high: int

    @property
    def mean(self) -> float:
        return (self.low + self.high) / 2


@dataclass(frozen=True, slots=True)
class Lengths:
    """Distribution of the tokens of a request."""

    prompt: Range
    output: Range


ORCA = Lengths(prompt=Range(32, 512), output=Range(1, 128))
"""The workload of Orca (OSDI'22, section 6.2)."""

EVEN = Lengths(prompt=Range(16, 256), output=Range(16, 256))
"""As many tokens out as in: what engines are compared on offline."""

LENGTHS = {"orca": ORCA, "even": EVEN}


@dataclass(frozen=True, slots=True)
class Item:
    """One request of a workload."""

    prompt: tuple[int, ...]
    output_tokens: int
    arrival: float = 0.0
    """Seconds after the start of the run."""


def make(count: int, lengths: Lengths, *, vocab_size: int, seed: int = 1) -> list[Item]:
    """`count` requests that all arrive at once, with random token ids below `vocab_size`."""
    if vocab_size <= FIRST_TOKEN_ID:
        raise ValueError(f"vocab_size must be above {FIRST_TOKEN_ID}, got {vocab_size}")
    return list(islice(stream(lengths, vocab_size=vocab_size, seed=seed), count))


def stream(lengths: Lengths, *, vocab_size: int, seed: int = 1) -> Iterator[Item]:
    """Requests without end, the first of which are those of `make`."""
    rng = random.Random(seed)
    while True:
        num_prompt, num_output = rng.randint(*lengths.prompt), rng.randint(*lengths.output)
        prompt = tuple(rng.randrange(FIRST_TOKEN_ID, vocab_size) for _ in range(num_prompt))
        yield Item(prompt, num_output)


def poisson(items: list[Item], rate: float, *, seed: int = 1) -> list[Item]:
    """The same requests, arriving as a Poisson process of `rate` requests per second."""
    if rate <= 0:
        raise ValueError(f"rate must be above 0 requests per second, got {rate}")
    rng = random.Random(seed)
    now = 0.0
    arriving = []
    for item in items:
        now += rng.expovariate(rate)
        arriving.append(replace(item, arrival=now))
    return arriving


def expected_maximum(output: Range, batch_size: int) -> float:
    """E[max] of `batch_size` independent draws, by the sum over the tail: the length of a static batch."""
    size = output.high - output.low + 1
    return output.high - sum((i / size) ** batch_size for i in range(1, size))


def request_level_penalty(output: Range, batch_size: int) -> float:
    """How many times longer a saturated engine takes if every batch runs to its longest output: E[max] / E[mean].

    Counts decode iterations of equal cost. For Orca's U(1, 128) it is within 0.2 % of the closed form
    `((B / (B + 1)) * 128 + 0.5) / 64.5` that treats lengths as continuous.
    """
    return expected_maximum(output, batch_size) / output.mean
