"""How fast accelerators compute, read and talk: what predictions divide by. Pure; owns the kinds known by name.

Rates are what kernels attain, not what a data sheet promises: its peaks are multiplied by the shares below.
"""

from dataclasses import dataclass, replace
from typing import Literal

_COMPUTE_SHARE = 0.6
"""Of a GPU's peak. Pope et al. (2022, table 2) reach 43 to 76 % in prefill, FasterTransformer's guide 27 to 46 %."""
_MEMORY_SHARE = 0.8
"""Of a GPU's peak, in a step of decodes; what is left out (launches, small kernels) is in it too."""
_LINK_SHARE = 0.8


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


def _gpu(
    name: str, *, flops: float, int8: float, memory: float, nvlink: float, network: float, source: str
) -> Accelerator:
    """From the peaks of a data sheet; links one way. The latencies are those of NCCL's small messages, rounded up."""
    rates = Rates(
        flops * _COMPUTE_SHARE,
        int8 * _COMPUTE_SHARE,
        memory * _MEMORY_SHARE,
        Link(nvlink * _LINK_SHARE, 6e-6),
        Link(network * _LINK_SHARE, 15e-6),
    )
    shares = f"{_COMPUTE_SHARE:.0%} of its arithmetic, {_MEMORY_SHARE:.0%} of its memory's and links' bandwidth"
    return Accelerator(name, "cuda", rates, f"{source}; {shares}")


A100 = _gpu(
    "a100",
    flops=312e12,
    int8=624e12,
    memory=2.039e12,
    nvlink=300e9,
    network=25e9,
    source="NVIDIA A100 80 GB SXM data sheet; one 200 Gb/s link an accelerator, as in a DGX A100",
)
H100 = _gpu(
    "h100",
    flops=989.4e12,
    int8=1978.9e12,
    memory=3.35e12,
    nvlink=450e9,
    network=50e9,
    source="NVIDIA H100 SXM data sheet, without sparsity; one 400 Gb/s link an accelerator, as in a DGX H100",
)
CPU = Accelerator(
    "cpu",
    "cpu",
    Rates(839e9, 1.64e12, 40e9, Link(1.8e9, 100e-6), Link(1.2e9, 150e-6)),
    "measured on 2 cores of an AMD EPYC with AVX-512: products of 128 rows, plain reads, TCP on one machine; 10 Gb/s "
    "between nodes is assumed. Use --measure for this machine's",
)
ACCELERATORS = {kind.name: kind for kind in (A100, H100, CPU)}
