"""Iteration-level against request-level scheduling on this engine, per batch limit (Orca, OSDI'22).

    python -m benchmarks.iteration_level

First saturation, with every request waiting from the start: tokens per iteration and per second of both, their ratios,
and the closed form E[max] / E[mean] of the output lengths that the ratio of iterations has to meet. Then Poisson
arrivals at shares of the request-level capacity: median seconds from arrival to answer per output token.
"""

import argparse
import json
import logging
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks import machine, models, workloads
from benchmarks.scheduling import Trace, iteration_level, request_level
from engine.build import build_engine
from engine.config import EngineConfig, KVConfig, SchedulerConfig
from engine.engine import Engine

LOADS = (0.3, 0.6, 0.9)
LENGTHS = workloads.ORCA


@dataclass(frozen=True, slots=True)
class Saturation:
    """Both ways with a queue that is never empty."""

    batch_limit: int
    iteration: Trace
    request: Trace

    @property
    def ratio_of_steps(self) -> float:
        """How many times more tokens an iteration brings."""
        return self.iteration.tokens_per_step / self.request.tokens_per_step

    @property
    def ratio_of_seconds(self) -> float:
        """How many times more tokens a second brings."""
        return self.iteration.tokens_per_second / self.request.tokens_per_second

    @property
    def closed_form(self) -> float:
        return workloads.request_level_penalty(LENGTHS.output, self.batch_limit)

    @property
    def requests_per_second(self) -> float:
        """Capacity of request-level scheduling: what the loads are shares of."""
        return self.request.tokens_per_second / LENGTHS.output.mean


@dataclass(frozen=True, slots=True)
class Latency:
    """Medians of seconds per output token, from arrival to answer, at one load."""

    batch_limit: int
    load: float
    iteration: float
    request: float

    @property
    def ratio(self) -> float:
        return self.request / self.iteration


def engine_of(path: Path, batch_limit: int, threads: int) -> Engine:
    """An engine in which a whole batch of the longest prompts fits one iteration, as Orca's does."""
    budget = batch_limit * LENGTHS.prompt.high
    pages_of = LENGTHS.prompt.high + LENGTHS.output.high
    return build_engine(
        EngineConfig(
            model=str(path),
            device="cpu",
            threads=threads,
            max_model_len=pages_of,
            kv=KVConfig(memory="auto", prefix_caching=False),
            scheduler=SchedulerConfig(
                max_sequences=batch_limit, max_batch_tokens=budget, max_stall_s=None, admission="reserve"
            ),
        )
    )


@dataclass(frozen=True, slots=True)
class Contest:
    """One engine with its batch limit, and the rules for request-level batches on it."""

    engine: Engine
    batch_limit: int
    shrinks: bool

    def saturate(self, items: Sequence[workloads.Item]) -> Saturation:
        return Saturation(self.batch_limit, iteration_level(self.engine, items), self._by_batches(items))

    def under_load(self, items: list[workloads.Item], load: float, capacity: float, seed: int) -> Latency:
        """Poisson arrivals at a share of `capacity`, in requests per second; the same arrivals for both."""
        arriving = workloads.poisson(items, load * capacity, seed=seed)
        ours = iteration_level(self.engine, arriving).normalised_latencies
        theirs = self._by_batches(arriving).normalised_latencies
        return Latency(self.batch_limit, load, statistics.median(ours), statistics.median(theirs))

    def _by_batches(self, items: Sequence[workloads.Item]) -> Trace:
        return request_level(self.engine, items, self.batch_limit, shrinks=self.shrinks)


def saturation_table(rows: Sequence[Saturation]) -> Table:
    table = Table(title="Saturation: iteration-level / request-level")
    for name in ("batch limit", "tokens/step", "tokens/s", "steps", "closed form", "off by", "seconds", "off by"):
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(
            str(row.batch_limit),
            f"{row.iteration.tokens_per_step:.2f} / {row.request.tokens_per_step:.2f}",
            f"{row.iteration.tokens_per_second:.0f} / {row.request.tokens_per_second:.0f}",
            f"{row.ratio_of_steps:.2f}x",
            f"{row.closed_form:.2f}x",
            f"{row.ratio_of_steps / row.closed_form - 1:+.1%}",
            f"{row.ratio_of_seconds:.2f}x",
            f"{row.ratio_of_seconds / row.closed_form - 1:+.1%}",
        )
    return table


