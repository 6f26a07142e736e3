"""What is measured: the requests of each measure, and what a run's timeline says. Pure; knows no engine and no clock.

| measure | requests | value |
|---|---|---|
| batch | 32 (16 for a large model), U(16, 256) in and out, all at once | output tokens/s |
| stream | one, 32 in, 128 out; three times a round | tokens/s after the first |
| prefill | one, 2,048 in, 1 out | prompt tokens/s up to the first token |
| long | 8 at once, 8,192 in, 192 out; at 16 bits alone, since it is about keys and values | tokens/s while all decode |

Lengths are the same in every round and token ids are not, so that no cache of prefixes could answer.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks import workloads
from benchmarks.workloads import FIRST_TOKEN_ID, Item

LARGE_PARAMETERS = 500_000_000
"""A model of more parameters gets half the batch, and no long context: on a CPU it would take many minutes."""


@dataclass(frozen=True, slots=True)
class Timeline:
    """What a worker answers to a run: seconds since the items were handed over, parallel to the items."""

    seconds: float
    first: list[float]
    last: list[float]
    steps: list[tuple[float, int]]
    """(seconds, tokens) of every step that brought tokens."""
    outputs: list[list[int]]

    @classmethod
    def of(cls, answer: dict[str, Any]) -> "Timeline":
        steps = [(seconds, count) for seconds, count in answer["steps"]]
        return cls(answer["seconds"], answer["first"], answer["last"], steps, answer["outputs"])


@dataclass(frozen=True, slots=True)
class Measure:
    """One column of the comparison, in tokens per second."""

    name: str
    title: str
    lengths: Callable[[bool], list[tuple[int, int]]]
    """Whether the model is large -> (prompt tokens, output tokens) of every request; none if it is not measured."""
    value: Callable[[Sequence[Item], Timeline], float]
    least_bits: int = 4
    """Of the weights; with fewer it is not measured."""
    runs: int = 1
    """In a round, the engines by turns. A short measure needs more of them for a median that says something."""

    def lengths_at(self, bits: int, *, large: bool) -> list[tuple[int, int]]:
        """`lengths`, none where it is not measured."""
        return self.lengths(large) if bits >= self.least_bits else []


def items(measure: Measure, *, large: bool, vocab_size: int, seed: int) -> list[Item]:
    """The requests of one round: lengths by measure, token ids by seed."""
    rng = random.Random(seed)
    return [
        Item(tuple(rng.randrange(FIRST_TOKEN_ID, vocab_size) for _ in range(num_prompt)), num_output)
        for num_prompt, num_output in measure.lengths(large)
    ]


def throughput(items: Sequence[Item], timeline: Timeline) -> float:
    return sum(item.output_tokens for item in items) / timeline.seconds


def decode_rate(items: Sequence[Item], timeline: Timeline) -> float:
    """Tokens per second while every request decodes: from the last first token to the first last one.

    Raises ValueError if no step fell in that window.
    """
    begin, end = max(timeline.first), min(timeline.last)
    count = sum(tokens for seconds, tokens in timeline.steps if begin < seconds <= end)
    if count == 0:
        raise ValueError("no step had all requests decoding: the first ended before the last began")
    return count / (end - begin)


def prefill_rate(items: Sequence[Item], timeline: Timeline) -> float:
    return sum(len(item.prompt) for item in items) / max(timeline.first)


def _batch(large: bool) -> list[tuple[int, int]]:
    made = workloads.make(16 if large else 32, workloads.EVEN, vocab_size=FIRST_TOKEN_ID + 1)
    return [(len(item.prompt), item.output_tokens) for item in made]


MEASURES = {
    measure.name: measure
    for measure in (
        Measure("batch", "batch", _batch, throughput),
        Measure("stream", "one stream", lambda large: [(32, 128)], decode_rate, runs=3),
        Measure("prefill", "prefill 2,048", lambda large: [(2048, 1)], prefill_rate),
        Measure("long", "8 x 8,192", lambda large: [] if large else [(8192, 192)] * 8, decode_rate, least_bits=16),
    )
}
START = "start"
"""Process start to the first answer; every engine has it, since every engine is started."""


def agreement(ours: Sequence[Sequence[int]], theirs: Sequence[Sequence[int]]) -> float:
    """Share of the requests whose first token is the same: whether two engines ran the same model at all.

    Later tokens say less: one rounding that turns a token changes all that follow.
    """
    same = sum(a[0] == b[0] for a, b in zip(ours, theirs, strict=True))
    return same / len(ours)
