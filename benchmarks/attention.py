"""Attention over pages on the CPU, beside torch's over contiguous memory: decodes in GB/s, prompt chunks in GFLOP/s.

    python -m benchmarks.attention --models m1b --caches bf16,int8

The pages of a sequence are scattered and have another layer between them, as in the cache of a model. As many bytes in
a row are also read and summed, which is the most that a decode could reach. Torch is given keys and values in place of
gathered (and dequantized) ones, which a paged cache would have to do first. All take turns; of each, the best counts,
since another process's time on a shared machine is nobody's speed.
"""

import argparse
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import machine
from benchmarks.models import SHAPES
from engine.kernels.cpu.attention import CpuAttention
from engine.kernels.cpu.compiler import compile_library
from engine.kernels.cpu.library import Library
from engine.kernels.cpu.program import Recorder, StepArrays
from engine.kernels.operators import AttentionLayout
from engine.kv.cache import KVLayout, KVPages, PagedKVCache, kv_bytes_per_token
from engine.machine import available_cores
from engine.models.spec import ModelSpec, RopeSpec

CACHES = {"bf16": torch.bfloat16, "int8": torch.int8}
LAYERS = 2
"""Of the cache; one of them is attended."""


@dataclass(frozen=True)
class Work:
    """Sequences of one length that each have the same number of new tokens."""

    sequences: int
    queries: int
    context: int

    def __str__(self) -> str:
        return f"{self.sequences} x {self.queries} of {self.context}"


WORKS = (Work(1, 1, 8192), Work(8, 1, 8192), Work(64, 1, 512), Work(1, 2048, 2048), Work(1, 512, 4096))


@dataclass(frozen=True)
class Result:
    model: str
    cache: str
    work: str
    seconds: float
    read_seconds: float
    """Of reading the same bytes."""
    torch_seconds: float
    num_bytes: int
    flops: float


def spec_of(model: str) -> ModelSpec:
    """What a cache and a call need to know of a model of `benchmarks.models`."""
    shape = SHAPES[model]
    return ModelSpec(
        vocab_size=shape.vocab_size,
        hidden=shape.hidden_size,
        layers=LAYERS,
        heads=shape.num_attention_heads,
        kv_heads=shape.num_key_value_heads,
        head_dim=shape.head_dim,
        intermediate=shape.intermediate_size,
        max_position=2**20,
        norm="rms",
        norm_eps=1e-5,
        positions=RopeSpec(rotary_dim=shape.head_dim, theta=1e4),
        activation="silu",
        gated_mlp=True,
    )


