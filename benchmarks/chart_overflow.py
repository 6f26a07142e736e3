"""Draws the JSON of benchmarks.overflow: `python chart_overflow.py overflow.json overflow.png`, run by the environment
`chart`. Imports nothing of the project.
"""

import json
import sys
from pathlib import Path
from typing import Any

import matplotlib  # type: ignore[import-not-found,unused-ignore]

matplotlib.use("Agg")
from matplotlib import pyplot  # type: ignore[import-not-found,unused-ignore]

COLOURS = {
    "unlimited": "#b0b0b0",
    "write-through": "#888888",
    "tier": "#0b6e99",
    "recompute": "#e0a030",
}


def draw(result: dict[str, Any], target: Path) -> None:
    """Writes a PNG with a bar for every engine, the rounds as dots."""
    figure, panel = pyplot.subplots(figsize=(7.5, 3))
    for place, (name, median) in enumerate(result["median"].items()):
        rounds = result["tokens_per_second"][name]
        panel.barh(-place, median, color=COLOURS[name], height=0.8)
        panel.plot(rounds, [-place] * len(rounds), ".", color="black", markersize=4)
        panel.text(0, -place, f"  {median:.0f}", va="center", fontsize=9, color="white")
    panel.set_yticks([-place for place in range(len(result["median"]))], list(result["median"]))
    panel.set_xlabel("output tokens/s")
    machine = result["machine"]
    panel.set_title(
        f"{result['model']}, conversations of 4x the pool\n"
        f"{machine['cpu']}, {machine['threads']} threads, {machine['date'][:10]}",
        fontsize=9,
        loc="left",
    )
    figure.tight_layout()
    figure.savefig(target, dpi=150)


if __name__ == "__main__":
    draw(json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2]))
