"""Draws the JSON of benchmarks.parallel: `python chart_parallel.py parallel.json parallel.png`, run by the environment
`chart`. Imports nothing of the project.
"""

import json
import sys
from pathlib import Path
from typing import Any

import matplotlib  # type: ignore[import-not-found,unused-ignore]

matplotlib.use("Agg")
from matplotlib import pyplot  # type: ignore[import-not-found,unused-ignore]

MET, MISSED = "#0b6e99", "#c0504d"


def draw(result: dict[str, Any], target: Path) -> None:
    """Writes a PNG with a bar for every line: how many times better than its aim it is, on a logarithmic axis."""
    lines = result["lines"]
    figure, panel = pyplot.subplots(figsize=(9, 0.4 * len(lines) + 1.2))
    for place, line in enumerate(lines):
        better = line["aim"] / line["value"] if line["at_most"] else line["value"] / line["aim"]
        panel.barh(-place, better - 1, left=1, color=MET if better >= 1 else MISSED, height=0.7)
        text = f"{line['value']:.1%}" if line["unit"] == "%" else f"{line['value']:.2f} {line['unit']}"
        panel.annotate(text, (better, -place), xytext=(4, 0), textcoords="offset points", va="center", fontsize=8)
    panel.axvline(1, color="black", linewidth=1)
    panel.set_xscale("log")
    panel.margins(x=0.15)
    panel.set_yticks([-place for place in range(len(lines))], [line["name"] for line in lines], fontsize=8)
    panel.set_xlabel("times better than the aim")
    machine = result["machine"]
    panel.set_title(
        f"{result['model']}: {machine['cpu']}, {machine['threads']} threads, {machine['date'][:10]}",
        fontsize=9,
        loc="left",
    )
    figure.tight_layout()
    figure.savefig(target, dpi=150)


if __name__ == "__main__":
    draw(json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2]))
