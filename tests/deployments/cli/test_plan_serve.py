"""A plan's settings, given to real ranks: they hold what the plan says."""

from dataclasses import dataclass

import pytest

from cluster.config import ParallelConfig
from cluster.planner.form import Form
from cluster.planner.kinds import CPU
from cluster.planner.layout import Problem, Wishes
from cluster.planner.nodes import Node
from cluster.planner.plan import plan
from cluster.shards.cut import places_of, plan_group
from deployments.cli.plan_serve import serve_settings
from deployments.config import AppConfig
from engine.build import assemble
from engine.models.directory import load_spec
from engine.models.tiny import PATH
from engine.parallel.place import Place
from tests.engine.parallel.pool import Pool

MODEL = load_spec(PATH)
FULL = Form("float32")


@dataclass(frozen=True)
class Planned:
    """The cut of a configuration, as a replica makes it."""

    parallel: ParallelConfig

    def places(self, layers: int) -> list[Place]:
        assert layers == MODEL.layers
        return list(places_of(self.parallel, MODEL))


def problem(memory: int, form: Form = FULL, **wishes: int) -> Problem:
    nodes = (Node("here", 4, memory),)
    return Problem(MODEL, form, nodes, CPU, Wishes(replicas=1, **wishes))


@pytest.mark.parametrize("form", [FULL, Form("float32", "w4a16", group=32, head_group=32)])
@pytest.mark.parametrize(("tensor", "pipeline"), [(2, 2)])
def test_ranks_have_the_layers_the_weights_and_the_pages_that_are_planned(
    tensor: int, pipeline: int, form: Form
) -> None:
    asked = problem(24 * 2**20, form, tensor=tensor, pipeline=pipeline, sequences=64)
    found = plan(asked)
    config = AppConfig.model_validate(serve_settings("manta-tiny", None, asked, found))
    pool = Pool()
    try:
        ranks = pool.load(config.engine, Planned(config.parallel))  # type: ignore[arg-type]
    finally:
        pool.close()
    assert plan_group(list(ranks.facts), config.engine).num_pages == found.pages
    for facts, place, shard in zip(ranks.facts, ranks.places, found.shards, strict=True):
        assert place.layers == shard.layers
        assert facts.weight_bytes == shard.weight_bytes
        assert facts.num_pages * facts.page_bytes == shard.kv_bytes


def test_one_rank_has_the_pages_that_are_planned() -> None:
    asked = problem(64 * 2**20, tensor=1, pipeline=1, sequences=64)
    found = plan(asked)
    config = AppConfig.model_validate(serve_settings("manta-tiny", None, asked, found))
    assert assemble(config.engine).engine.stats().num_pages == found.pages
