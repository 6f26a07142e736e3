"""What a sitting brought, as a table and as JSON. Pure: computes nothing that was not measured but ratios."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from rich.table import Table

from benchmarks.peers.engines import ENGINES, OURS
from benchmarks.peers.measures import MEASURES, START
from benchmarks.peers.sitting import Entry, Group

ABSENT = "-"
CAPTION = (
    "Tokens per second, medians of the rounds; in parentheses how many times faster Manta is (above 1 it wins). Start: "
    "seconds, once. Floor: one stream could have that rate if a token took as long as reading the weights. Same: share "
    "of requests whose first token is ours."
)


def ratio(ours: Entry, theirs: Entry, measure: str) -> float | None:
    """How many times faster ours is; None where either has no number."""
    mine, other = ours.median(measure), theirs.median(measure)
    if mine is None or other is None or ours is theirs:
        return None
    return other / mine if measure == START else mine / other


def table(groups: Sequence[Group], measures: Sequence[str]) -> Table:
    """One row for every engine of every group, and one for the floor."""
    drawn = Table(title="Side by side", caption=CAPTION, caption_justify="left")
    for heading in ("model", "bits", "engine"):
        drawn.add_column(heading)
    for name in measures:
        drawn.add_column("start" if name == START else MEASURES[name].title, justify="right")
        if name == "prefill":
            drawn.add_column("first token", justify="right")
    for heading in ("same", "weights"):
        drawn.add_column(heading, justify="right")
    for group in groups:
        ours = next((entry for entry in group.entries if entry.engine == OURS), None)
        for entry in group.entries:
            drawn.add_row(*_row(group, entry, ours, measures))
        drawn.add_row(*_floor(group, measures), end_section=True)
    return drawn


def problems(groups: Sequence[Group]) -> list[str]:
    """Why numbers are missing, a paragraph each."""
    return [
        f"{group.model} at {group.bits} bits, {entry.engine}: {entry.problem}"
        for group in groups
        for entry in group.entries
        if entry.problem is not None
    ]


def as_json(groups: Sequence[Group], measures: Sequence[str], facts: dict[str, Any]) -> dict[str, Any]:
    """Every round of every measure, with medians and ratios, for a file."""
    return {"machine": facts, "measures": list(measures), "groups": [_group(group, measures) for group in groups]}


def _row(group: Group, entry: Entry, ours: Entry | None, measures: Sequence[str]) -> list[str]:
    cells = [group.model, str(group.bits), f"{ENGINES[entry.engine].title} {entry.format}"]
    for name in measures:
        cells.append(_cell(entry, ours, name))
        if name == "prefill":
            seconds = entry.first_token_seconds
            cells.append(f"{sorted(seconds)[len(seconds) // 2]:.2f} s" if seconds else ABSENT)
    cells.append(ABSENT if entry.agreement is None else f"{entry.agreement:.0%}")
    cells.append(ABSENT if entry.weight_bytes is None else f"{entry.weight_bytes / 2**20:.0f} MiB")
    return cells


def _cell(entry: Entry, ours: Entry | None, measure: str) -> str:
    value = entry.median(measure)
    if value is None:
        return ABSENT
    times = ratio(ours, entry, measure) if ours is not None else None
    return f"{value:.1f}" if times is None else f"{value:.1f} ({times:.2f}x)"


def _floor(group: Group, measures: Sequence[str]) -> list[str]:
    cells = [group.model, str(group.bits), f"floor at {group.bandwidth / 1e9:.1f} GB/s"]
    for name in measures:
        cells.append(f"{group.floor_rate:.1f}" if name == "stream" else "")
        if name == "prefill":
            cells.append("")
    return [*cells, "", f"{group.floor_bytes / 2**20:.0f} MiB"]


def _group(group: Group, measures: Sequence[str]) -> dict[str, Any]:
    ours = next((entry for entry in group.entries if entry.engine == OURS), None)
    written = asdict(group) | {"floor_bytes": group.floor_bytes, "floor_tokens_per_second": group.floor_rate}
    for entry, out in zip(group.entries, written["entries"], strict=True):
        out["title"] = ENGINES[entry.engine].title
        out["median"] = {name: entry.median(name) for name in measures}
        out["manta_times_faster"] = {name: ours and ratio(ours, entry, name) for name in measures}
    return written
