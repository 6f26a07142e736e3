"""Where the time of a step goes: matrix products, attention, other kernels, Python; and the roofline of each operator
(Williams et al., 2009).

    python -m benchmarks.profile --model s135m --batch 32

Every sequence decodes; with `--prefill N` every step is a prompt of N tokens instead. The floor of an operator is the
larger of its bytes over the read bandwidth and its operations over the arithmetic peak, both measured here and now.
"""

import argparse
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

import engine  # noqa: F401  (before torch: it bounds how long threads spin)
from benchmarks import machine, models
from benchmarks.bandwidth import read_bandwidth
from engine.build import Assembly, assemble
from engine.config import EngineConfig, KVConfig, SchedulerConfig
from engine.forward import ProgramForward
from engine.kernels.cpu.library import Axis
from engine.kernels.cpu.program import Note, Program
from engine.kv.cache import kv_bytes_per_token
from engine.machine import available_cores
from engine.sampling_params import SamplingParams
from engine.sequence import Request

_REPEATS = 7
_SPREAD = 256
"""Tokens that the first sequences may be ahead of the last ones when all of them decode."""
_PEAK_SHAPE = (1024, 4096, 4096)
"""Rows, inputs and outputs of the product that stands for the arithmetic peak."""


@dataclass(frozen=True, slots=True)
class Load:
    """What one step runs."""

    tokens: int
    sampled: int
    """Rows that go through the head."""
    context: int
    """Keys of each sequence, on average."""
    pairs: float
    """Query-key pairs that attention computes, over all sequences."""
    sampled_pairs: float
    """Those of the rows that go through the head: what the last layer computes."""


@dataclass(slots=True)
class Line:
    """One operator of one shape, summed over its calls in a step."""

    kind: str
    name: str
    calls: int = 0
    seconds: float = 0.0
    num_bytes: float = 0.0
    operations: float = 0.0


def measured_peak(dtype: torch.dtype) -> float:
    """Operations per second of a large product of torch's own."""
    rows, inputs, outputs = _PEAK_SHAPE
    x, weight = torch.randn(rows, inputs).to(dtype), torch.randn(outputs, inputs).to(dtype)
    times = []
    for _ in range(_REPEATS):
        begin = time.perf_counter()
        torch.nn.functional.linear(x, weight)
        times.append(time.perf_counter() - begin)
    return 2 * rows * inputs * outputs / min(times)


def lines(program: Program, seconds: torch.Tensor, tokens: int, load: Load, kv_bytes: float) -> list[Line]:
    """The program's operations, those of one name and shape together. `seconds` [operations] are of one step."""
    found: dict[tuple[str, str], Line] = {}
    for note, spent in zip(program.notes, seconds.tolist(), strict=True):
        rows = tokens if note.axis == Axis.TOKENS else load.sampled
        kind, name, num_bytes, operations = _cost(note, rows / program.capacity, load, kv_bytes)
        line = found.setdefault((kind, name), Line(kind, name))
        line.calls += 1
        line.seconds += spent
        line.num_bytes += num_bytes
        line.operations += operations
    return list(found.values())


def _cost(note: Note, share: float, load: Load, kv_bytes: float) -> tuple[str, str, float, float]:
    """Kind, name, bytes that have to move and operations, of one call with this share of the program's capacity."""
    fields = note.fields
    moved = sum(_moved(note, share))
    if "in" in fields and "out" in fields:
        inputs, outputs = int(fields["in"]), int(fields["out"])  # type: ignore[arg-type]
        rows = len(fields["y"]) * share  # type: ignore[arg-type]
        return "matrix products", f"{note.name} {inputs} x {outputs}", moved, 2.0 * rows * inputs * outputs
    if note.name == "attend":
        heads, head_dim = int(fields["heads"]), int(fields["head_dim"])  # type: ignore[arg-type]
        pairs = load.pairs if note.axis == Axis.TOKENS else load.sampled_pairs
        return "attention", note.name, moved + kv_bytes, 4.0 * pairs * heads * head_dim
    return "attention" if note.name == "write_kv" else "other kernels", note.name, moved, 0.0


def _moved(note: Note, share: float) -> Iterator[float]:
    """Bytes of the call's tensors: rows of values, and the whole of parameters but for tables of rows and scratch.

    Of the weights of experts those count that rows reach which fall to them evenly.
    """
    experts = note.fields.get("weights")
    looks_up = note.name.startswith("embed")
    for name, field in note.fields.items():
        if not isinstance(field, torch.Tensor) or name in ("k", "v", "k_scales", "v_scales", "table", "scratch"):
            continue
        if looks_up and not field.is_meta:
            continue
        if field.is_meta:
            yield field.nbytes * share
        elif name == "weight" and isinstance(experts, int) and experts > 1:
            rows = len(note.fields["y"]) * share  # type: ignore[arg-type]
            yield field.nbytes * (1 - (1 - 1 / experts) ** rows)
        else:
            yield field.nbytes


