"""Where the tensors of a checkpoint go: the words in which a family describes its mapping. Knows no file."""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

from engine.parallel import slices


class Run(NamedTuple):
    """Consecutive rows of a source tensor and where they go. Several matrices in one tensor are one below the other."""

    source: int
    target: int
    rows: int


@dataclass(frozen=True, slots=True)
class Piece:
    """One checkpoint tensor and the rows it fills in one parameter."""

    target: str
    source: str
    shape: tuple[int, ...]
    """The shape that the checkpoint's tensor must have."""
    runs: tuple[Run, ...]
    transposed: bool = False
    """The checkpoint stores [in, out]: its rows are the parameter's columns."""

    @staticmethod
    def whole(target: str, source: str, shape: tuple[int, ...], *, at: int = 0, transposed: bool = False) -> "Piece":
        """All rows in order, from row `at` of the parameter on."""
        return Piece(target, source, shape, (Run(0, at, shape[0]),), transposed)


def keep(runs: Sequence[Run], kept: Sequence[slices.Run]) -> tuple[Run, ...]:
    """What the runs bring to a parameter of which only the `kept` rows are held, one below the other.

    These are ascending and apart.
    """
    starts = [span.start for span in kept]
    places = [0, *accumulate(span.count for span in kept)]
    found = []
    for run in runs:
        end = run.target + run.rows
        for index in range(max(0, bisect_right(starts, run.target) - 1), len(kept)):
            span = kept[index]
            if span.start >= end:
                break
            low, high = max(run.target, span.start), min(end, span.end)
            if low < high:
                found.append(Run(run.source + low - run.target, places[index] + low - span.start, high - low))
    return tuple(found)
