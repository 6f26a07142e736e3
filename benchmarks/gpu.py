"""What share of a GPU one replica uses: decodes of its memory's bandwidth, prompts of its arithmetic.

    python -m benchmarks.gpu m1b 8b --form bf16,w8a8

Bandwidth and peak are measured first, on the same device. A decode must read every weight and every key and value of
its context once; a prompt must multiply every token by every weight, and attend. Weights are random and made on the
device. Says so and exits with 2 where there is no CUDA device.
"""

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks import machine
from benchmarks.models import SHAPES, WEIGHT_STD, Shape
from engine.forward import Forward
from engine.kernels.cuda.backend import PAGE_TOKENS, SPARE_PAGES, CudaBackend
from engine.kernels.operators import AttentionLayout, Wanted
from engine.kv.cache import PagedKVCache, kv_bytes_per_token
from engine.models.decoder import Decoder
from engine.models.spec import ModelSpec, RopeSpec
from engine.parallel.part import Part
from engine.quant.plan import is_layer_linear
from engine.quant.quantize import quantize_int4, quantize_int8
from engine.quant.weights import Int4Weight, Int8Weight, Weight

ALL_SHAPES = SHAPES | {"8b": Shape(4096, 32, 32, 8, 14336, 128256)}
FORMS = ("bf16", "fp8", "w8a8", "w4a16")
FORM_BYTES = {"fp8": 1}
"""Bytes of a value in a linear layer whose form is made by the backend, not here."""
DECODE_GOAL, PROMPT_GOAL = 0.80, 0.60
GROUP = 64
PEAK_SIZE = 8192
STREAM_BYTES = 2**32
CONTEXT = 1024
DEVICE = "cuda"


@dataclass(frozen=True, slots=True)
class Device:
    """What the device can do, as measured."""

    bandwidth: float
    """Bytes a second."""
    peak: float
    """bf16 operations a second."""


@dataclass(frozen=True, slots=True)
class Result:
    model: str
    form: str
    work: str
    milliseconds: float
    """Of one step, from host arrays to tokens on the host."""
    device_milliseconds: float
    """Of one step in a row of steps that the host does not wait for."""
    share: float
    """Of the device's bandwidth, or of its peak, over the whole step."""
    goal: float


