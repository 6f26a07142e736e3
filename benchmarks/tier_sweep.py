"""Load or compute: the time to the first token where a prompt's pages are at the KV host, over contexts and bandwidths.

    python -m benchmarks.tier_sweep --model s135m --json sweep.json --png sweep.png

One engine computes each prompt, which puts its pages at the host. Three others are asked for it then: one loads
always, one computes always, one decides by what both have cost it so far. Loading is slowed down to each bandwidth in
turn. At the end, the second turn of a long conversation at a replica that has not seen the first.
"""

import argparse
import json
import random
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from benchmarks import charts, machine, models, workloads
from benchmarks.tiered import first_token_seconds, kv_host, request, tiered_engine
from cluster.kv.client import Bandwidth
from engine.engine import Engine
from engine.kv.cache import kv_bytes_per_token
from engine.kv.costs import LoadPolicy, choose_load
from engine.machine import available_cores
from engine.models.directory import load_spec

WARM_UP = 3
SETTLE_S = 0.05
LONG = 4096
LATER = 48


def always_load(seconds: Sequence[float], recompute: Callable[[int], float]) -> int:
    return len(seconds)


def always_compute(seconds: Sequence[float], recompute: Callable[[int], float]) -> int:
    return 0


POLICIES: dict[str, LoadPolicy] = {"load": always_load, "compute": always_compute, "decide": choose_load}


@dataclass(frozen=True, slots=True)
class Point:
    context: int
    bandwidth: float
    """Bytes a second; inf where nothing is slowed down."""
    seconds: dict[str, float]
    """To the first token, medians, by policy."""

    @property
    def regret(self) -> float:
        """How many times the better of the two fixed policies the deciding one takes."""
        return self.seconds["decide"] / min(self.seconds["load"], self.seconds["compute"])


class Sweep:
    """Engines and prompts of one model."""

    def __init__(self, path: Path, host: Path, kv_bytes: int, threads: int) -> None:
        self._path, self._host, self._kv_bytes, self._threads = path, host, kv_bytes, threads
        self._chance = random.Random(1)
        self._vocabulary = models.vocab_size(path)
        self._asked = 0
        self.writer = self.engine()

    def engine(self, bandwidth: float = float("inf"), choose: LoadPolicy = choose_load) -> Engine:
        limit = Bandwidth(load=None if bandwidth == float("inf") else bandwidth)
        return tiered_engine(
            self._path,
            kv_bytes=self._kv_bytes,
            threads=self._threads,
            host=self._host,
            bandwidth=limit,
            choose=choose,
        )

    def words(self, count: int) -> list[int]:
        return [self._chance.randrange(workloads.FIRST_TOKEN_ID, self._vocabulary) for _ in range(count)]

    def ask(self, made: Engine, prompt: list[int], output_tokens: int = 1) -> tuple[float, list[int]]:
        """Seconds to the first token, and the tokens. Prompts are random: only what is asked again is found."""
        self._asked += 1
        return first_token_seconds(made, request(str(self._asked), prompt, output_tokens, "sweep"))

    def points(self, contexts: list[int], bandwidth: float, rounds: int) -> list[Point]:
        engines = {name: self.engine(bandwidth, policy) for name, policy in POLICIES.items()}
        try:
            for number in range(WARM_UP):
                self._round(engines, contexts[number % len(contexts)])
                # What decides has to have computed something, too.
                self.ask(engines["decide"], self.words(contexts[-1 - number % len(contexts)]))
            return [self._point(engines, context, bandwidth, rounds) for context in contexts]
        finally:
            for made in engines.values():
                made.close()

    def _point(self, engines: dict[str, Engine], context: int, bandwidth: float, rounds: int) -> Point:
        taken = [self._round(engines, context) for _ in range(rounds)]
        medians = {name: statistics.median(round_[name] for round_ in taken) for name in engines}
        point = Point(context, bandwidth, medians)
        each = "  ".join(f"{name} {1e3 * seconds:.0f} ms" for name, seconds in medians.items())
        print(f"{context:5} tokens, {_rate(bandwidth):>10}: {each}  ({point.regret:.2f}x the better)", flush=True)
        return point

    def _round(self, engines: dict[str, Engine], context: int) -> dict[str, float]:
        prompt = self.words(context)
        self.ask(self.writer, prompt)
        time.sleep(SETTLE_S)
        names = list(engines)
        self._chance.shuffle(names)
        return {name: self.ask(engines[name], prompt)[0] for name in names}

    def second_turn(self, rounds: int) -> tuple[float, float]:
        """Seconds to the first token of a long prompt that nobody has seen, and of the turn after it elsewhere."""
        other = self.engine()
        try:
            taken = []
            for _ in range(rounds + 1):
                prompt = self.words(LONG)
                cold, answer = self.ask(self.writer, prompt, 32)
                time.sleep(SETTLE_S)
                warm, _ = self.ask(other, [*prompt, *answer, *self.words(LATER)])
                taken.append((cold, warm))
            cold, warm = (statistics.median(column) for column in zip(*taken[1:], strict=True))
            return cold, warm
        finally:
            other.close()


