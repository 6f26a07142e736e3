"""Engines whose model is cut into ranks, as replicas make them. torch is imported by the ranks alone."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

from ray import serve

from cluster.config import ParallelConfig
from cluster.shard import LoadedRank, RankLoader
from cluster.shard_engine import build_sharded_engine
from deployments.logs import configure_logging
from engine.config import EngineConfig
from engine.engine import Engine
from engine.parallel.place import Place

logger = logging.getLogger(__name__)


def load_rank(config: EngineConfig, place: Place, rendezvous: str) -> LoadedRank:
    """The real rank; see `cluster.shard.RankLoader`."""
    from engine.parallel.rank import load_rank

    return load_rank(config, place, rendezvous)


@dataclass(frozen=True)
class ShardedFactory:
    """A `deployments.replica.EngineFactory`. Called in a replica whose placement group has the bundles of its ranks."""

    parallel: ParallelConfig
    each: Mapping[str, float]
    """Resources of a rank."""
    load: RankLoader

    def __call__(self, config: EngineConfig, find_host: object) -> Engine:
        context = serve.get_replica_context()
        replica = context.replica_id.unique_id
        if find_host is not None and config.kv.offload:
            logger.info("Pages of a replica with several ranks do not overflow to KV hosts: what is lost is computed")
        return build_sharded_engine(
            config,
            self.parallel,
            name=f"{context.app_name}:{replica}",
            each=self.each,
            load=self.load,
            prepare=partial(configure_logging, f"rank of {replica}"),
        )
