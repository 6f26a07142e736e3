"""How a model is cut into ranks, and what these then agree on. Pure: numbers in, places and pages out."""

from cluster.config import ParallelConfig
from engine.config import EngineConfig
from engine.errors import ModelError
from engine.kv.sizing import KVPlan, plan_kv
from engine.models.spec import ModelSpec
from engine.parallel.place import Place, RankFacts
from engine.parallel.slices import TensorRank, obstacle


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


def places_of(parallel: ParallelConfig, layers: int) -> tuple[Place, ...]:
    """By rank. Layers are dealt out evenly; where that does not go, later stages have one less: the last one has the
    head besides."""
    stages = parallel.pipeline
    ends = [-(-layers * stage // stages) for stage in range(stages + 1)]
    return tuple(
        Place(stage, stages, range(ends[stage], ends[stage + 1]), TensorRank(rank, parallel.tensor, parallel.expert))
        for stage in range(stages)
        for rank in range(parallel.tensor)
    )
