"""How a worker is spoken to: a JSON object a line on standard input, an answer a line, nothing else on that pipe.

    {"verb": "load", ...the fields of Load}        -> {"version": "1.2.3", "weight_bytes": 269029376}
    {"verb": "run", "items": [[[5, 6, 7], 128]]}   -> {"seconds": ..., "first": [...], "last": [...], "steps": [...],
                                                       "outputs": [...]}: the fields of Timeline

An error is answered by {"error": text}, and the worker ends. Owns the clock of every engine, so that all are timed
alike; knows no engine. Standard library only.
"""

import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol


class Item(NamedTuple):
    """One request: its prompt, and how many tokens to draw, greedy and past any end-of-sequence."""

    prompt: list[int]
    output_tokens: int


@dataclass(frozen=True)
class Load:
    """What every engine is given."""

    model: str
    """A Hugging Face directory, or what the engine's own converter made of it."""
    format: str
    """Name of the number format of the weights, in the engine's own words."""
    threads: int
    max_length: int
    """Tokens of the longest sequence, prompt and output."""
    max_sequences: int
    """Sequences that run at once."""
    kv_bytes: int
    """Enough for the keys and values, at 16 bits, of all that will run at once."""


class Timeline:
    """When the tokens of one run came. Seconds are wall time since the items were handed over."""

    def __init__(self, items: Sequence[Item]) -> None:
        self._wanted = [item.output_tokens for item in items]
        self.outputs: list[list[int]] = [[] for _ in items]
        self.first = [0.0] * len(items)
        self.last = [0.0] * len(items)
        self.steps: list[tuple[float, int]] = []
        """(seconds, tokens) of every step that brought tokens."""
        self._zero = time.perf_counter()

    def note(self, tokens: Iterable[tuple[int, Sequence[int]]]) -> None:
        """What one step brought: (index of the item, its new token ids) each."""
        now = time.perf_counter() - self._zero
        count = 0
        for index, token_ids in tokens:
            if token_ids:
                if not self.outputs[index]:
                    self.first[index] = now
                self.last[index] = now
                self.outputs[index].extend(token_ids)
                count += len(token_ids)
        if count:
            self.steps.append((now, count))

    def answer(self) -> dict[str, Any]:
        """Raises RuntimeError unless every item has as many tokens as it asked for."""
        counts = [len(output) for output in self.outputs]
        if counts != self._wanted:
            raise RuntimeError(f"output tokens per request are {counts}, asked for were {self._wanted}")
        return {
            "seconds": max(self.last),
            "first": self.first,
            "last": self.last,
            "steps": self.steps,
            "outputs": self.outputs,
        }


class Engine(Protocol):
    """A loaded engine."""

    version: str
    weight_bytes: int
    """Bytes of the weights in the files they were loaded from, or in memory where they are made at load."""

    def prepare(self, items: Sequence[Item]) -> None:
        """Whatever has to be set up for these items and is not part of their time."""

    def run(self, items: Sequence[Item], timeline: Timeline) -> None:
        """Draws every item's tokens, all submitted at once, and notes them as they come."""


def serve(load: Callable[[Load], Engine]) -> None:
    """Answers orders until standard input ends."""
    # What a library prints goes to standard error; the pipe stays clean.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    engine: Engine | None = None
    for line in sys.stdin:
        try:
            order = json.loads(line)
            if order.pop("verb") == "load":
                engine = load(Load(**order))
                answer: dict[str, Any] = {"version": engine.version, "weight_bytes": engine.weight_bytes}
            elif engine is None:
                raise RuntimeError("the first order must be 'load'")
            else:
                answer = _run(engine, [Item(*fields) for fields in order["items"]])
        except Exception as error:
            answers.write(json.dumps({"error": f"{type(error).__name__}: {error}"}) + "\n")
            raise
        answers.write(json.dumps(answer) + "\n")


def _run(engine: Engine, items: list[Item]) -> dict[str, Any]:
    engine.prepare(items)
    timeline = Timeline(items)
    engine.run(items, timeline)
    return timeline.answer()


def bytes_of_files(directory: str, *suffixes: str) -> int:
    """Bytes of the files of a directory, or of a single file, whose names end in one of the suffixes."""
    if os.path.isfile(directory):  # noqa: PTH113
        return os.path.getsize(directory)  # noqa: PTH202
    with os.scandir(directory) as entries:
        return sum(entry.stat().st_size for entry in entries if entry.name.endswith(suffixes))
