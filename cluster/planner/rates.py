"""How fast accelerators compute, read and talk: what predictions divide by. Pure.

Rates are what kernels attain, not what a data sheet promises (`cluster.planner.kinds`).
"""

from dataclasses import dataclass, replace
from typing import Literal


@dataclass(frozen=True, slots=True)
class Link:
    """What one accelerator sends to others: one way, while it receives as much."""

    bandwidth: float
    """Bytes a second."""
    latency: float
    """Seconds of a message, or of one pass of a collective, however small it is."""


@dataclass(frozen=True, slots=True)
class Rates:
    """Of one accelerator."""

    flops: float
    """Operations a second in products of 16 bits; a multiplication and an addition are two."""
    int8_ops: float
    """The same of 8 bits."""
    memory_bandwidth: float
    """Bytes a second that its memory is read with."""
    in_node: Link
    between_nodes: Link


@dataclass(frozen=True, slots=True)
class Accelerator:
    """A kind of device that ranks run on."""

    name: str
    device: Literal["cuda", "cpu"]
    rates: Rates
    source: str
    """Where its rates come from."""
    memory: int = 0
    """Bytes that its data sheet gives it; 0 for a kind that has any."""

    @property
    def page_tokens(self) -> int:
        """Tokens of a KV page, unless the operator asks for more (`engine.devices`)."""
        return 256 if self.device == "cuda" else 16

    @property
    def spare_pages(self) -> int:
        """Pages that a cache has beyond those of its pool."""
        return 1 if self.device == "cuda" else 0

    def with_rates(self, rates: Rates, source: str) -> "Accelerator":
        return replace(self, rates=rates, source=source)