class Profile:
    """Runs steps of one kind on an engine and sums up where their time goes."""

    def __init__(self, assembly: Assembly, load: Load) -> None:
        if not isinstance(assembly.forward, ProgramForward):
            raise SystemExit("the C kernels are not in use here: there are no operators to time")
        self._assembly = assembly
        self._load = load
        head = assembly.forward.head
        assert head is not None, "all of a model has one"
        self._programs = (assembly.forward.program, head)

    def run(self, steps: int) -> tuple[float, list[Line]]:
        """Seconds of a step on the wall, and its operators. The engine holds enough work for `steps` steps."""
        sums = [program.time_operations() for program in self._programs]
        begin = time.perf_counter()
        for _ in range(steps):
            self._assembly.engine.step()
        wall = (time.perf_counter() - begin) / steps
        layer_kv = kv_bytes_per_token(self._assembly.spec, self._assembly.kv_dtype) / self._assembly.spec.layers
        num_sequences = self._load.sampled
        found = []
        for program, total, tokens in zip(self._programs, sums, (self._load.tokens, self._load.sampled), strict=True):
            kv_bytes = layer_kv * self._load.context * num_sequences
            found += lines(program, total / steps, tokens, self._load, kv_bytes)
        return wall, found


def table(wall: float, found: list[Line], bandwidth: float, peak: float) -> str:
    """The lines with their roofline, largest first, and the sums by kind."""
    rows = [f"{'operator':36}{'calls':>6}{'ms':>9}{'share':>8}{'GB/s':>8}{'GFLOP/s':>9}{'of floor':>13}"]
    for line in sorted(found, key=lambda line: -line.seconds):
        floor = max(line.num_bytes / bandwidth, line.operations / peak)
        rows.append(
            f"{line.name:36}{line.calls:6}{1e3 * line.seconds:9.3f}{line.seconds / wall:8.1%}"
            f"{line.num_bytes / line.seconds / 1e9:8.1f}{line.operations / line.seconds / 1e9:9.0f}"
            f"{floor / line.seconds:13.0%}"
        )
    rows.append("")
    rows += [
        f"{kind:36}{1e3 * seconds:15.3f} ms{seconds / wall:7.1%}" for kind, seconds in by_kind(wall, found).items()
    ]
    return "\n".join(rows)


def by_kind(wall: float, found: list[Line]) -> dict[str, float]:
    """Seconds of a step by kind; what no operator accounts for is Python's, with the small torch operators it calls."""
    sums = {"matrix products": 0.0, "attention": 0.0, "other kernels": 0.0}
    for line in found:
        sums[line.kind] += line.seconds
    return {**sums, "Python": wall - sum(sums.values()), "step": wall}


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.profile",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", default="s135m", help=f"{', '.join(models.SHAPES)}, or a model directory")
    parser.add_argument("--batch", type=int, default=32, help="sequences that decode")
    parser.add_argument("--context", type=int, default=256, help="tokens that each has at the start")
    parser.add_argument("--prefill", type=int, default=0, metavar="N", help="steps of one prompt of N tokens instead")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--quantization", default="auto")
    parser.add_argument("--activations", default="auto")
    parser.add_argument("--kv-dtype", default="auto")
    parser.add_argument("--threads", type=int, default=available_cores())
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args()

    path = models.find(arguments.model)
    batch = 1 if arguments.prefill else arguments.batch
    tokens = arguments.prefill or batch
    assembly = assemble(
        EngineConfig(
            model=str(path),
            device="cpu",
            threads=arguments.threads,
            quantization=arguments.quantization,
            activations=arguments.activations,
            kv=KVConfig(dtype=arguments.kv_dtype, prefix_caching=False),
            scheduler=SchedulerConfig(max_sequences=batch, max_batch_tokens=max(1024, tokens)),
        )
    )
    load = make_load(arguments.prefill, batch, arguments.context, arguments.steps)
    fill(assembly, arguments.prefill, batch, arguments.context, arguments.steps, models.vocab_size(path))
    bandwidth, peak = read_bandwidth(arguments.threads), measured_peak(torch.bfloat16)
    wall, found = Profile(assembly, load).run(arguments.steps)
    facts = machine.describe(arguments.threads)
    print(", ".join(f"{name} {value}" for name, value in facts.items()))
    print(f"read bandwidth {bandwidth / 1e9:.1f} GB/s, bf16 peak {peak / 1e9:.0f} GFLOP/s (torch)")
    print(f"{arguments.model}: {load.tokens} tokens a step, {load.context} keys a sequence, {arguments.steps} steps\n")
    print(table(wall, found, bandwidth, peak))
    if arguments.json is not None:
        result = {"machine": facts, "model": arguments.model, "tokens": load.tokens, "context": load.context}
        result |= {"bandwidth": bandwidth, "peak": peak, "seconds": by_kind(wall, found)}
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")


def make_load(prefill: int, batch: int, context: int, steps: int) -> Load:
    if prefill:
        return Load(prefill, 1, prefill, prefill * (prefill + 1) / 2, prefill)
    average = context + steps // 2
    return Load(batch, batch, average, float(batch * average), float(batch * average))


def fill(assembly: Assembly, prefill: int, batch: int, context: int, steps: int, vocabulary: int) -> None:
    """Gives the engine its work, and runs what is not measured: a step to warm up, or the prompts before decoding."""
    prompts = 1 + steps if prefill else batch
    length = prefill or context
    for index in range(prompts):
        prompt = tuple(3 + (7 * index + 13 * position) % (vocabulary - 3) for position in range(length))
        params = SamplingParams(max_tokens=1 if prefill else steps + _SPREAD, temperature=0.0, ignore_eos=True)
        assembly.engine.add(Request(str(index), prompt, params))
    if prefill:
        assembly.engine.step()
        return
    # The first to be prefilled decode while the last are; from here on every step decodes all of them.
    while assembly.engine.stats().last_step_tokens != batch or assembly.engine.stats().num_waiting:
        assembly.engine.step()


if __name__ == "__main__":
    main()
