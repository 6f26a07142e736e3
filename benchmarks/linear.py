"""Matrix products of a decoder on the CPU, beside those that torch brings: microseconds, GFLOP/s, GB/s and the ratio.

    python -m benchmarks.linear --models s135m --rows 1,8,32,256 --forms bf16,int4

Weights rotate through more memory than the caches hold, as the layers of a model do. Ours run as one step program,
torch's from a loop in Python, which for the smallest shapes is some microseconds of theirs. The two take turns; medians
count. What torch has for each form: the prepacked linear of oneDNN for bf16 and float32; oneDNN's `qlinear_pointwise`
for int8, with x quantized beforehand and one scale for all of it (ours quantizes every row within the time); and
`_weight_int4pack_mm_for_cpu` for int4 and for int4a8, whose activations have 8 bits, too (torch's have 16).
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from benchmarks import machine
from benchmarks.bandwidth import read_bandwidth
from benchmarks.models import SHAPES
from engine.kernels.cpu.compiler import compile_library
from engine.kernels.cpu.library import Library
from engine.kernels.cpu.linear import pack_linear
from engine.kernels.cpu.program import Recorder, StepArrays
from engine.machine import available_cores
from engine.quant.weights import Int4Weight, Int8Weight, Weight

GROUP = 64
"""Input channels that share a scale of int4; divides those of every shape here."""
ROTATION_BYTES = 192 * 2**20
FORMS = ("bf16", "float32", "int8", "int4", "int4a8")


@dataclass(frozen=True)
class Product:
    """One linear layer of a model."""

    model: str
    name: str
    out: int
    columns: int


@dataclass(frozen=True)
class Result:
    model: str
    name: str
    out: int
    columns: int
    form: str
    rows: int
    seconds: float
    torch_seconds: float
    weight_bytes: int

    @property
    def gflops(self) -> float:
        return 2e-9 * self.rows * self.out * self.columns / self.seconds

    @property
    def gigabytes_per_s(self) -> float:
        return 1e-9 * self.weight_bytes / self.seconds

    @property
    def ratio(self) -> float:
        return self.torch_seconds / self.seconds


def products(model: str) -> list[Product]:
    """The linear layers of a model of `benchmarks.models`, as the decoder merges them."""
    shape = SHAPES[model]
    hidden, attention = shape.hidden_size, shape.num_attention_heads * shape.head_dim
    qkv = attention + 2 * shape.num_key_value_heads * shape.head_dim
    sizes = {
        "qkv": (qkv, hidden),
        "out": (hidden, attention),
        "gate_up": (2 * shape.intermediate_size, hidden),
        "down": (hidden, shape.intermediate_size),
        "head": (shape.vocab_size, hidden),
    }
    return [Product(model, name, *size) for name, size in sizes.items()]


def random_weight(form: str, product: Product) -> Weight:
    out, columns = product.out, product.columns
    match form:
        case "bf16":
            return torch.empty(out, columns, dtype=torch.bfloat16).normal_(0, 0.02)
        case "float32":
            return torch.empty(out, columns).normal_(0, 0.02)
        case "int8":
            return Int8Weight(torch.randint(-127, 128, (out, columns), dtype=torch.int8), torch.full((out,), 1e-3))
        case "int4" | "int4a8":
            scale = torch.full((out, columns // GROUP), 1e-2)
            packed = torch.randint(0, 256, (out, columns // 2), dtype=torch.uint8)
            return Int4Weight(packed, scale, None, int8_activations=form == "int4a8")
    raise ValueError(f"{form}: not one of {', '.join(FORMS)}")


def random_x(form: str, product: Product, rows: int) -> Tensor:
    return torch.randn(rows, product.columns).to(torch.float32 if form == "float32" else torch.bfloat16)


def torch_product(weight: Weight) -> Callable[[Tensor], Callable[[], Tensor]]:
    """Packs a weight for torch's kernel; the result prepares the product with some x."""
    if isinstance(weight, Tensor):
        packed = torch.ops.mkldnn._reorder_linear_weight(weight, None)
        return lambda x: partial(torch.ops.mkldnn._linear_pointwise, x, packed, None, "none", [], "")
    if isinstance(weight, Int8Weight):
        packed, zeros = (
            torch.ops.onednn.qlinear_prepack(weight.values, None),
            torch.zeros(weight.shape[0], dtype=torch.int64),
        )
        scale = weight.scale

        def prepare(x: Tensor) -> Callable[[], Tensor]:
            step = x.abs().max().item() / 127
            values = (x.float() / step).round().add(128).to(torch.uint8)
            multiply = torch.ops.onednn.qlinear_pointwise
            return partial(
                multiply, values, step, 128, packed, scale, zeros, None, 1.0, 0, torch.bfloat16, "none", [], ""
            )

        return prepare
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(weight.values().to(torch.int32), 1)
    scale_and_zero = torch.stack((weight.scale, torch.zeros_like(weight.scale)), dim=2)
    scale_and_zero = scale_and_zero.transpose(0, 1).contiguous().to(torch.bfloat16)
    return lambda x: partial(torch.ops.aten._weight_int4pack_mm_for_cpu, x, packed, GROUP, scale_and_zero)


