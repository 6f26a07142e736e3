"""How a model is cut into ranks, and what these then agree on. Pure: numbers in, places and pages out."""

from itertools import accumulate, pairwise

from cluster.config import ParallelConfig
from cluster.planner.degrees import nearest_possible, why_not
from cluster.planner.layout import Layout
from cluster.planner.usual import usual_layers
from engine.config import EngineConfig
from engine.errors import ModelError
from engine.kv.sizing import KVPlan, plan_kv
from engine.models.spec import ModelSpec
from engine.parallel.place import Place, RankFacts
from engine.parallel.slices import TensorRank


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


def check_degrees(spec: ModelSpec, parallel: ParallelConfig, unit: int = 1) -> None:
    """Raises ModelError where the model cannot be cut so, with the nearest layouts that work.

    `unit` input channels stay together when a layer is cut (`engine.models.directory.channel_unit`).
    """
    asked = Layout(parallel.tensor, parallel.pipeline, parallel.expert)
    if reason := why_not(spec, asked, unit):
        works = ", ".join(map(str, nearest_possible(spec, asked, unit)))
        degrees = f"tensor {parallel.tensor}, pipeline {parallel.pipeline}, expert {parallel.expert}"
        raise ModelError(f"the model cannot be cut as asked ({degrees}): {reason}; nearest layouts that work: {works}")
    if parallel.layers != "auto" and sum(parallel.layers) != spec.layers:
        sums = f"{' + '.join(map(str, parallel.layers))} are {sum(parallel.layers)}"
        raise ModelError(f"parallel.layers: {sums} layers, and the model has {spec.layers}")


def places_of(parallel: ParallelConfig, spec: ModelSpec) -> tuple[Place, ...]:
    """By rank. Layers are dealt out as is asked for, else by `usual_layers`. `check_degrees` must have passed."""
    stages = parallel.pipeline
    counts = usual_layers(spec, stages) if parallel.layers == "auto" else parallel.layers
    return tuple(
        Place(stage, stages, range(begin, end), TensorRank(rank, parallel.tensor, parallel.expert))
        for stage, (begin, end) in enumerate(pairwise(accumulate(counts, initial=0)))
        for rank in range(parallel.tensor)
    )
