"""Tokens per second of this engine and of a peer on the same model, workload and machine, in one sitting.

    python -m benchmarks.offline --model s135m --peer transformers

Rounds are interleaved (ours, theirs, ours, theirs, ...), so that a machine whose speed drifts slows both; the medians
are compared.
"""

import argparse
import json
import statistics
from contextlib import ExitStack
from pathlib import Path

from benchmarks import machine, models, workloads
from benchmarks.contenders import CONTENDERS, Process, Setup
from engine.machine import available_cores

OURS = "manta"


def compare(setup: Setup, names: list[str], items: list[workloads.Item], rounds: int) -> dict[str, list[float]]:
    """Tokens per second of every round, by contender."""
    speeds: dict[str, list[float]] = {name: [] for name in names}
    with ExitStack() as stack:
        processes = [stack.enter_context(Process(name, setup)) for name in names]
        for number in range(1, rounds + 1):
            for process in processes:
                speed = process.tokens_per_second(items)
                speeds[process.name].append(speed)
                print(f"round {number}  {process.name:14}{speed:8.1f} tokens/s", flush=True)
    return speeds


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.offline",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", default="s135m", help=f"{', '.join(models.SHAPES)}, or a model directory")
    parser.add_argument("--peer", choices=sorted(CONTENDERS.keys() - {OURS}), default="transformers")
    parser.add_argument("--workload", choices=sorted(workloads.LENGTHS), default="even")
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=available_cores())
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args()

    path = models.find(arguments.model)
    lengths = workloads.LENGTHS[arguments.workload]
    items = workloads.make(arguments.requests, lengths, vocab_size=models.vocab_size(path), seed=arguments.seed)
    facts = machine.describe(arguments.threads)
    num_in = sum(len(item.prompt) for item in items)
    num_out = sum(item.output_tokens for item in items)
    print(", ".join(f"{name} {value}" for name, value in facts.items()))
    print(f"{arguments.model}, {len(items)} requests at once, {num_in} tokens in, {num_out} out, greedy")

    try:
        speeds = compare(Setup(path, arguments.threads), [OURS, arguments.peer], items, arguments.rounds)
    except RuntimeError as error:
        raise SystemExit(str(error)) from None
    medians = {name: statistics.median(values) for name, values in speeds.items()}
    ratio = medians[OURS] / medians[arguments.peer]
    print("median  " + "  ".join(f"{name} {speed:.1f} tokens/s" for name, speed in medians.items()))
    print(f"ratio   {ratio:.2f}x")
    if arguments.json is not None:
        result = {"machine": facts, "model": arguments.model, "workload": arguments.workload}
        result |= {"requests": len(items), "tokens_in": num_in, "tokens_out": num_out, "seed": arguments.seed}
        result |= {"tokens_per_second": speeds, "median": medians, "ratio": ratio}
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
