"""What `manta plan` looks at on this machine: its accelerators, and how fast they are where it is told to measure.

The only part of the command that has effects; torch is imported where it is needed, and not for help or for a plan of
other machines.
"""

import platform
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from cluster.planner.kinds import named
from cluster.planner.nodes import Node
from cluster.planner.rates import Accelerator
from deployments.cli.errors import CommandError, ExitCode
from engine.machine import available_bytes

if TYPE_CHECKING:
    import torch

_NVIDIA = Path("/proc/driver/nvidia/gpus")
_READ_BYTES = 512 * 2**20
"""Far more than any cache holds."""
_PRODUCT = (512, 4096, 4096)
_PASSES = 7


def this_machine() -> tuple[Node, str | None]:
    """This machine as a node, and the name of its kind of accelerator; None where that is none of those known.

    A machine without a GPU is one accelerator, with the memory that is free now.
    """
    name = platform.node() or "here"
    if _NVIDIA.is_dir():
        import torch

        if torch.cuda.is_available():
            memory = min(
                torch.cuda.get_device_properties(index).total_memory for index in range(torch.cuda.device_count())
            )
            return Node(name, torch.cuda.device_count(), memory), named(torch.cuda.get_device_name(), memory)
    return Node(name, 1, available_bytes()), "cpu"


def measured(kind: Accelerator) -> Accelerator:
    """The kind with this machine's rates of products in bfloat16 and of reading memory, which takes seconds.

    Its rate in 8 bits is scaled alike; links stay as they are, for one machine cannot measure them. Raises CommandError
    where the machine has no such accelerator.
    """
    import torch

    if kind.device == "cuda" and not torch.cuda.is_available():
        raise CommandError(
            f"--measure: this machine has no CUDA device, and rates of {kind.name} are asked for; "
            "leave --measure out, or plan for --accelerator cpu",
            ExitCode.BAD_INPUT,
        )
    device = torch.device(kind.device)
    flops, bandwidth = _product_rate(device), _read_rate(device)
    rates = replace(
        kind.rates,
        flops=flops,
        int8_ops=kind.rates.int8_ops * flops / kind.rates.flops,
        memory_bandwidth=bandwidth,
    )
    return kind.with_rates(
        rates, f"measured on this machine: products in bfloat16, reads of memory; its links are those of {kind.name}"
    )


def _product_rate(device: "torch.device") -> float:
    """Operations a second of a product as prefill has them."""
    import torch

    rows, inner, columns = _PRODUCT
    x = torch.randn(rows, inner, device=device).to(torch.bfloat16)
    weight = torch.randn(columns, inner, device=device).to(torch.bfloat16)
    return 2 * rows * inner * columns / _fastest(lambda: torch.nn.functional.linear(x, weight), device)


def _read_rate(device: "torch.device") -> float:
    """Bytes a second of a sum over them."""
    import torch

    values = torch.ones(_READ_BYTES // 4, device=device)
    return _READ_BYTES / _fastest(lambda: values.sum(), device)


def _fastest(work: Callable[[], object], device: "torch.device") -> float:
    """Seconds of the fastest of some passes, after one that does not count."""
    import torch

    seconds = []
    for _ in range(_PASSES + 1):
        if device.type == "cuda":
            torch.cuda.synchronize()
        began = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    return min(seconds[1:])