def latency_table(rows: Sequence[Latency]) -> Table:
    table = Table(title="Poisson arrivals: median ms per output token, from arrival to answer")
    for name in ("batch limit", "load", "iteration-level", "request-level", "lower by"):
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(
            str(row.batch_limit),
            f"{row.load:.0%}",
            f"{1e3 * row.iteration:.2f}",
            f"{1e3 * row.request:.2f}",
            f"{row.ratio:.2f}x",
        )
    return table


def number_of_requests(batch_limit: int, batches: int, least: int) -> int:
    """Enough whole batches for a mean of their longest outputs."""
    return max(least - least % -batch_limit, batches * batch_limit)


def as_json(facts: dict[str, Any], model: str, saturations: list[Saturation], latencies: list[Latency]) -> str:
    result = {
        "machine": facts,
        "model": model,
        "saturation": [
            {
                "batch_limit": row.batch_limit,
                "tokens_per_step": [row.iteration.tokens_per_step, row.request.tokens_per_step],
                "tokens_per_second": [row.iteration.tokens_per_second, row.request.tokens_per_second],
                "ratio_of_steps": row.ratio_of_steps,
                "ratio_of_seconds": row.ratio_of_seconds,
                "closed_form": row.closed_form,
            }
            for row in saturations
        ],
        "latency": [
            {"batch_limit": row.batch_limit, "load": row.load, "seconds_per_token": [row.iteration, row.request]}
            for row in latencies
        ],
    }
    return json.dumps(result, indent=2) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.iteration_level",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", default="thin", help=f"{', '.join(models.SHAPES)}, or a model directory")
    parser.add_argument("--batch-limits", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32], metavar="B")
    parser.add_argument("--batches", type=int, default=16, help="request-level batches at saturation, at least")
    parser.add_argument("--requests", type=int, default=128, help="requests at saturation, at least")
    parser.add_argument("--arrivals", type=int, default=64, help="requests of a Poisson run, at least; 0: none")
    parser.add_argument("--shrink", action="store_true", help="request-level batches lose a row when it ends")
    parser.add_argument("--threads", type=int, default=1, help="the default model is too small for more than 1")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.WARNING)

    console = Console(width=max(Console().width, 110))  # Tables are meant to be kept, so they do not fold.
    path = models.find(arguments.model)
    facts = machine.describe(arguments.threads)
    console.print(", ".join(f"{name} {value}" for name, value in facts.items()), highlight=False)
    console.print(f"{arguments.model}: prompts U{tuple(LENGTHS.prompt)}, outputs U{tuple(LENGTHS.output)}, greedy")

    saturations: list[Saturation] = []
    latencies: list[Latency] = []
    for limit in arguments.batch_limits:
        engine = engine_of(path, limit, arguments.threads)
        contest = Contest(engine, limit, arguments.shrink)
        count = number_of_requests(limit, arguments.batches, arguments.requests)
        items = workloads.make(count, LENGTHS, vocab_size=engine.vocab_size, seed=arguments.seed)
        contest.saturate(items[: 2 * limit])  # The first run pays for lazy initialisation.
        saturations.append(saturation := contest.saturate(items))
        console.print(f"batch limit {limit}: {count} requests, {saturation.ratio_of_seconds:.2f}x", highlight=False)
        if arguments.arrivals:
            some, capacity = items[: max(arguments.arrivals, 6 * limit)], saturation.requests_per_second
            latencies += [contest.under_load(some, load, capacity, arguments.seed) for load in LOADS]
        engine.close()
    console.print(saturation_table(saturations))
    if latencies:
        console.print(latency_table(latencies))
    if arguments.json is not None:
        arguments.json.write_text(as_json(facts, arguments.model, saturations, latencies))


if __name__ == "__main__":
    main()
