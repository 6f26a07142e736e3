"""Which kind of accelerator some memory, or a driver's name, stands for."""

import pytest

from cluster.planner.kinds import A100, ACCELERATORS, CPU, H100, guessed, matching, mismatches, named
from cluster.planner.nodes import parse_nodes

GIB = 2**30


@pytest.mark.parametrize(
    ("nodes", "kind"),
    [
        ("8x80GiB", "h100"),
        ("8x79.1GiB", "h100"),
        ("8x141GB", "h200"),
        ("8x139.8GiB", "h200"),
        ("4x40GiB", "a100-40g"),
        ("2*4x48GiB", "l40s"),
        ("1x22.5GiB", "l4"),
        ("a=8x80GiB,b=4x40GiB", "h100"),
        ("a=2x80GiB,b=8x40GiB", "a100-40g"),
    ],
)
def test_memory_tells_the_kind(nodes: str, kind: str) -> None:
    found = guessed(parse_nodes(nodes))
    assert found.name == kind
    assert found.rates == ACCELERATORS[kind].rates
    assert "taken for its memory" in found.source


def test_memory_of_no_kind_takes_the_nearest_and_says_so() -> None:
    nodes = parse_nodes("1x12GiB")
    found = guessed(nodes)
    assert found.memory == 24 * GIB and "the nearest in memory" in found.source
    assert any("no kind known by name" in warning for warning in mismatches(nodes, found))


def test_another_kind_than_the_memory_is_warned_of() -> None:
    (warning,) = mismatches(parse_nodes("a=8x80GiB,b=4x40GiB,c=2x40GiB"), A100)
    assert warning.startswith("accelerators of b and 1 more have 40 GiB, and a100 has 80")
    assert "a100-40g has as much" in warning
    assert not list(mismatches(parse_nodes("8x79GiB"), H100))
    assert not list(mismatches(parse_nodes("1x7GiB"), CPU))


@pytest.mark.parametrize(
    ("device", "gib", "kind"),
    [
        ("NVIDIA H100 80GB HBM3", 79.1, "h100"),
        ("NVIDIA H200", 139.8, "h200"),
        ("NVIDIA A100-SXM4-80GB", 79.2, "a100"),
        ("NVIDIA A100-SXM4-40GB", 39.4, "a100-40g"),
        ("NVIDIA L4", 22.5, "l4"),
        ("NVIDIA L40S", 44.5, "l40s"),
        ("NVIDIA A10", 22.5, "a10"),
        ("NVIDIA GeForce RTX 4090", 23.6, "rtx4090"),
        ("NVIDIA A10G", 22.5, None),
        ("NVIDIA H100 NVL", 93.6, None),
        ("Tesla T4", 14.6, None),
    ],
)
def test_drivers_names_tell_the_kind(device: str, gib: float, kind: str | None) -> None:
    assert named(device, int(gib * GIB)) == kind


def test_kinds_differ_where_their_data_sheets_do() -> None:
    """Bytes a second of what a data sheet promises; a lone stream is bound by them."""
    promised = {"h100": 3.35e12, "h200": 4.8e12, "a100": 2.039e12, "a100-40g": 1.555e12, "l4": 300e9, "a10": 600e9}
    for name, bandwidth in promised.items():
        assert ACCELERATORS[name].rates.memory_bandwidth == pytest.approx(0.8 * bandwidth)
    assert matching(24 * GIB) == ("l4", "a10", "rtx4090")