def _rate(bandwidth: float) -> str:
    return "memory" if bandwidth == float("inf") else f"{bandwidth / 1e9:g} GB/s"


def table(points: list[Point]) -> Table:
    result = Table(title="Seconds to the first token")
    for column in ("context", "bandwidth", *POLICIES, "decide / better"):
        result.add_column(column, justify="right")
    for point in points:
        times = (f"{1e3 * point.seconds[name]:.0f} ms" for name in POLICIES)
        result.add_row(str(point.context), _rate(point.bandwidth), *times, f"{point.regret:.2f}x")
    return result


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.tier_sweep",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", default="s135m", help=f"{', '.join(models.SHAPES)}, or a model directory")
    parser.add_argument("--contexts", default="256,1024,4096", help="tokens: %(default)s")
    parser.add_argument("--bandwidths", default="0.02,0.05,0.1,0.5,inf", help="GB/s: %(default)s")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=available_cores())
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--png", type=Path, metavar="FILE", help="a chart of --json's file")
    arguments = parser.parse_args()
    charts.check(parser, arguments)
    contexts = [int(text) for text in arguments.contexts.split(",")]
    bandwidths = [float(text) * 1e9 for text in arguments.bandwidths.split(",")]
    path = models.find(arguments.model)
    facts = machine.describe(arguments.threads)
    print(", ".join(f"{name} {value}" for name, value in facts.items()))
    token_bytes = kv_bytes_per_token(load_spec(path), torch.bfloat16)
    kv_bytes = token_bytes * 2 * (max(*contexts, LONG) + 256)
    with ExitStack() as stack:
        host = stack.enter_context(kv_host(8 * kv_bytes))
        sweep = Sweep(path, host, kv_bytes, arguments.threads)
        stack.callback(sweep.writer.close)
        points = [point for bandwidth in bandwidths for point in sweep.points(contexts, bandwidth, arguments.rounds)]
        cold, warm = sweep.second_turn(arguments.rounds)
    Console(width=120).print(table(points))
    print(f"worst: {max(point.regret for point in points):.2f}x the better of the two (aim 1.05x)")
    print(
        f"second turn of {LONG} tokens at another replica: {1e3 * warm:.0f} ms, cold {1e3 * cold:.0f} ms: "
        f"{warm / cold:.3f}x (aim 0.15x)"
    )
    if arguments.json is not None:
        rows = [{"context": p.context, "bandwidth": _rate(p.bandwidth), "seconds": p.seconds} for p in points]
        result = {"machine": facts, "model": arguments.model, "points": rows, "second_turn": [cold, warm]}
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")
    if arguments.png is not None:
        print(charts.draw(Path(__file__).with_name("chart_sweep.py"), arguments.json, arguments.png))


if __name__ == "__main__":
    main()
