"""Draws the JSON of benchmarks.tier_sweep: `python chart_sweep.py sweep.json sweep.png`, run by the environment
`chart`. Imports nothing of the project.
"""

import json
import sys
from pathlib import Path
from typing import Any

import matplotlib  # type: ignore[import-not-found,unused-ignore]

matplotlib.use("Agg")
from matplotlib import pyplot  # type: ignore[import-not-found,unused-ignore]

LINES = {
    "load": {"color": "#5d9e5d", "linestyle": "--", "label": "always load"},
    "compute": {"color": "#e0a030", "linestyle": "--", "label": "always compute"},
    "decide": {"color": "#0b6e99", "marker": "o", "label": "decide"},
}


def draw(result: dict[str, Any], target: Path) -> None:
    """Writes a PNG with a panel for every context."""
    contexts = list(dict.fromkeys(point["context"] for point in result["points"]))
    figure, panels = pyplot.subplots(1, len(contexts), figsize=(3.6 * len(contexts), 3.2), squeeze=False)
    for panel, context in zip(panels[0], contexts, strict=True):
        points = [point for point in result["points"] if point["context"] == context]
        places = range(len(points))
        for name, style in LINES.items():
            panel.plot(places, [1e3 * point["seconds"][name] for point in points], **style)
        panel.set_yscale("log")
        panel.set_xticks(list(places), [point["bandwidth"].removesuffix(" GB/s") for point in points])
        panel.set_xlabel("bandwidth of loads, GB/s")
        panel.set_title(f"{context} tokens", fontsize=9, loc="left")
    panels[0][0].set_ylabel("ms to the first token")
    panels[0][0].legend(fontsize=8)
    machine = result["machine"]
    figure.suptitle(
        f"{result['model']}, {machine['cpu']}, {machine['threads']} threads, {machine['date'][:10]}", fontsize=9
    )
    figure.tight_layout()
    figure.savefig(target, dpi=150)


if __name__ == "__main__":
    draw(json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2]))
