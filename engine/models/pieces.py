"""Where the tensors of a checkpoint go: the words in which a family describes its mapping. Knows no file."""

from dataclasses import dataclass
from typing import NamedTuple


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
