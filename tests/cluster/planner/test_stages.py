"""Layers on stages, against every split there is."""

from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.planner.stages import Layer, NoRoom, Room, split

ROOMS = st.lists(st.builds(Room, st.integers(0, 60), st.integers(0, 5).map(float)), min_size=1, max_size=4)
LAYERS = st.builds(Layer, st.integers(1, 6), st.integers(1, 4), st.integers(1, 3).map(float))


def pages_of(counts: tuple[int, ...], rooms: list[Room], layer: Layer) -> int:
    """That every stage has room for."""
    return min(
        (room.memory - count * layer.weight_bytes) // (count * layer.page_bytes)
        for count, room in zip(counts, rooms, strict=True)
    )


@given(ROOMS, LAYERS, st.integers(1, 10), st.integers(1, 4), st.integers(0, 8))
def test_no_split_has_more_pages_and_none_with_as_many_is_faster(
    rooms: list[Room], layer: Layer, layers: int, fewest: int, more: int
) -> None:
    wanted = range(fewest, fewest + more + 1)
    every = [c for c in product(range(1, layers + 1), repeat=len(rooms)) if sum(c) == layers]
    fitting = {counts: pages_of(counts, rooms, layer) for counts in every}
    best = min(max(fitting.values(), default=0), wanted[-1])
    if best < fewest:
        with pytest.raises(NoRoom):
            split(layers, rooms, layer, wanted)
        return
    found = split(layers, rooms, layer, wanted)
    assert sum(found.layers) == layers
    assert found.pages == best
    assert fitting[found.layers] >= best

    def slowest(counts: tuple[int, ...]) -> float:
        return max(room.seconds + count * layer.seconds for room, count in zip(rooms, counts, strict=True))

    assert slowest(found.layers) == min(slowest(counts) for counts, pages in fitting.items() if pages >= best)


def test_the_stage_with_the_head_gets_fewer_layers() -> None:
    rooms = [Room(1000, 0.0), Room(1000, 0.0), Room(1000, 2.5)]
    assert split(12, rooms, Layer(1, 1, 1.0), range(1, 2)).layers == (5, 5, 2)


def test_the_stage_with_little_memory_gets_fewer_layers() -> None:
    assert split(10, [Room(100, 0.0), Room(30, 0.0)], Layer(9, 1, 1.0), range(1, 2)).layers == (7, 3)