def layout_of(work: Work, page_tokens: int) -> AttentionLayout:
    """Every sequence's pages anywhere in the cache."""
    columns = math.ceil(work.context / page_tokens)
    table = torch.randperm(work.sequences * columns, dtype=torch.int32).view(work.sequences, columns)
    positions = torch.arange(work.context - work.queries, work.context).repeat(work.sequences)
    rows = torch.arange(work.sequences).repeat_interleave(work.queries)
    return AttentionLayout(
        positions=positions,
        contexts=torch.full_like(positions, work.context),
        slots=table[rows, positions // page_tokens].to(torch.int64) * page_tokens + positions % page_tokens,
        cu_seq_q=torch.arange(work.sequences + 1, dtype=torch.int32) * work.queries,
        context_lens=torch.full((work.sequences,), work.context, dtype=torch.int32),
        page_table=table,
        page_tokens=page_tokens,
        query_lens=(work.queries,) * work.sequences,
        lens=(work.context,) * work.sequences,
    )


def filled_cache(spec: ModelSpec, num_pages: int, page_tokens: int, dtype: torch.dtype) -> PagedKVCache:
    cache = PagedKVCache(spec, num_pages, page_tokens, dtype, layout=KVLayout.WORDS)
    for index in range(LAYERS):
        for half in cache.layer(index):
            for page in range(num_pages):
                if half.scales is None:
                    half.values[page].normal_()
                else:
                    half.values[page].random_(-127, 128)
                    half.scales[page].fill_(0.02)
    return cache


def ours(
    library: Library, threads: int, layout: AttentionLayout, q: Tensor, pages: tuple[KVPages, KVPages], scale: float
) -> Callable[[], Tensor]:
    recorder = Recorder(library, threads, len(q))
    values = recorder.empty(*q.shape, dtype=q.dtype)
    attended = CpuAttention(recorder, layout).attend(values, *pages, scale=scale, window=None)
    program = recorder.program(attended, inputs=(values,))
    program.inputs[0].copy_(q)
    return partial(program.run, StepArrays(len(q), layout=layout))


def torchs(work: Work, q: Tensor, pages: tuple[KVPages, KVPages], scale: float) -> Callable[[], Tensor]:
    """SDPA in its fastest form: decodes with a group's heads on the query axis, chunks with keys repeated for them."""
    heads, head_dim = q.shape[1:]
    keys, values = (
        torch.randn(work.sequences, work.context, pages[0].values.shape[1], head_dim).to(q.dtype).transpose(1, 2)
        for _ in pages
    )
    kv_heads = keys.shape[1]
    group = heads // kv_heads
    if work.queries == 1:
        grouped = q.view(work.sequences, kv_heads, group, head_dim)
        return partial(F.scaled_dot_product_attention, grouped, keys, values, scale=scale)
    keys, values = (half.repeat_interleave(group, dim=1) for half in (keys, values))
    split = q.view(work.sequences, work.queries, heads, head_dim).transpose(1, 2)
    if work.queries == work.context:
        return partial(F.scaled_dot_product_attention, split, keys, values, is_causal=True, scale=scale)
    at = torch.arange(work.context - work.queries, work.context).unsqueeze(1)
    bias = torch.zeros(work.queries, work.context, dtype=q.dtype)
    bias.masked_fill_(torch.arange(work.context) > at, float("-inf"))
    return partial(F.scaled_dot_product_attention, split, keys, values, attn_mask=bias, scale=scale)


def best_of(runs: Sequence[Callable[[], object]], seconds: float) -> list[float]:
    """Shortest seconds of each, taking turns for `seconds`, four turns at least."""
    best = [math.inf] * len(runs)
    end, turns = time.perf_counter() + seconds, 0
    while turns < 4 or time.perf_counter() < end:
        turns += 1
        for index, run in enumerate(runs):
            begin = time.perf_counter()
            run()
            best[index] = min(best[index], time.perf_counter() - begin)
    return best


def measure(library: Library, model: str, cache: str, work: Work, arguments: argparse.Namespace) -> Result:
    spec, page_tokens = spec_of(model), arguments.page_tokens
    layout = layout_of(work, page_tokens)
    held = filled_cache(spec, layout.page_table.numel(), page_tokens, CACHES[cache])
    pages = held.layer(LAYERS - 1)
    q = torch.randn(work.sequences * work.queries, spec.heads, spec.head_dim).to(torch.bfloat16)
    num_bytes = work.sequences * work.context * kv_bytes_per_token(spec, CACHES[cache]) // LAYERS
    block = held.pages.flatten()[: num_bytes // 8 * 8].view(torch.int64)
    ours_, read, torch_ = best_of(
        (
            ours(library, arguments.threads, layout, q, pages, spec.scale),
            block.sum,
            torchs(work, q, pages, spec.scale),
        ),
        arguments.seconds,
    )
    seen = work.queries * (work.context - work.queries) + work.queries * (work.queries + 1) // 2
    flops = 4.0 * spec.head_dim * spec.heads * work.sequences * seen
    return Result(model, cache, str(work), ours_, read, torch_, num_bytes, flops)


def results(library: Library, arguments: argparse.Namespace) -> Iterator[Result]:
    for model in arguments.models:
        for cache in arguments.caches:
            for work in WORKS:
                yield measure(library, model, cache, work, arguments)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.attention", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = partial(str.split, sep=",")
    parser.add_argument("--models", type=names, default=["s135m", "m1b"], help="comma-separated (default: %(default)s)")
    parser.add_argument("--caches", type=names, default=list(CACHES), help="comma-separated (default: %(default)s)")
    parser.add_argument("--page-tokens", type=int, default=16)
    parser.add_argument("--seconds", type=float, default=1.0, help="for each line (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=available_cores())
    parser.add_argument("--json", type=Path, metavar="FILE", help="keep the result with what it was measured on")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    library = compile_library()
    print(f"{machine.cpu_name()}, {arguments.threads} threads")
    print(f"{'':32} {'us':>9} {'GB/s':>6} {'of read':>8} {'GFLOP/s':>8} {'torch us':>9} {'ratio':>6}")
    kept = []
    for result in results(library, arguments):
        kept.append(result)
        print(
            f"{result.model:6} {result.cache:5} {result.work:19} {result.seconds * 1e6:9.0f} "
            f"{result.num_bytes / result.seconds / 1e9:6.1f} {result.read_seconds / result.seconds:8.2f} "
            f"{result.flops / result.seconds / 1e9:8.0f} {result.torch_seconds * 1e6:9.0f} "
            f"{result.torch_seconds / result.seconds:5.1f}x",
            flush=True,
        )
    if arguments.json is not None:
        report = {**machine.describe(arguments.threads), "results": [asdict(result) for result in kept]}
        arguments.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
