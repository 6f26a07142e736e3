"""Nodes as people write them, and the places that stages find on them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.planner.nodes import Node, describe, parse_nodes, slots

GIB = 2**30


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("8x80GiB", [Node("node1", 8, 80 * GIB)]),
        ("2*8x80GiB", [Node("node1", 8, 80 * GIB), Node("node2", 8, 80 * GIB)]),
        ("a=8x80GiB, b=4x40GB", [Node("a", 8, 80 * GIB), Node("b", 4, 40 * 10**9)]),
        ("a=2*1x16GiB,4x80GiB", [Node("a1", 1, 16 * GIB), Node("a2", 1, 16 * GIB), Node("node3", 4, 80 * GIB)]),
    ],
)
def test_nodes_are_read(text: str, expected: list[Node]) -> None:
    assert list(parse_nodes(text)) == expected


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "expected nodes such as"),
        ("8", "expected nodes such as"),
        ("8x", "expected nodes such as"),
        ("8xlots", "expected a size such as"),
        ("8xauto", "expected at least one"),
        ("0x80GiB", "expected at least one"),
        ("0*8x80GiB", "expected at least one"),
        ("8x0", "expected at least one"),
        ("a=1x1GiB,a=1x1GiB", "two nodes are called 'a'"),
        ("999*9x1GiB", "more than 1024 accelerators"),
        ("a b=1x1GiB", "expected nodes such as"),
    ],
)
def test_what_is_no_node_is_refused(text: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        parse_nodes(text)


def test_alike_nodes_are_described_together() -> None:
    nodes = parse_nodes("3*8x80GiB,big=4x141GiB")
    assert describe(nodes) == "node1 to node3 (3 nodes): 8 x 80 GiB, big: 4 x 141 GiB"


NODES = st.lists(st.builds(Node, st.uuids().map(str), st.integers(1, 8), st.integers(1, 100)), min_size=1, max_size=6)


@given(NODES, st.integers(1, 12))
def test_stages_stay_inside_nodes_unless_none_is_large_enough(nodes: list[Node], size: int) -> None:
    found = slots(nodes, size)
    largest = max(node.accelerators for node in nodes)
    assert [slot.memory for slot in found] == sorted((slot.memory for slot in found), reverse=True)
    used: dict[str, int] = {}
    for slot in found:
        assert len(slot.nodes) == size
        assert slot.crosses == (len(set(slot.nodes)) > 1)
        assert slot.memory == min(node.memory for node in nodes if node.name in slot.nodes)
        for name in slot.nodes:
            used[name] = used.get(name, 0) + 1
    assert all(used.get(node.name, 0) <= node.accelerators for node in nodes)
    if size <= largest:
        assert not any(slot.crosses for slot in found)
        assert len(found) == sum(node.accelerators // size for node in nodes)
    else:
        assert len(found) == sum(node.accelerators for node in nodes) // size
