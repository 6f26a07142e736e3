"""The application builder: `import_path: deployments.app:build` in a Serve config file.

Turns a validated configuration into bound deployments, and resolves what depends on the cluster. Loads no model.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import ray
from ray import serve
from ray.serve import Application
from ray.serve.config import RequestRouterConfig

from cluster.nodes import living_nodes
from cluster.shard import RankLoader
from cluster.shards.placement import lay_bundles
from deployments.config import AppConfig
from deployments.gateway import Gateway
from deployments.kv_hosts import KVHosts
from deployments.metrics_hub import MetricsHub
from deployments.replica import EngineFactory, LLMReplica, load_engine
from deployments.router_adapter import TokenRequestRouter
from deployments.sharded import ShardedFactory, load_rank
from deployments.streams.store import StreamStore
from engine.config import EngineConfig

MAX_ONGOING_REQUESTS = 4096
"""Calls that a replica or gateway handles at once: far above what the admission of either lets through, but finite,
so that a runaway caller is held back rather than let in."""
HEALTH_CHECK_PERIOD_S = 2.0
"""A replica that was killed is noticed within a period; Serve's default of 10 s is long to go without one."""
HEALTH_CHECK_TIMEOUT_S = 10.0
"""Serve replaces a replica that misses three in a row: an event loop that is merely busy must not be taken for dead."""
HUB_SHUTDOWN_S = 10.0
GRACEFUL_SHUTDOWN_POLL_S = 0.5
HEAD = {"node:__internal_head__": 0.001}
"""A little of what Ray's head alone has, by Ray's name for it: whoever takes it is there."""
GATEWAY_SURGE_PERCENT = 100
"""New gateways take requests before old ones take no more; they reserve nothing, so there is always room for them."""

KEEPER_SURGE_PERCENT = 100
"""A new keeper of KV hosts or of streams has taken over what there is before the old one goes, and that with it."""


def build(args: AppConfig) -> Application:
    """The application for `args`. Serve calls this with the file's `args`, validated: an error names the field."""
    return assemble(args, load_engine, load_rank)


def assemble(config: AppConfig, engine_factory: EngineFactory, rank_loader: RankLoader = load_rank) -> Application:
    """The application with engines of the caller's choice; the factory must be importable in the replicas, and so must
    what loads the ranks of engines that have several. Raises NoRoom where the nodes have no room for those."""
    cpus = node_cpus()
    ranks = config.parallel.ranks
    if config.cpus_per_replica == "auto":
        share = cpu_share(cpus, config.replicas * ranks)
    else:
        share = config.cpus_per_replica / ranks
    # The ranks of a replica divide its memory between them by themselves.
    neighbours = min(config.replicas, max(1, math.floor(max(cpus, default=share) / (share * ranks))))
    engine = share_machine(config.engine, share, neighbours)
    each = rank_resources(config.engine, share)
    if ranks > 1:
        engine_factory = ShardedFactory(config.parallel, each, rank_loader)
    # Each is given what it needs and no more: Serve replaces actors whose arguments have changed.
    hub = _deployment(MetricsHub, replicas=1, cpus=0, drain_s=HUB_SHUTDOWN_S).bind(config.model_name)
    hosts = None
    if config.kv_host.enabled:
        hosts = (
            _deployment(KVHosts, replicas=1, cpus=0, drain_s=HUB_SHUTDOWN_S)
            .options(max_surge_percent=KEEPER_SURGE_PERCENT)
            .bind(config.kv_host, hub)
        )
    replicas = (
        _deployment(LLMReplica, replicas=config.replicas, cpus=share, drain_s=config.drain_timeout_s)
        .options(request_router_config=RequestRouterConfig(request_router_class=TokenRequestRouter))
        .options(**(reservation(config, each) if ranks > 1 else {}))
        .bind(engine, config.model_name, hub, engine_factory, hosts)
    )
    # A host that is lost may take a gateway along, and must not take what is known of its streams: the store is where
    # the cluster ends anyway.
    streams = (
        _deployment(StreamStore, replicas=1, cpus=0, drain_s=HUB_SHUTDOWN_S)
        .options(ray_actor_options={"num_cpus": 0, "resources": HEAD}, max_surge_percent=KEEPER_SURGE_PERCENT)
        .bind(config.gateway.streams, hub)
    )
    gateway = _deployment(
        serve.ingress()(Gateway), replicas=config.gateway.replicas, cpus=0, drain_s=config.gateway.drain_timeout_s
    ).options(max_surge_percent=GATEWAY_SURGE_PERCENT)
    return gateway.bind(config.gateway, replicas, hub, streams)