class Model:
    """A random model on the device, and one sequence in its cache."""

    def __init__(self, name: str, form: str, max_tokens: int) -> None:
        self.spec = spec_of(ALL_SHAPES[name])
        backend = CudaBackend(torch.bfloat16, max_sequences=1, fp8=form == "fp8")
        parameters = dict(random_parameters(self.spec, form))
        self.weight_bytes = sum(read_bytes(self.spec, name, weight, form) for name, weight in parameters.items())
        decoder = Decoder(Part.all_of(self.spec), parameters, backend.operators, torch.bfloat16)
        self.pages = -(-max_tokens // PAGE_TOKENS)
        cache = PagedKVCache(self.spec, self.pages + SPARE_PAGES, PAGE_TOKENS, torch.bfloat16, DEVICE)
        self.forward: Forward = backend.forward(decoder, cache)

    def step(self, queries: int, length: int) -> Tensor:
        """Runs the last `queries` of `length` tokens; returns the next token, on the device."""
        layout = layout_of(queries, length, self.pages)
        wanted = Wanted(torch.tensor([queries - 1]), layout_of(1, length, self.pages)) if queries > 1 else None
        hidden = self.forward.hidden(torch.arange(queries) % self.spec.vocab_size, layout, wanted)
        return self.forward.logits(hidden, torch.tensor([0])).argmax(dim=1)


def spec_of(shape: Shape) -> ModelSpec:
    return ModelSpec(
        vocab_size=shape.vocab_size,
        hidden=shape.hidden_size,
        layers=shape.num_hidden_layers,
        heads=shape.num_attention_heads,
        kv_heads=shape.num_key_value_heads,
        head_dim=shape.head_dim,
        intermediate=shape.intermediate_size,
        max_position=16384,
        norm="rms",
        norm_eps=1e-5,
        positions=RopeSpec(10000.0, shape.head_dim),
        activation="silu",
        gated_mlp=True,
        tied_embeddings=True,
    )


def random_parameters(spec: ModelSpec, form: str) -> Iterator[tuple[str, Weight]]:
    """Every parameter of the spec on the device, the layers' weights in the given form; norms are ones."""
    for name, shape in spec.parameter_shapes().items():
        if len(shape) == 1:
            yield name, torch.ones(shape, dtype=torch.bfloat16, device=DEVICE)
            continue
        weight = torch.empty(shape, dtype=torch.bfloat16, device=DEVICE).normal_(0.0, WEIGHT_STD)
        if form == "w8a8" and is_layer_linear(name):
            yield name, quantize_int8(weight)
        elif form == "w4a16" and is_layer_linear(name):
            yield name, quantize_int4(weight, GROUP)
        else:
            yield name, weight


def read_bytes(spec: ModelSpec, name: str, weight: Weight, form: str) -> int:
    """Bytes that a decode has to read of a parameter. Tied embeddings are read as the head."""
    match weight:
        case Int8Weight():
            return weight.values.nbytes + weight.scale.nbytes
        case Int4Weight():
            return weight.packed.nbytes + 2 * 2 * weight.scale.numel()
        case _:
            return weight.numel() * (FORM_BYTES.get(form, 2) if is_layer_linear(name) else 2)


def layout_of(queries: int, length: int, pages: int) -> AttentionLayout:
    """One sequence whose pages lie in order, laid out on the host."""
    positions = np.arange(length - queries, length)
    return AttentionLayout(
        positions=torch.from_numpy(positions),
        contexts=torch.full((queries,), length),
        slots=torch.from_numpy(positions),
        cu_seq_q=torch.tensor([0, queries], dtype=torch.int32),
        context_lens=torch.tensor([length], dtype=torch.int32),
        page_table=torch.arange(pages, dtype=torch.int32)[None, : -(-length // PAGE_TOKENS)],
        page_tokens=PAGE_TOKENS,
        query_lens=(queries,),
        lens=(length,),
    )


def measure_device() -> Device:
    """The better of a read and a copy of memory that no cache holds, and a square product of random numbers."""
    return Device(max(_read_bandwidth(), _copy_bandwidth()), _peak())


def _read_bandwidth() -> float:
    source = torch.ones(STREAM_BYTES // 4, dtype=torch.float32, device=DEVICE)
    return STREAM_BYTES / device_seconds(source.sum, 10)


def _copy_bandwidth() -> float:
    source, target = (torch.ones(STREAM_BYTES // 4, dtype=torch.float32, device=DEVICE) for _ in range(2))
    return 2 * STREAM_BYTES / device_seconds(lambda: target.copy_(source), 10)


def _peak() -> float:
    a, b = (torch.randn(PEAK_SIZE, PEAK_SIZE, dtype=torch.bfloat16, device=DEVICE) for _ in range(2))
    return 2 * PEAK_SIZE**3 / device_seconds(lambda: a @ b, 20)


def device_seconds(work: Callable[[], object], repetitions: int) -> float:
    """Of one repetition, between two events on the device."""
    work()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(repetitions):
        work()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1000 / repetitions


def step_seconds(work: Callable[[], Tensor], repetitions: int) -> float:
    """Median of one repetition that waits for its token."""
    taken = []
    for _ in range(repetitions):
        start = time.perf_counter()
        work().tolist()
        taken.append(time.perf_counter() - start)
    return statistics.median(taken)


def measure_decode(name: str, form: str, device: Device, repetitions: int) -> Result:
    model = Model(name, form, CONTEXT + 1)
    needed = model.weight_bytes + CONTEXT * kv_bytes_per_token(model.spec, torch.bfloat16)
    seconds, alone = _both(lambda: model.step(1, CONTEXT), repetitions)
    share = needed / seconds / device.bandwidth
    return Result(name, form, f"decode, {CONTEXT} tokens before", seconds * 1e3, alone * 1e3, share, DECODE_GOAL)


def measure_prompt(name: str, form: str, device: Device, tokens: int, repetitions: int) -> Result:
    model = Model(name, form, tokens)
    seconds, alone = _both(lambda: model.step(tokens, tokens), repetitions)
    share = prompt_operations(model.spec, tokens) / seconds / device.peak
    return Result(name, form, f"prompt of {tokens}", seconds * 1e3, alone * 1e3, share, PROMPT_GOAL)


def prompt_operations(spec: ModelSpec, tokens: int) -> float:
    """Multiplications and additions of a prompt's layers; each query meets half of the keys.

    In the last layer all tokens have keys and values made, and the one that is sampled runs the rest.
    """
    last = f"layers.{spec.layers - 1}."
    products = 0.0
    for name, shape in spec.parameter_shapes().items():
        if is_layer_linear(name):
            is_sampled_alone = name.startswith(last) and name != f"{last}qkv.weight"
            products += 2.0 * math.prod(shape) * (1 if is_sampled_alone else tokens)
    pairs = (spec.layers - 1) * tokens * tokens / 2 + tokens
    return products + 4 * spec.heads * spec.head_dim * pairs


def _both(work: Callable[[], Tensor], repetitions: int) -> tuple[float, float]:
    with torch.inference_mode():
        for _ in range(3):
            work().tolist()
        return step_seconds(work, repetitions), device_seconds(work, repetitions)


def show(device: Device, results: list[Result]) -> None:
    print(f"{torch.cuda.get_device_name()}: {device.bandwidth / 1e9:.0f} GB/s, {device.peak / 1e12:.0f} bf16 TFLOP/s")
    print(f"{'model':8}{'form':8}{'work':28}{'ms a step':>12}{'on device':>12}{'share':>8}{'goal':>8}")
    for each in results:
        print(
            f"{each.model:8}{each.form:8}{each.work:28}{each.milliseconds:12.3f}{each.device_milliseconds:12.3f}"
            f"{each.share:8.0%}{each.goal:8.0%}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", nargs="*", default=["m1b", "8b"], help=", ".join(ALL_SHAPES))
    parser.add_argument("--form", default="bf16", help=f"of the weights: some of {','.join(FORMS)}")
    parser.add_argument("--prompt", default="2048,8192", help="prompt lengths")
    parser.add_argument("--repetitions", type=int, default=50)
    parser.add_argument("--json", type=Path, help="keep the result here")
    options = parser.parse_args()
    forms, prompts = options.form.split(","), [int(length) for length in options.prompt.split(",")]
    for unknown in [*(set(options.models) - set(ALL_SHAPES)), *(set(forms) - set(FORMS))]:
        parser.error(f"{unknown}: models are {', '.join(ALL_SHAPES)}; forms are {', '.join(FORMS)}")
    if not torch.cuda.is_available():
        print("no CUDA device: nothing measured", file=sys.stderr)
        raise SystemExit(2)
    device = measure_device()
    results = []
    for name in options.models:
        for form in forms:
            results.append(measure_decode(name, form, device, options.repetitions))
            for tokens in prompts:
                results.append(measure_prompt(name, form, device, tokens, max(options.repetitions // 5, 3)))
    show(device, results)
    if options.json:
        kept = {"machine": machine.describe(torch.get_num_threads()), "gpu": torch.cuda.get_device_name()}
        measured = {"device": asdict(device), "results": [asdict(each) for each in results]}
        options.json.write_text(json.dumps(kept | measured, indent=1))


if __name__ == "__main__":
    main()