def measure(
    library: Library, threads: int, product: Product, form: str, row_counts: list[int], rounds: int, seconds: float
) -> Iterator[Result]:
    """Times every number of rows with the same weights; a turn of each side takes about `seconds`."""
    recorder = Recorder(library, threads, max(row_counts))
    weight = random_weight(form, product)
    first = pack_linear(recorder, weight)
    copies = max(1, ROTATION_BYTES // first.num_bytes)
    ours = [first, *(pack_linear(recorder, weight) for _ in range(copies - 1))]
    theirs = [torch_product(weight) for _ in range(copies)]
    for rows in row_counts:
        x = random_x(form, product, rows)
        result = [linear(x) for linear in ours][-1]
        run = partial(recorder.program(result).run, StepArrays(rows))
        calls = [prepare(x) for prepare in theirs]

        def run_theirs(calls: list[Callable[[], Tensor]] = calls) -> None:
            for call in calls:
                call()

        mine, other = take_turns([run, run_theirs], rounds, seconds)
        yield Result(
            **asdict(product),
            form=form,
            rows=rows,
            seconds=mine / copies,
            torch_seconds=other / copies,
            weight_bytes=first.num_bytes,
        )


def take_turns(sides: list[Callable[[], object]], rounds: int, seconds: float) -> list[float]:
    """Median seconds of each side's calls; in every round each side is called for about `seconds`, once at least."""
    taken: list[list[float]] = [[] for _ in sides]
    for side in sides:
        side()
    for _ in range(rounds):
        for side, times in zip(sides, taken, strict=True):
            end = time.perf_counter() + seconds
            while True:
                begin = time.perf_counter()
                side()
                times.append(time.perf_counter() - begin)
                if time.perf_counter() >= end:
                    break
    return [statistics.median(times) for times in taken]


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.linear", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = partial(str.split, sep=",")
    parser.add_argument("--models", type=names, default=["s135m", "m1b"], help="comma-separated (default: %(default)s)")
    parser.add_argument("--products", type=names, default=["qkv", "out", "gate_up", "down", "head"])
    parser.add_argument("--forms", type=names, default=["bf16", "int8", "int4"], help=f"of {', '.join(FORMS)}")
    parser.add_argument("--rows", type=names, default=["1", "2", "4", "8", "13", "16", "32", "64", "128", "512"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=0.1, help="of each turn (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=available_cores())
    parser.add_argument("--json", type=Path, metavar="FILE", help="keep the result with what it was measured on")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    library = compile_library()
    bandwidth = read_bandwidth(arguments.threads)
    print(f"{machine.cpu_name()}, {arguments.threads} threads, reads {bandwidth / 1e9:.0f} GB/s")
    print(f"{'':24} {'form':7} {'rows':>5} {'us':>10} {'GFLOP/s':>8} {'GB/s':>6} {'torch us':>10} {'ratio':>6}")
    results = []
    for product in (each for model in arguments.models for each in products(model) if each.name in arguments.products):
        for form in arguments.forms:
            rows = [int(count) for count in arguments.rows]
            for result in measure(library, arguments.threads, product, form, rows, arguments.rounds, arguments.seconds):
                results.append(result)
                print(
                    f"{result.model:6} {result.name:8} {result.form:>16} {result.rows:5} {result.seconds * 1e6:10.1f} "
                    f"{result.gflops:8.0f} {result.gigabytes_per_s:6.1f} {result.torch_seconds * 1e6:10.1f} "
                    f"{result.ratio:5.2f}x",
                    flush=True,
                )
    if arguments.json is not None:
        report = {
            **machine.describe(arguments.threads),
            "read_bytes_per_s": bandwidth,
            "results": [asdict(result) for result in results],
        }
        arguments.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
