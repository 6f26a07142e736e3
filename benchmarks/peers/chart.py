"""Draws the JSON of a sitting: `python chart.py sitting.json sitting.png`, run by the environment `chart`.

A row of panels a measure, a column a model, a group of bars a number of bits, a colour an engine. Imports nothing of
the project.
"""

import json
import sys
from pathlib import Path
from typing import Any

import matplotlib  # type: ignore[import-not-found,unused-ignore]

matplotlib.use("Agg")
from matplotlib import pyplot  # type: ignore[import-not-found,unused-ignore]

TITLES = {
    "batch": "Batch: output tokens/s",
    "stream": "One stream: tokens/s",
    "prefill": "Prompt of 2,048 tokens: tokens/s",
    "long": "8 streams at 8,192 tokens of context: tokens/s",
    "start": "Start to first answer: seconds (lower is better)",
}
COLOURS = {
    "Manta": "#0b6e99",
    "vLLM": "#e0a030",
    "OpenVINO GenAI": "#7a5ea8",
    "llama.cpp": "#5d9e5d",
    "transformers": "#b0b0b0",
}
_PANEL_INCHES = (6.5, 2.7)


def draw(sitting: dict[str, Any], target: Path) -> None:
    """Writes a PNG with a panel for every measure and model that has a number."""
    groups = sitting["groups"]
    names = [name for name in sitting["measures"] if _has_values(groups, name)]
    models = list(dict.fromkeys(group["model"] for group in groups))
    width, height = _PANEL_INCHES
    figure, panels = pyplot.subplots(
        len(names), len(models), figsize=(width * len(models), height * len(names) + 1), squeeze=False
    )
    for row, name in zip(panels, names, strict=True):
        for panel, model in zip(row, models, strict=True):
            own = [group for group in groups if group["model"] == model]
            if _has_values(own, name):
                _panel(panel, own, name)
            else:
                panel.axis("off")
    machine = sitting["machine"]
    figure.suptitle(f"{machine['cpu']}, {machine['threads']} threads, {machine['date'][:10]}", fontsize=10)
    _legend(figure, groups)
    figure.tight_layout(rect=(0, 0.05, 1, 1))
    figure.savefig(target, dpi=150)


def _has_values(groups: list[dict[str, Any]], measure: str) -> bool:
    return any(entry["median"][measure] is not None for group in groups for entry in group["entries"])


def _panel(panel: Any, groups: list[dict[str, Any]], measure: str) -> None:
    """One measure of one model: the bars of each number of bits side by side."""
    labels, centres, left = [], [], 0.0
    for group in groups:
        entries = [entry for entry in group["entries"] if entry["median"][measure] is not None]
        if not entries:
            continue
        for offset, entry in enumerate(entries):
            value = entry["median"][measure]
            panel.bar(left + offset, value, color=COLOURS.get(entry["title"], "#444444"), width=0.9)
            text = f"{value:.0f}" if value >= 10 else f"{value:.1f}"
            panel.text(left + offset, value, text, ha="center", va="bottom", fontsize=8)
        if measure == "stream":
            floor = group["floor_tokens_per_second"]
            panel.hlines(floor, left - 0.5, left + len(entries) - 0.5, colors="black", linestyles="dashed")
        labels.append(f"{group['bits']} bits")
        centres.append(left + (len(entries) - 1) / 2)
        left += len(entries) + 1
    note = "; dashed: bound of memory bandwidth" if measure == "stream" else ""
    panel.set_title(f"{groups[0]['model']}  {TITLES[measure]}{note}", loc="left", fontsize=9)
    panel.set_xticks(centres, labels)
    panel.margins(y=0.15)
    panel.spines[["top", "right"]].set_visible(False)


def _legend(figure: Any, groups: list[dict[str, Any]]) -> None:
    present = {entry["title"] for group in groups for entry in group["entries"]}
    titles = [title for title in COLOURS if title in present]
    handles = [pyplot.Rectangle((0, 0), 1, 1, color=COLOURS[title]) for title in titles]
    figure.legend(handles, titles, frameon=False, fontsize=9, loc="lower center", ncols=len(titles))


if __name__ == "__main__":
    draw(json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2]))
