"""One model over two ranks of this machine: what cutting it costs, and what the parts cost each other.

    python -m benchmarks.parallel --json parallel.json --png parallel.png

Ranks have one thread each, so that two ranks and one with two threads have the same cores.

- `tensor`: two ranks that share every layer, against one rank; 16 requests at once.
- `pipeline`: two stages with two batches of 64 sequences in flight, against one of 64, and one of 128, which leave one
  of the two waiting. At steady load: as one request ends the next begins. Tokens are those that were run, of prompts
  and of outputs; bubbles are the share of the time in which a stage had nothing to run. Batches are large because two
  stages that only read weights share the memory's bandwidth: a core alone may take nearly all of it.
- `dispatch`: until both ranks have a batch that the group sends them, and until 8 ranks on 4 hosts do, which are
  network namespaces of this machine (`benchmarks.dispatch`).
- `mixture`: routing by a table against one-hot dispatch (`benchmarks.routing`), and whether experts that are dealt out
  to two ranks draw the tokens that one rank draws.

Of each group also how long it takes to be there, with the files in the page cache, and what each rank needs in memory
on top of its share: its weights, and the pages that sequences were given.
Sides take turns; medians count. To be run with nothing else on the machine.
"""

import argparse
import json
import statistics
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks import charts, contenders, dispatch, machine, mixtures, models, workloads
from benchmarks.contenders import Process, Setup
from benchmarks.rank_groups import RankGroup, own_ray
from benchmarks.steady import Steady, steady
from cluster.config import ParallelConfig
from engine.machine import available_cores

RANKS = 2
BATCH = 16
STAGE_BATCH = 64
"""Two of them are as many sequences as a replica runs by default."""
KV_BYTES = 2 * 2**30
"""Of a group's ranks together: for 128 sequences of a model like m1b, half way through, twice as much as they need."""
LENGTHS = workloads.EVEN
DEEP = f"depth 2, 2 x {STAGE_BATCH}"


@dataclass(frozen=True, slots=True)
class Line:
    """Something that was measured, beside what it should be."""

    name: str
    value: float
    unit: str
    aim: float
    at_most: bool
    """Whether less is better."""

    @property
    def is_met(self) -> bool:
        return self.value <= self.aim if self.at_most else self.value >= self.aim

    def cells(self) -> tuple[str, str, str, str]:
        """As text."""
        aim = f"{'<=' if self.at_most else '>='} {self._text(self.aim)}"
        return self.name, self._text(self.value), aim, "yes" if self.is_met else "no"

    def _text(self, value: float) -> str:
        return f"{value:.1%}" if self.unit == "%" else f"{value:.2f}{'' if self.unit == 'x' else ' '}{self.unit}"


class Report:
    """What has been measured so far."""

    def __init__(self, console: Console) -> None:
        self.lines: list[Line] = []
        self.details: dict[str, Any] = {}
        self._console = console

    def say(self, text: str) -> None:
        self._console.print(text, highlight=False, soft_wrap=True)

    def at_least(self, name: str, value: float, unit: str, aim: float) -> None:
        self.lines.append(Line(name, value, unit, aim, at_most=False))

    def at_most(self, name: str, value: float, unit: str, aim: float) -> None:
        self.lines.append(Line(name, value, unit, aim, at_most=True))

    def group(self, kind: str, group: RankGroup) -> None:
        """How long it took to be there, and what its ranks need."""
        self.at_most(f"{kind}: group is up", group.seconds, "s", 15.0)
        found = group.memory()
        for rank, memory in enumerate(found):
            grown = memory.peak - memory.before
            self.say(
                f"{kind} rank {rank}: {_mebibytes(memory.weights)} of weights, loaded with "
                f"{memory.loading_overhead:.1%} on top; in the end {_mebibytes(grown)} beyond the "
                f"{_mebibytes(memory.before)} of an empty process, with {_mebibytes(memory.pages)} of pages in use"
            )
        self.details[f"{kind} memory"] = [asdict(memory) for memory in found]
        worst = max(max(memory.loading_overhead, memory.overhead) for memory in found)
        self.at_most(f"{kind}: peak of a rank, on top of its share", worst, "%", 0.2)


