"""Engines whose model is cut into ranks, as replicas make them. torch is imported by the ranks alone."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

from ray import serve

from cluster.config import ParallelConfig
from cluster.kv.client import Bandwidth, TierClient
from cluster.kv_host import host_finder
from cluster.shard import LoadedRank, RankLoader
from cluster.shard_engine import build_sharded_engine
from deployments.logs import configure_logging
from engine.ahead import begin_compiling
from engine.config import EngineConfig
from engine.engine import Engine
from engine.kv.tier import PageMemory, Tier
from engine.parallel.place import Place


def load_rank(config: EngineConfig, place: Place, rendezvous: str) -> LoadedRank:
    """The real rank; see `cluster.shard.RankLoader`."""
    begin_compiling(config, is_rank=True)
    from engine.parallel.rank import load_rank

    return load_rank(config, place, rendezvous)


def make_rank_tier(application: str, ranks: int, bandwidth: float | None, layout: bytes, memory: PageMemory) -> Tier:
    """What the pages of this process's rank overflow to: the KV host of its own node.

    The host keeps an equal part of its memory for each rank of a replica, as any of them may come to its node.
    """
    return TierClient(
        host_finder(application),
        layout,
        memory,
        name=f"rank {os.getpid()}",
        parts=ranks,
        bandwidth=Bandwidth(save=bandwidth),
    )


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
        make_tier = None
        if find_host is not None and config.kv.offload:
            bandwidth = config.kv.offload_bandwidth
            each = None if bandwidth is None else bandwidth / self.parallel.ranks
            make_tier = partial(make_rank_tier, context.app_name, self.parallel.ranks, each)
        return build_sharded_engine(
            config,
            self.parallel,
            name=f"{context.app_name}:{replica}",
            each=self.each,
            load=self.load,
            prepare=partial(configure_logging, f"rank of {replica}"),
            make_tier=make_tier,
        )
