"""How a model is cut into ranks, and what these then agree on. Pure: numbers in, places and pages out."""

from itertools import accumulate, pairwise

from cluster.config import ParallelConfig
from cluster.planner.form import Form
from cluster.planner.shares import shares
from cluster.planner.stages import Layer, Room, split
from engine.config import EngineConfig
from engine.errors import ModelError
from engine.kv.sizing import KVPlan, plan_kv
from engine.models.spec import ModelSpec
from engine.parallel.place import Place, RankFacts
from engine.parallel.slices import TensorRank, obstacle

DRAWN_SHARE = 0.5
"""Of the tokens that go through the layers, those that go through the head: of a prompt it is the last one alone, and
as many tokens are read as are written."""


def plan_group(facts: list[RankFacts], config: EngineConfig) -> KVPlan:
    """The pages of every rank: what the one with least room has. Raises ValueError where a sequence does not fit."""
    least = min(facts, key=lambda each: each.num_pages)
    return plan_kv(
        budget_bytes=least.num_pages * least.page_bytes,
        bytes_per_token=least.page_bytes // least.page_tokens,
        page_tokens=least.page_tokens,
        max_sequences=config.scheduler.max_sequences,
        model_max_len=least.max_position,
        max_model_len=config.max_model_len,
    )


def check_degrees(spec: ModelSpec, parallel: ParallelConfig) -> None:
    """Raises ModelError where the model cannot be cut so."""
    reason = obstacle(spec, parallel.tensor, parallel.expert)
    if reason is None and parallel.pipeline > spec.layers:
        reason = f"{spec.layers} layers are too few for {parallel.pipeline} stages"
    if reason is not None:
        asked = f"tensor {parallel.tensor}, pipeline {parallel.pipeline}, expert {parallel.expert}"
        raise ModelError(f"the model cannot be cut as asked ({asked}): {reason}")


def places_of(parallel: ParallelConfig, spec: ModelSpec) -> tuple[Place, ...]:
    """By rank. Layers are dealt out so that all stages take equally long; where that does not go, the first ones have
    one more."""
    stages = parallel.pipeline
    rooms = [Room(spec.layers, 0.0)] * (stages - 1) + [Room(spec.layers, DRAWN_SHARE * head_in_layers(spec))]
    counts = split(spec.layers, rooms, Layer(weight_bytes=1, page_bytes=0, seconds=1.0), range(1)).layers
    return tuple(
        Place(stage, stages, range(begin, end), TensorRank(rank, parallel.tensor, parallel.expert))
        for stage, (begin, end) in enumerate(pairwise(accumulate(counts, initial=0)))
        for rank in range(parallel.tensor)
    )


def head_in_layers(spec: ModelSpec) -> float:
    """How many layers take as long as the head does, for a token that goes through both."""
    (share,) = shares(spec, Form("bfloat16"), 1, 1)
    experts = 0.0 if spec.experts is None else share.layer.expert_macs * spec.experts.per_token / spec.experts.count
    return share.head.macs / (share.layer.macs + experts)
