"""An engine whose model is cut into ranks: starts the group, and agrees with it on pages and lengths.

The counterpart of `engine.build` for more than one rank; imports no torch, as it is the ranks that compute.
"""

import logging
import time
from collections.abc import Callable
from pathlib import Path

from cluster.config import ParallelConfig
from cluster.shard import RankLoader
from cluster.shard_group import GroupOrder, ShardGroup
from cluster.shards.cut import places_of, plan_group
from cluster.shards.cuttable import cuttable_spec
from cluster.shards.placement import Amounts
from engine.config import EngineConfig
from engine.engine import Engine
from engine.kv.keys import root_key
from engine.kv.pages import PagePool
from engine.kv.tier import TierFactory
from engine.limits import Limits
from engine.models.source import resolve_model
from engine.scheduler import Scheduler

logger = logging.getLogger(__name__)


def build_sharded_engine(
    config: EngineConfig,
    parallel: ParallelConfig,
    *,
    name: str,
    each: Amounts,
    load: RankLoader,
    prepare: Callable[[], None],
    make_tier: TierFactory | None,
) -> Engine:
    """The engine of a replica called `name`, whose ranks take `each` of Ray's resources and are loaded by `load`.

    `prepare` is done first in the process of each, and `make_tier` makes the place that its pages overflow to.

    Raises ModelError, ValueError, `cluster.shards.placement.NoRoom` or `cluster.shard_group.ShardLost`.
    """
    began = time.monotonic()
    path = resolve_model(config.model, config.revision)
    places = places_of(parallel, cuttable_spec(path, config, parallel))
    group = ShardGroup(GroupOrder(name, config, parallel, places, load, each, prepare, make_tier))
    engine = engine_over(group, config, path)
    logger.info(
        "%s from %s: %d ranks (%d tensor x %d pipeline), %d batches in flight, weights %.1f MiB in all, "
        "%d pages of %d tokens, up to %d tokens a sequence; %.1f s",
        config.model,
        path,
        parallel.ranks,
        parallel.tensor,
        parallel.pipeline,
        group.depth,
        sum(facts.weight_bytes for facts in group.facts) / 2**20,
        engine.stats().num_pages,
        group.facts[0].page_tokens,
        engine.max_model_len,
        time.monotonic() - began,
    )
    return engine


def engine_over(group: ShardGroup, config: EngineConfig, model_path: Path | None) -> Engine:
    """The engine of a group that has loaded; the group is closed if there can be none. Raises ValueError, ShardLost."""
    try:
        kv = plan_group(group.facts, config)
        group.start(kv.num_pages)
    except BaseException:
        group.close()
        raise
    facts = group.facts[0]
    return Engine(
        Scheduler(config.scheduler, PagePool(kv.num_pages), facts.page_tokens, tier=group.tier, depth=group.depth),
        group,
        Limits(kv.max_model_len, facts.vocab_size),
        eos_token_ids=facts.eos_token_ids,
        model_path=model_path,
        prefix_caching=config.kv.prefix_caching,
        namespace=root_key(*(each.namespace.hex() for each in group.facts)).hex(),
    )
