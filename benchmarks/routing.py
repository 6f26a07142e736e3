"""Routing of a mixture of experts by a table against dispatch by one-hot matrices: milliseconds, and the ratios.

    python -m benchmarks.routing --tokens 4096 --experts 64 --per-token 2 --width 1024

What is timed is everything of a mixture but the experts themselves: from the router's logits to the rows that each
expert is given, and from its results, here the rows as they are, to every token's weighted sum.

- `table, C`: the operations that the engine runs on a CPU.
- `table, torch`: the same in torch, which the engine runs where it has no kernels.
- `one-hot, einsum`: a mask [tokens, experts, capacity] multiplies the tokens and later the results (Lepikhin et al.,
  2020; Rajbhandari et al., 2022). The capacity is what the fullest expert needs, as nobody else drops tokens either.
- `one-hot, loop`: a mask [experts, per token, tokens], searched expert by expert, as transformers has it.

All results are compared before anything is timed. Sides take turns; medians count.
"""

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import machine
from benchmarks.linear import take_turns
from engine.kernels.cpu.compiler import compile_library
from engine.kernels.cpu.experts import CpuTable
from engine.kernels.cpu.library import Library
from engine.kernels.cpu.program import Program, Recorder, StepArrays
from engine.kernels.operators import Routing
from engine.kernels.routing import route, sum_by_weight
from engine.machine import available_cores


@dataclass(frozen=True)
class Work:
    """A step: `logits` [T, experts] and `x` [T, width], both float32."""

    logits: Tensor
    x: Tensor
    routing: Routing


@dataclass(frozen=True)
class Result:
    name: str
    seconds: float
    ratio: float
    """Of these seconds to those of the table in C."""


def by_table_in_c(library: Library, threads: int, work: Work) -> Callable[[], Tensor]:
    """One program, as a step of the engine is."""
    recorder = Recorder(library, threads, len(work.x))
    table = CpuTable(recorder, work.routing, work.logits)
    program: Program = recorder.program(table.sum(table.gather(work.x), torch.float32))
    return partial(program.run, StepArrays(len(work.x)))


def by_table_in_torch(work: Work) -> Tensor:
    table = route(work.logits, work.routing)
    return sum_by_weight(work.x.index_select(0, table.sources), table)


def choose(work: Work) -> tuple[Tensor, Tensor]:
    """Weights and experts of each token, both [T, per_token]."""
    weights, chosen = work.logits.softmax(dim=1).topk(work.routing.per_token, dim=1)
    return weights / weights.sum(dim=1, keepdim=True), chosen


def by_one_hot_einsum(work: Work) -> Tensor:
    weights, chosen = choose(work)
    tokens, per_token = chosen.shape
    mask = F.one_hot(chosen, work.routing.experts)
    # A pair's place among those of its expert, in the order of tokens.
    places = (mask.view(-1, work.routing.experts).cumsum(0) - 1).view(tokens, per_token, -1)
    capacity = int(mask.sum((0, 1)).max())
    place = F.one_hot((places * mask).sum(2), capacity).to(torch.float32)
    combine = torch.einsum("tk,tke,tkc->tec", weights, mask.to(torch.float32), place)
    dispatched = torch.einsum("tec,tm->ecm", (combine > 0).to(torch.float32), work.x)
    return torch.einsum("tec,ecm->tm", combine, dispatched)


def by_one_hot_loop(work: Work) -> Tensor:
    weights, chosen = choose(work)
    total = torch.zeros_like(work.x)
    mask = F.one_hot(chosen, work.routing.experts).permute(2, 1, 0)
    for expert in mask.sum((1, 2)).nonzero().flatten().tolist():
        index, token = torch.where(mask[expert])
        total.index_add_(0, token, work.x[token] * weights[token, index, None])
    return total


def measure(library: Library, threads: int, work: Work, rounds: int, seconds: float) -> list[Result]:
    sides: dict[str, Callable[[], Tensor]] = {
        "table, C": by_table_in_c(library, threads, work),
        "table, torch": partial(by_table_in_torch, work),
        "one-hot, einsum": partial(by_one_hot_einsum, work),
        "one-hot, loop": partial(by_one_hot_loop, work),
    }
    # The weights of a token add up to 1, and its experts return it as it is.
    for side in sides.values():
        torch.testing.assert_close(side(), work.x, rtol=1e-4, atol=1e-4)
    taken = dict(zip(sides, take_turns(list(sides.values()), rounds, seconds), strict=True))
    return [Result(name, spent, spent / taken["table, C"]) for name, spent in taken.items()]


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.routing", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--experts", type=int, default=64)
    parser.add_argument("--per-token", type=int, default=2)
    parser.add_argument("--width", type=int, default=1024, help="of a token (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=0.2, help="of each turn (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=available_cores())
    parser.add_argument("--json", type=Path, metavar="FILE", help="keep the result with what it was measured on")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    routing = Routing(arguments.experts, arguments.per_token, True, range(arguments.experts))
    logits, x = torch.randn(arguments.tokens, arguments.experts), torch.randn(arguments.tokens, arguments.width)
    print(
        f"{machine.cpu_name()}, {arguments.threads} threads: {arguments.tokens} tokens of {arguments.width} float32, "
        f"{arguments.per_token} of {arguments.experts} experts each"
    )
    results = measure(
        compile_library(), arguments.threads, Work(logits, x, routing), arguments.rounds, arguments.seconds
    )
    for result in results:
        print(f"{result.name:16} {result.seconds * 1e3:10.2f} ms {result.ratio:8.1f}x")
    if arguments.json is not None:
        settings = {key: value for key, value in vars(arguments).items() if key != "json"}
        report = machine.describe(arguments.threads) | settings | {"results": [asdict(result) for result in results]}
        arguments.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
