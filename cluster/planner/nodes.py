"""The machines that a layout is planned for, how they are written, and the places for a stage on them. Pure."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from engine.config import parse_bytes

MAX_ACCELERATORS = 1024
"""Of one plan."""
_GROUP = re.compile(
    r"^(?:(?P<name>[A-Za-z0-9_.-]+)=)?(?:(?P<nodes>\d{1,4})\*)?(?P<accelerators>\d{1,4})x(?P<memory>[^x*=]+)$"
)


@dataclass(frozen=True, slots=True)
class Node:
    """A machine whose accelerators are alike."""

    name: str
    accelerators: int
    memory: int
    """Bytes of each accelerator."""


@dataclass(frozen=True, slots=True)
class Slot:
    """Accelerators for the tensor ranks of one stage."""

    nodes: tuple[str, ...]
    """The node of each rank."""
    memory: int
    """Bytes of the smallest of them."""

    @property
    def crosses(self) -> bool:
        """Whether its ranks are on several nodes."""
        return len(set(self.nodes)) > 1


def parse_nodes(text: str) -> tuple[Node, ...]:
    """Nodes written as "8x80GiB", "2*8x80GiB" or "a=8x80GiB,b=4x40GiB": accelerators and the memory of each.

    Nodes without a name are node1, node2 and so on; several of one name get numbers. Raises ValueError naming the part
    that is wrong.
    """
    nodes: list[Node] = []
    for part in text.split(","):
        nodes += _parse_group(part.strip(), first=len(nodes) + 1)
        if sum(node.accelerators for node in nodes) > MAX_ACCELERATORS:
            raise ValueError(f"{text[:80]!r}: more than {MAX_ACCELERATORS} accelerators")
    names = [node.name for node in nodes]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"{text[:80]!r}: two nodes are called {twice[0]!r}")
    return tuple(nodes)


def _parse_group(part: str, first: int) -> list[Node]:
    match = _GROUP.match(part)
    if match is None:
        raise ValueError(f'{part[:80]!r}: expected nodes such as "8x80GiB", "2*8x80GiB" or "a=8x80GiB,b=4x40GiB"')
    count, accelerators = int(match["nodes"] or 1), int(match["accelerators"])
    try:
        memory = parse_bytes(match["memory"])
    except ValueError as error:
        raise ValueError(f"{part[:80]!r}: {error}") from None
    if not isinstance(memory, int) or min(memory, count, accelerators) < 1:
        raise ValueError(f"{part[:80]!r}: expected at least one node, one accelerator and one byte")
    if match["name"] is None:
        names = [f"node{first + index}" for index in range(count)]
    else:
        names = [match["name"] if count == 1 else f"{match['name']}{index + 1}" for index in range(count)]
    return [Node(name, accelerators, memory) for name in names]


def describe(nodes: Sequence[Node]) -> str:
    """The nodes in words, those that are alike together."""
    groups: dict[tuple[int, int], list[str]] = {}
    for node in nodes:
        groups.setdefault((node.accelerators, node.memory), []).append(node.name)
    return ", ".join(
        f"{names[0] if len(names) == 1 else f'{names[0]} to {names[-1]} ({len(names)} nodes)'}: "
        f"{accelerators} x {memory / 2**30:.4g} GiB"
        for (accelerators, memory), names in groups.items()
    )


def slots(nodes: Sequence[Node], size: int) -> list[Slot]:
    """Places for stages of `size` ranks, those with most memory first, neighbours on one node.

    A stage stays inside one node, unless no node has so many accelerators: then the ranks of a stage are consecutive
    ones of all.
    """
    ordered = sorted(nodes, key=lambda node: -node.memory)
    if all(node.accelerators < size for node in nodes):
        flat = [node for node in ordered for _ in range(node.accelerators)]
        groups = [flat[start : start + size] for start in range(0, len(flat) - size + 1, size)]
        return [Slot(tuple(node.name for node in group), min(node.memory for node in group)) for group in groups]
    return [Slot((node.name,) * size, node.memory) for node in ordered for _ in range(node.accelerators // size)]
