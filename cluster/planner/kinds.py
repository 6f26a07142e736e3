"""The kinds of accelerators known by name, by their data sheets, and which of them some nodes seem to have. Pure."""

import re
from collections import Counter
from collections.abc import Iterator, Sequence

from cluster.planner.nodes import Node
from cluster.planner.rates import Accelerator, Link, Rates

_COMPUTE_SHARE = 0.6
"""Of a GPU's peak. Pope et al. (2022, table 2) reach 43 to 76 % in prefill, FasterTransformer's guide 27 to 46 %."""
_MEMORY_SHARE = 0.8
"""Of a GPU's peak, in a step of decodes; what is left out (launches, small kernels) is in it too."""
_LINK_SHARE = 0.8
_SHARES = f"{_COMPUTE_SHARE:.0%} of its arithmetic, {_MEMORY_SHARE:.0%} of its memory's and links' bandwidth"
_NVLINK_LATENCY, _PCIE_LATENCY, _NETWORK_LATENCY = 6e-6, 10e-6, 15e-6
"""Of NCCL's small messages, rounded up."""
_PCIE_4 = 32e9
"""Of 16 lanes, one way."""
_LEAST_SEEN, _MOST_SEEN = 0.9, 1.05
"""Shares of a kind's memory that a device of it may have: error correction takes some, and GB are less than GiB."""


def _gpu(
    name: str, *, gib: int, flops: float, int8: float, memory: float, in_node: Link, network: float, source: str
) -> Accelerator:
    """From the peaks of a data sheet, without sparsity; links one way."""
    rates = Rates(
        flops * _COMPUTE_SHARE,
        int8 * _COMPUTE_SHARE,
        memory * _MEMORY_SHARE,
        Link(in_node.bandwidth * _LINK_SHARE, in_node.latency),
        Link(network * _LINK_SHARE, _NETWORK_LATENCY),
    )
    return Accelerator(name, "cuda", rates, f"{source}; {_SHARES}", gib * 2**30)


def _card(name: str, *, gib: int, flops: float, int8: float, memory: float, source: str) -> Accelerator:
    """A GPU whose links are those of its slot."""
    slot = "PCIe 4.0 x16 between accelerators and 100 Gb/s an accelerator between nodes are assumed"
    link = Link(_PCIE_4, _PCIE_LATENCY)
    source = f"{source}; {slot}"
    return _gpu(name, gib=gib, flops=flops, int8=int8, memory=memory, in_node=link, network=12.5e9, source=source)


H100 = _gpu(
    "h100",
    gib=80,
    flops=989.4e12,
    int8=1978.9e12,
    memory=3.35e12,
    in_node=Link(450e9, _NVLINK_LATENCY),
    network=50e9,
    source="NVIDIA H100 SXM data sheet, without sparsity; one 400 Gb/s link an accelerator, as in a DGX H100",
)
H200 = _gpu(
    "h200",
    gib=141,
    flops=989.4e12,
    int8=1978.9e12,
    memory=4.8e12,
    in_node=Link(450e9, _NVLINK_LATENCY),
    network=50e9,
    source="NVIDIA H200 SXM data sheet, without sparsity; one 400 Gb/s link an accelerator, as in a DGX H200",
)
A100 = _gpu(
    "a100",
    gib=80,
    flops=312e12,
    int8=624e12,
    memory=2.039e12,
    in_node=Link(300e9, _NVLINK_LATENCY),
    network=25e9,
    source="NVIDIA A100 80 GB SXM data sheet; one 200 Gb/s link an accelerator, as in a DGX A100",
)
A100_40G = _gpu(
    "a100-40g",
    gib=40,
    flops=312e12,
    int8=624e12,
    memory=1.555e12,
    in_node=Link(300e9, _NVLINK_LATENCY),
    network=25e9,
    source="NVIDIA A100 40 GB SXM data sheet; one 200 Gb/s link an accelerator, as in a DGX A100",
)
L40S = _card(
    "l40s",
    gib=48,
    flops=362.05e12,
    int8=733e12,
    memory=864e9,
    source="NVIDIA L40S data sheet, without sparsity",
)
L4 = _card("l4", gib=24, flops=121e12, int8=242e12, memory=300e9, source="NVIDIA L4 data sheet, without sparsity")
A10 = _card("a10", gib=24, flops=125e12, int8=250e12, memory=600e9, source="NVIDIA A10 data sheet, without sparsity")
RTX4090 = _card(
    "rtx4090",
    gib=24,
    flops=165.2e12,
    int8=660.6e12,
    memory=1.008e12,
    source="NVIDIA Ada architecture white paper, without sparsity; peers reach each other through the host, if at all",
)
CPU = Accelerator(
    "cpu",
    "cpu",
    Rates(839e9, 1.64e12, 40e9, Link(1.8e9, 100e-6), Link(1.2e9, 150e-6)),
    "measured on 2 cores of an AMD EPYC with AVX-512: products of 128 rows, plain reads, TCP on one machine; 10 Gb/s "
    "between nodes is assumed. Use --measure for this machine's",
)
ACCELERATORS = {kind.name: kind for kind in (H100, H200, A100, A100_40G, L40S, L4, A10, RTX4090, CPU)}
"""Of kinds with the same memory, the one that is taken where nobody says comes first."""


def matching(memory: int) -> tuple[str, ...]:
    """The kinds whose devices have about so many bytes."""
    return tuple(name for name, kind in ACCELERATORS.items() if _is_of(memory, kind))


def guessed(nodes: Sequence[Node]) -> Accelerator:
    """The kind that most of the nodes' accelerators seem to be, by their memory alone; its source says so."""
    counts = Counter[int]()
    for node in nodes:
        counts[node.memory] += node.accelerators
    (memory, _), *_ = counts.most_common()
    found = matching(memory)
    name = found[0] if found else min(_gpus(), key=lambda kind: abs(kind.memory - memory)).name
    others = f" ({_either(found[1:])} has as much)" if found[1:] else ""
    fit = "taken for its memory" if found else "taken as the nearest in memory"
    kind = ACCELERATORS[name]
    return kind.with_rates(kind.rates, f"{kind.source}; {fit}{others}, --accelerator names another")


def named(device: str, memory: int) -> str | None:
    """The kind of a device that its driver calls so, such as "NVIDIA L40S"; None where that is none of those known.

    One of a known name and other memory is of no known kind: its rates differ too.
    """
    words = re.split(r"[\s_-]+", device.lower().replace("rtx 4090", "rtx4090"))
    return next((name for name in matching(memory) if name.partition("-")[0] in words), None)


def mismatches(nodes: Sequence[Node], kind: Accelerator) -> Iterator[str]:
    """Warnings, for nodes whose accelerators cannot be of this kind."""
    if not kind.memory:
        return
    for memory in dict.fromkeys(node.memory for node in nodes if not _is_of(node.memory, kind)):
        names = [node.name for node in nodes if node.memory == memory]
        where = names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"
        others = matching(memory)
        instead = f"{_either(others)} has as much" if others else "no kind known by name has as much; give its rates"
        yield (
            f"accelerators of {where} have {memory / 2**30:.4g} GiB, and {kind.name} has {kind.memory / 2**30:.4g}: "
            f"predictions with its rates may be far off; {instead}"
        )


def _gpus() -> list[Accelerator]:
    return [kind for kind in ACCELERATORS.values() if kind.memory]


def _is_of(memory: int, kind: Accelerator) -> bool:
    return _LEAST_SEEN * kind.memory <= memory <= _MOST_SEEN * kind.memory


def _either(names: Sequence[str]) -> str:
    return " or ".join(names)
