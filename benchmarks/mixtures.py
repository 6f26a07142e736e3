"""A mixture of experts over two ranks: whether it draws what one rank draws, and what routing costs without experts."""

import tempfile
from pathlib import Path

from benchmarks import contenders, routing, workloads
from benchmarks.rank_groups import RankGroup
from cluster.config import ParallelConfig

TOKENS, EXPERTS, PER_TOKEN, WIDTH = 4096, 64, 2, 1024
_VOCABULARY = 1000
_ITEMS = 8
_KV_BYTES = 64 * 2**20
_LENGTHS = workloads.Lengths(prompt=workloads.Range(16, 64), output=workloads.Range(32, 64))


def routing_ratios(threads: int, rounds: int) -> dict[str, float]:
    """What each way takes, as a multiple of what the table in C takes."""
    import torch

    from engine.kernels.cpu.compiler import compile_library
    from engine.kernels.operators import Routing

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    rule = Routing(EXPERTS, PER_TOKEN, True, range(EXPERTS))
    work = routing.Work(torch.randn(TOKENS, EXPERTS), torch.randn(TOKENS, WIDTH), rule)
    found = routing.measure(compile_library(), threads, work, rounds, seconds=0.2)
    return {result.name: result.ratio for result in found}


def same_tokens() -> tuple[int, int]:
    """How many tokens of a small mixture two ranks with half of the experts each draw as one rank does, and how many
    there are. In float32, so that they do not depend on the order of sums."""
    with tempfile.TemporaryDirectory(prefix="manta-mixture-") as directory:
        path = Path(directory)
        _write(path)
        drawn = [_drawn(path, parallel) for parallel in (ParallelConfig(), ParallelConfig(tensor=2, expert=2))]
    pairs = [pair for ours, theirs in zip(*drawn, strict=True) for pair in zip(ours, theirs, strict=True)]
    return sum(one == other for one, other in pairs), len(pairs)


def _write(path: Path) -> None:
    """Random weights of a mixture with 64 experts."""
    import torch
    from transformers import MixtralConfig, MixtralForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=_VOCABULARY,
        hidden_size=256,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=EXPERTS,
        num_experts_per_tok=PER_TOKEN,
        max_position_embeddings=512,
        initializer_range=0.1,
    )
    MixtralForCausalLM(config).save_pretrained(path)


def _drawn(path: Path, parallel: ParallelConfig) -> list[list[int]]:
    """The greedy tokens of each request."""
    group = RankGroup(f"mixture {parallel.ranks}", path, parallel, _KV_BYTES, dtype="float32")
    try:
        engine, _ = group.engine(1, _ITEMS)
        return contenders.generated(engine, workloads.make(_ITEMS, _LENGTHS, vocab_size=_VOCABULARY))
    finally:
        group.close()
