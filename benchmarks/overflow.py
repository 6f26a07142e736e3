"""Conversations that need more pages than the device has: what a KV host saves, and what it costs.

    python -m benchmarks.overflow --model s135m --json overflow.json --png overflow.png

Multi-turn conversations that open with U(512, 2048) tokens, half of them at once and in turns. A quarter of the room is
less than those that run at once come to need, so that some lose their pages amid an answer; and the pages of a
conversation are gone when it goes on, unless there is room for all or they come back from the host. With `--clients 4`
those that run have room, and only the latter is measured. Rounds alternate between the engines and use other tokens
each; medians are compared.
"""

import argparse
import json
import random
import statistics
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks import charts, machine, models, workloads
from benchmarks.tiered import Conversation, converse, kv_host, tiered_engine
from engine.engine import Engine
from engine.kv.cache import kv_bytes_per_token
from engine.machine import available_cores
from engine.models.directory import load_spec

OPENING = workloads.Range(512, 2048)
LATER = workloads.Range(32, 128)
OUTPUT = workloads.Range(64, 256)
MODES = {
    "unlimited": "room for everything",
    "write-through": "room for everything, and a host",
    "tier": "a quarter of the room, and a host",
    "recompute": "a quarter of the room",
}


@dataclass(frozen=True, slots=True)
class Shape:
    conversations: int
    turns: int
    clients: int


def talk(shape: Shape, vocabulary: int, seed: int) -> list[Conversation]:
    """The conversations of one round."""
    chance = random.Random(seed)

    def words(count: workloads.Range) -> list[int]:
        return [chance.randrange(workloads.FIRST_TOKEN_ID, vocabulary) for _ in range(chance.randint(*count))]

    return [
        Conversation(
            str(number),
            [words(LATER if turn else OPENING) for turn in range(shape.turns)],
            [chance.randint(*OUTPUT) for _ in range(shape.turns)],
        )
        for number in range(shape.conversations)
    ]


def working_set(shape: Shape) -> float:
    """Tokens of all conversations at their ends, on average."""
    return shape.conversations * (OPENING.mean + (shape.turns - 1) * LATER.mean + shape.turns * OUTPUT.mean)


def table(speeds: dict[str, list[float]], loaded: dict[str, tuple[int, int]]) -> Table:
    medians = {name: statistics.median(values) for name, values in speeds.items()}
    result = Table(title="Conversations of 4x the pool")
    for column in ("engine", "output tokens/s", "of unlimited", "preemptions", "pages loaded"):
        result.add_column(column, justify="left" if column == "engine" else "right")
    for name, speed in medians.items():
        preemptions, pages = loaded[name]
        share = f"{speed / medians['unlimited']:.2f}x" if "unlimited" in medians else "-"
        result.add_row(f"{name}: {MODES[name]}", f"{speed:.1f}", share, str(preemptions), str(pages))
    return result


def run(engines: dict[str, Engine], shape: Shape, vocabulary: int, rounds: int) -> dict[str, list[float]]:
    """Output tokens per second of each round. One before them, not counted, touches all memory for the first time."""
    speeds: dict[str, list[float]] = {name: [] for name in engines}
    for number in range(rounds + 1):
        for name, made in engines.items():
            seconds, produced = converse(
                made, talk(shape, vocabulary, number), shape.clients, f"{name} {number}", time.perf_counter
            )
            if number > 0:
                speeds[name].append(produced / seconds)
            print(f"round {number}  {name:26}{produced / seconds:8.1f} tokens/s", flush=True)
    return speeds


def print_ratios(speeds: dict[str, list[float]], medians: dict[str, float]) -> float | None:
    """What the engines say of each other; returns what write-through costs, as a share, if that was measured."""
    for other, aim in (("unlimited", 0.8), ("recompute", 1.5)):
        if {"tier", other} <= medians.keys():
            print(f"tier {medians['tier'] / medians[other]:.2f}x {other} (aim {aim}x)")
    if not {"unlimited", "write-through"} <= medians.keys():
        return None
    # Neighbours in time are compared, round by round: the machine drifts more than this is large.
    costs = [1 - b / a for a, b in zip(speeds["unlimited"], speeds["write-through"], strict=True)]
    print(f"write-through and checksums cost {100 * statistics.median(costs):.1f} % (aim 3 %)")
    return statistics.median(costs)


def names(text: str) -> tuple[str, ...]:
    """Names with commas between them. Raises ArgumentTypeError."""
    found = tuple(text.split(","))
    if unknown := [name for name in found if name not in MODES]:
        raise argparse.ArgumentTypeError(f"{unknown[0]!r} is none of {', '.join(MODES)}")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.overflow", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="s135m", help=f"{', '.join(models.SHAPES)}, or a model directory")
    parser.add_argument("--conversations", type=int, default=16)
    parser.add_argument("--turns", type=int, default=4)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--engines", type=names, default=tuple(MODES), help=f"of {','.join(MODES)}")
    parser.add_argument("--threads", type=int, default=available_cores())
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--png", type=Path, metavar="FILE", help="a chart of --json's file")
    arguments = parser.parse_args()
    charts.check(parser, arguments)
    shape = Shape(arguments.conversations, arguments.turns, arguments.clients)
    path = models.find(arguments.model)
    facts = machine.describe(arguments.threads)
    print(", ".join(f"{name} {value}" for name, value in facts.items()))
    spec = load_spec(path)
    tokens = working_set(shape)
    kv_bytes = int(tokens * kv_bytes_per_token(spec, torch.bfloat16))
    print(
        f"{arguments.model}: {shape.conversations} conversations of {shape.turns} turns, {shape.clients} at once: "
        f"{tokens:.0f} tokens, {kv_bytes / 2**20:.0f} MiB of keys and values"
    )
    with ExitStack() as stack:
        # Room for a round of both engines: what is measured is the device's overflow, not the host's.
        host = stack.enter_context(kv_host(int(2.5 * kv_bytes)))
        engines = {
            name: tiered_engine(
                path,
                kv_bytes=kv_bytes // 4 if name in ("tier", "recompute") else 2 * kv_bytes,
                threads=arguments.threads,
                host=host if name in ("tier", "write-through") else None,
            )
            for name in arguments.engines
        }
        for made in engines.values():
            stack.callback(made.close)
        speeds = run(engines, shape, models.vocab_size(path), arguments.rounds)
        stats = {name: made.stats() for name, made in engines.items()}
    counts = {name: (each.preemptions_total, each.tier_pages_loaded_total) for name, each in stats.items()}
    Console(width=120).print(table(speeds, counts))
    medians = {name: statistics.median(values) for name, values in speeds.items()}
    costs = print_ratios(speeds, medians)
    if arguments.json is not None:
        result: dict[str, Any] = {"machine": facts, "model": arguments.model, "tokens_per_second": speeds}
        result |= {"median": medians, "counts": counts, "write_through_cost": costs}
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")
    if arguments.png is not None:
        print(charts.draw(Path(__file__).with_name("chart_overflow.py"), arguments.json, arguments.png))


if __name__ == "__main__":
    main()
