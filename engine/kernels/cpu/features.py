"""Kernels that many models do without, which then are not compiled. Imports no torch."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Feature = Literal["int8", "int4", "experts", "ranks"]
"""Products with weights of 8 and of 4 bits, routing to experts, sums over the ranks that share a layer."""


@dataclass(frozen=True, slots=True)
class Source:
    """What a feature takes, besides what is always there."""

    files: frozenset[str]
    operations: frozenset[str]
    """Of the headers, which are read whether or not their files are compiled."""


SOURCES: Mapping[Feature, Source] = {
    "int8": Source(frozenset({"linear_int8.c"}), frozenset({"linear_int8"})),
    "int4": Source(frozenset({"linear_int4.c", "linear_int4_int8.c"}), frozenset({"linear_int4", "gather_columns"})),
    "experts": Source(frozenset({"experts.c"}), frozenset({"route", "gather_rows", "sum_experts"})),
    "ranks": Source(frozenset({"ranks.c"}), frozenset({"sum_ranks", "gather_ranks"})),
}
ALL = frozenset(SOURCES)