def _deployment(actor: type, *, replicas: int, cpus: float, drain_s: float) -> Any:
    """A Serve deployment of `actor`, whose calls may go on for `drain_s` seconds once it is to end.

    Gateways and hub reserve no CPU, so that they fit beside the replicas.
    """
    return serve.deployment(actor).options(
        num_replicas=replicas,
        max_ongoing_requests=MAX_ONGOING_REQUESTS,
        ray_actor_options={"num_cpus": cpus},
        health_check_period_s=HEALTH_CHECK_PERIOD_S,
        health_check_timeout_s=HEALTH_CHECK_TIMEOUT_S,
        graceful_shutdown_timeout_s=drain_s,
        graceful_shutdown_wait_loop_s=GRACEFUL_SHUTDOWN_POLL_S,
    )


def reservation(config: AppConfig, each: Mapping[str, float]) -> dict[str, Any]:
    """What Serve reserves for a replica and its ranks together; the replica itself takes nothing of it.

    Serve's own placement, rather than one that replicas make: it starts none where there is no room, counts what all of
    them take, and gives it back whatever becomes of a replica. Raises NoRoom for what the nodes could never hold: Serve
    would wait for ever.
    """
    laid = lay_bundles(config.parallel, each, living_nodes(free=False), config.replicas)
    options: dict[str, Any] = {
        "ray_actor_options": {"num_cpus": 0},
        "placement_group_bundles": list(laid.resources),
        "placement_group_strategy": laid.strategy,
    }
    if any(laid.labels):
        options["placement_group_bundle_label_selector"] = list(laid.labels)
    return options


def rank_resources(engine: EngineConfig, cpus: float) -> dict[str, float]:
    """What Ray reserves for a rank: its cores, and a GPU if it is to compute on one."""
    has_gpus = any(node.free.get("GPU", 0.0) for node in living_nodes(free=False))
    on_gpu = engine.device == "cuda" or (engine.device == "auto" and has_gpus)
    return {"CPU": cpus} | ({"GPU": 1.0} if on_gpu else {})


def node_cpus() -> list[float]:
    """Ray CPUs of each living node; empty without a cluster."""
    if not ray.is_initialized():
        return []
    return [node["Resources"].get("CPU", 0.0) for node in ray.nodes() if node["Alive"]]


def cpu_share(cpus: Sequence[float], replicas: int) -> float:
    """CPUs that each of `replicas` may reserve so that all of them fit on nodes with `cpus` CPUs.

    The most whole CPUs, or an equal fraction when there are more replicas than CPUs. 1 when no node is known.
    """
    for share in range(int(max(cpus, default=0)), 0, -1):
        if sum(int(node // share) for node in cpus) >= replicas:
            return float(share)
    if sum(cpus) < 1:
        return 1.0
    # Ray counts resources in ten-thousandths.
    per_cpu = math.ceil(replicas / sum(int(node) for node in cpus))
    return math.floor(10_000 / per_cpu) / 10_000


def share_machine(engine: EngineConfig, cpus: float, neighbours: int) -> EngineConfig:
    """Resolves what "auto" means for one of `neighbours` replicas of a node: its cores, and its part of the memory."""
    threads = max(1, int(cpus)) if engine.threads == "auto" else engine.threads
    kv = engine.kv.model_copy(update={"memory_share": engine.kv.memory_share / neighbours})
    return engine.model_copy(update={"threads": threads, "kv": kv})