@dataclass(frozen=True)
class Measurement:
    """What all parts are given."""

    model: Path
    rounds: int
    seconds: float
    """Of each turn at steady load."""
    split: tuple[int, ...]
    report: Report

    def tensor(self) -> None:
        items = workloads.make(BATCH, LENGTHS, vocab_size=models.vocab_size(self.model))
        speeds: dict[str, list[float]] = {"one rank, two threads": [], "two ranks": []}
        group = RankGroup("tensor", self.model, ParallelConfig(tensor=RANKS), KV_BYTES)
        try:
            engine, _ = group.engine(1, BATCH)
            contenders.run(engine, items[:2])
            with Process("manta", Setup(self.model, RANKS)) as whole:
                for number in range(1, self.rounds + 1):
                    speeds["one rank, two threads"].append(whole.tokens_per_second(items))
                    speeds["two ranks"].append(contenders.tokens_per_second(engine, items))
                    self._say_round(number, {name: f"{each[-1]:.1f} tokens/s" for name, each in speeds.items()})
            self.report.details["tensor"] = speeds
            alone, cut = (statistics.median(each) for each in speeds.values())
            self.report.at_least("tensor: two ranks to one with two threads", cut / alone, "x", 0.85)
            self.report.group("tensor", group)
        finally:
            group.close()

    def pipeline(self) -> None:
        sides = {f"depth 1, {count}": (1, count) for count in (STAGE_BATCH, RANKS * STAGE_BATCH)}
        sides[DEEP] = (RANKS, RANKS * STAGE_BATCH)
        found: dict[str, list[Steady]] = {name: [] for name in sides}
        group = RankGroup("pipeline", self.model, ParallelConfig(pipeline=RANKS), KV_BYTES, self.split)
        self.report.say(f"layers of the stages: {', '.join(map(str, group.layers))}")
        try:
            for number in range(1, self.rounds + 1):
                for name, (depth, sequences) in sides.items():
                    engine, executor = group.engine(depth, sequences)
                    items = workloads.stream(LENGTHS, vocab_size=engine.vocab_size, seed=number)
                    counts = (lambda executor=executor: executor.num_tokens, lambda: group.waited_s)
                    found[name].append(steady(engine, items, sequences, self.seconds, *counts))
                self._say_round(number, {name: each[-1].text() for name, each in found.items()})
            self.report.details["pipeline"] = {name: [asdict(one) for one in each] for name, each in found.items()}
            self._compare_depths(found)
            self.report.group("pipeline", group)
        finally:
            group.close()

    def dispatch(self) -> None:
        times = dispatch.measure(dispatch.one_host(RANKS), BATCH, context=256, steps=500, pause_s=0.005)
        last = statistics.median(each.last for each in times) / 1000
        self.report.details["dispatch"] = last
        self.report.at_most("dispatch: both ranks have the batch, p50", last, "ms", 0.3)
        with tempfile.TemporaryDirectory() as folder:
            found = Path(folder) / "found.json"
            sizes = ["--ranks", "8", "--hosts", "4", "--sequences", str(BATCH), "--context", "256"]
            if dispatch.over_hosts([*sizes, "--json", str(found)]) == 0:
                (line,) = json.loads(found.read_text())
                self.report.details["dispatch over hosts"] = line
                self.report.at_most("dispatch: 8 ranks on 4 hosts have it, p50", line["last"] / 1000, "ms", 1.0)

    def mixture(self) -> None:
        ratios = mixtures.routing_ratios(available_cores(), self.rounds)
        self.report.details["routing"] = ratios
        self.report.say(", ".join(f"{name} {ratio:.1f}x" for name, ratio in ratios.items()))
        slowest = min(ratio for name, ratio in ratios.items() if name.startswith("one-hot"))
        self.report.at_least("mixture: one-hot to a table, 64 experts, 4,096 tokens", slowest, "x", 3.0)
        same, count = mixtures.same_tokens()
        self.report.details["experts"] = [same, count]
        self.report.at_least("mixture: tokens that two expert ranks draw as one does", same / count, "%", 1.0)

    def _compare_depths(self, found: dict[str, list[Steady]]) -> None:
        speeds = {name: statistics.median(one.tokens_per_second for one in each) for name, each in found.items()}
        deep = speeds.pop(DEEP)
        for name, speed in speeds.items():
            self.report.at_least(f"pipeline: two batches in flight to {name}", deep / speed, "x", 1.6)
        shares = zip(*(one.bubbles for one in found[DEEP]), strict=True)
        bubbles = [statistics.median(each) for each in shares]
        shown = ", ".join(f"{share:.1%}" for share in bubbles)
        self.report.say(f"bubbles of the stages: {shown}; mean {statistics.mean(bubbles):.1%}")
        self.report.at_most("pipeline: bubbles, worst stage", max(bubbles), "%", 0.1)

    def _say_round(self, number: int, found: dict[str, str]) -> None:
        self.report.say(f"round {number}: " + "; ".join(f"{name}: {text}" for name, text in found.items()))


def _mebibytes(num_bytes: int) -> str:
    return f"{num_bytes / 2**20:.0f} MiB"


PARTS: dict[str, Callable[[Measurement], None]] = {
    "tensor": Measurement.tensor,
    "pipeline": Measurement.pipeline,
    "dispatch": Measurement.dispatch,
    "mixture": Measurement.mixture,
}


def table(lines: list[Line]) -> Table:
    result = Table(title=f"One model over {RANKS} ranks")
    for column in ("", "measured", "aim", "met"):
        result.add_column(column, justify="left" if not column else "right")
    for line in lines:
        result.add_row(*line.cells())
    return result


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.parallel", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="m1b", help=f"{', '.join(models.SHAPES)}, or a model directory")
    parser.add_argument("--only", default=",".join(PARTS), help="comma-separated (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=20.0, help="of a turn at steady load (default: %(default)s)")
    parser.add_argument("--split", default="", metavar="N,N", help="layers of each stage, in place of the usual ones")
    parser.add_argument("--json", type=Path, metavar="FILE", help="keep the result with what it was measured on")
    parser.add_argument("--png", type=Path, metavar="FILE", help="a chart of --json's file")
    arguments = parser.parse_args()
    charts.check(parser, arguments)
    parts = arguments.only.split(",")
    if unknown := set(parts) - set(PARTS):
        parser.error(f"--only: no {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    split = tuple(int(layers) for layers in arguments.split.split(",") if layers)
    console = Console(width=max(Console().width, 110))
    report = Report(console)
    facts = machine.describe(RANKS)
    report.say(", ".join(f"{name} {value}" for name, value in facts.items()))
    measurement = Measurement(models.find(arguments.model), arguments.rounds, arguments.seconds, split, report)
    with own_ray(num_cpus=RANKS):
        for part in parts:
            PARTS[part](measurement)
    console.print(table(report.lines))
    if arguments.json is not None:
        lines = [asdict(line) for line in report.lines]
        result = {"machine": facts, "model": arguments.model, "lines": lines, "details": report.details}
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")
    if arguments.png is not None:
        print(charts.draw(Path(__file__).with_name("chart_parallel.py"), arguments.json, arguments.png))


if __name__ == "__main__":
    main()
