"""This engine beside others, in one sitting on this machine.

    python -m benchmarks.peers.install
    python -m benchmarks.peers --models s135m,m1b --bits 16,8,4 --json sitting.json --png sitting.png

Every engine runs in its own process and environment, on the same weights (each in its own format), workload and number
of threads; runs alternate, so that a machine whose speed drifts slows all of them. See benchmarks/README.md.
"""

import argparse
import json
from pathlib import Path

from rich.console import Console

from benchmarks import charts, machine, models
from benchmarks.peers import report
from benchmarks.peers.engines import ENGINES, OURS, PEERS, interpreter
from benchmarks.peers.measures import MEASURES, START
from benchmarks.peers.sitting import Group, Plan, run_group
from engine.machine import available_cores

BITS = ("16", "8", "4")
_WIDTH = 170


def chosen(text: str, known: tuple[str, ...], what: str) -> tuple[str, ...]:
    """The names of a comma-separated list, in its order. Exits with a message if one is unknown."""
    names = tuple(name for name in text.split(",") if name)
    unknown = [name for name in names if name not in known]
    if unknown:
        raise SystemExit(f"--{what}: there is no {', '.join(unknown)}; there are {', '.join(known)}")
    return names


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.peers", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    columns = (*MEASURES, START)
    parser.add_argument("--models", default="s135m", help=f"{', '.join(models.SHAPES)}, or model directories")
    parser.add_argument("--peers", default=",".join(PEERS), help="%(default)s")
    parser.add_argument("--bits", default=",".join(BITS), help="of the weights: %(default)s")
    parser.add_argument("--measure", default=",".join(columns), help="%(default)s")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=available_cores())
    parser.add_argument("--timeout", type=float, default=900.0, help="seconds for one order to one engine")
    parser.add_argument("--json", type=Path, metavar="FILE", help="written after every group")
    parser.add_argument("--png", type=Path, metavar="FILE", help="a chart of --json's file")
    arguments = parser.parse_args()
    charts.check(parser, arguments)

    plan = Plan(
        engines=(OURS, *chosen(arguments.peers, PEERS, "peers")),
        measures=chosen(arguments.measure, columns, "measure"),
        threads=arguments.threads,
        rounds=arguments.rounds,
        timeout=arguments.timeout,
    )
    bits = [int(text) for text in chosen(arguments.bits, BITS, "bits")]
    paths = [models.find(name) for name in arguments.models.split(",")]
    facts = machine.describe(arguments.threads)
    print(", ".join(f"{name} {value}" for name, value in facts.items()))
    for name in plan.engines:
        state = "ready" if interpreter(name) else f"not installed: run python -m benchmarks.peers.install {name}"
        print(f"{ENGINES[name].title}: {state}")

    groups: list[Group] = []
    for path in paths:
        for each in bits:
            group = run_group(plan, path, each, lambda line: print(line, flush=True))
            if group is None:
                continue
            groups.append(group)
            if arguments.json is not None:
                arguments.json.write_text(json.dumps(report.as_json(groups, plan.measures, facts), indent=2) + "\n")
    console = Console(width=_WIDTH)
    console.print(report.table(groups, plan.measures))
    for problem in report.problems(groups):
        print(problem)
    if arguments.png is not None:
        print(charts.draw(Path(__file__).with_name("chart.py"), arguments.json, arguments.png))


if __name__ == "__main__":
    main()
