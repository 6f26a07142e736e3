"""How the layers of a model are dealt out to pipeline stages. Pure.

All layers are alike; the first stage has the embeddings besides, which take memory, and the last one the head, which
takes memory and time. First as many pages of keys and values as are of use, then the shortest slowest stage.
"""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Room:
    """What a stage has to offer to layers."""

    memory: int
    """Bytes for layers and their pages, on the rank that has least: what the ends of the model leave."""
    seconds: float
    """What the stage takes without any layer."""


@dataclass(frozen=True, slots=True)
class Layer:
    """What a layer asks of the rank that holds most of it."""

    weight_bytes: int
    page_bytes: int
    seconds: float

    def most(self, memory: int, pages: int) -> int:
        """Layers that fit beside so many pages of each."""
        return max(0, memory) // (self.weight_bytes + pages * self.page_bytes)


@dataclass(frozen=True, slots=True)
class Split:
    layers: tuple[int, ...]
    """Of each stage."""
    pages: int
    """That every stage has room for."""


class NoRoom(Exception):
    """The layers do not fit."""


def split(layers: int, rooms: Sequence[Room], layer: Layer, pages: range) -> Split:
    """The split with the most pages within `pages`; of those that have them, the one whose slowest stage is fastest.

    Pages count what a cache holds in all. Raises NoRoom where not even the fewest fit, or a stage has no layer.
    """
    fewest, most = pages.start, pages.stop - 1
    if not _fits(layers, rooms, layer, fewest):
        raise NoRoom
    while fewest < most:
        middle = (fewest + most + 1) // 2
        if _fits(layers, rooms, layer, middle):
            fewest = middle
        else:
            most = middle - 1
    return Split(_balance(layers, rooms, layer, fewest), fewest)


def _fits(layers: int, rooms: Sequence[Room], layer: Layer, pages: int) -> bool:
    most = [layer.most(room.memory, pages) for room in rooms]
    return len(rooms) <= layers <= sum(most) and min(most) >= 1


def _balance(layers: int, rooms: Sequence[Room], layer: Layer, pages: int) -> tuple[int, ...]:
    """Each layer goes where it ends first, which for equal layers keeps the slowest stage as fast as it can be."""
    counts = [1] * len(rooms)
    limits = [layer.most(room.memory, pages) for room in rooms]
    ends = [(room.seconds + 2 * layer.seconds, index) for index, room in enumerate(rooms) if limits[index] > 1]
    heapq.heapify(ends)
    for _ in range(layers - len(rooms)):
        seconds, index = heapq.heappop(ends)
        counts[index] += 1
        if counts[index] < limits[index]:
            heapq.heappush(ends, (seconds + layer.seconds, index))
    return tuple(counts)
