"""The application builder: `import_path: deployments.app:build` in a Serve config file.

Turns a validated configuration into bound deployments, and resolves what depends on the cluster. Loads no model.
"""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ray import serve
from ray.serve import Application
from ray.serve.config import RequestRouterConfig

from cluster.nodes import living_nodes
from cluster.shard import RankLoader
from cluster.shards.cuttable import cuttable_spec
from cluster.shards.placement import Bundles, NodeRoom, NoRoom, lay_bundles
from deployments.config import AppConfig
from deployments.gateway import Gateway
from deployments.kv_hosts import KVHosts
from deployments.metrics_hub import MetricsHub
from deployments.model_check import torch_is_for_gpus
from deployments.replica import EngineFactory, LLMReplica, load_engine
from deployments.router_adapter import TokenRequestRouter
from deployments.sharded import ShardedFactory, load_rank
from deployments.shares import share_machine, share_of
from deployments.streams.store import StreamStore
from engine.models.source import BUILT_IN, resolve_model

logger = logging.getLogger(__name__)

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
    what loads the ranks of engines that have several. Raises NoRoom where the nodes could never hold those or have no
    GPUs for what is to compute on them, and ModelError where the model cannot be cut so."""
    check_cut(config)
    nodes = living_nodes(free=False)
    share = share_of(config, nodes, torch_has_gpus=torch_is_for_gpus())
    engine = share_machine(config.engine, share.cpus, share.neighbours)
    if config.parallel.ranks > 1:
        engine_factory = ShardedFactory(config.parallel, share.resources, rank_loader)
    # Each is given what it needs and no more: Serve replaces actors whose arguments have changed.
    hub = _deployment(MetricsHub, replicas=1, drain_s=HUB_SHUTDOWN_S).bind(config.model_name)
    hosts = None
    if config.kv_host.enabled:
        hosts = (
            _deployment(KVHosts, replicas=1, drain_s=HUB_SHUTDOWN_S)
            .options(max_surge_percent=KEEPER_SURGE_PERCENT)
            .bind(config.kv_host, hub)
        )
    replicas = (
        _deployment(LLMReplica, replicas=config.replicas, drain_s=config.drain_timeout_s)
        .options(request_router_config=RequestRouterConfig(request_router_class=TokenRequestRouter))
        .options(**reservation(config, share.resources, nodes))
        .bind(engine, config.model_name, hub, engine_factory, hosts)
    )
    # A host that is lost may take a gateway along, and must not take what is known of its streams: the store is where
    # the cluster ends anyway.
    streams = (
        _deployment(StreamStore, replicas=1, drain_s=HUB_SHUTDOWN_S)
        .options(ray_actor_options={"num_cpus": 0, "resources": HEAD}, max_surge_percent=KEEPER_SURGE_PERCENT)
        .bind(config.gateway.streams, hub)
    )
    gateway = _deployment(
        serve.ingress()(Gateway), replicas=config.gateway.replicas, drain_s=config.gateway.drain_timeout_s
    ).options(max_surge_percent=GATEWAY_SURGE_PERCENT)
    return gateway.bind(config.gateway, replicas, hub, streams)


def _deployment(actor: type, *, replicas: int, drain_s: float) -> Any:
    """A Serve deployment of `actor`, whose calls may go on for `drain_s` seconds once it is to end.

    It reserves no CPU, so that it fits beside the replicas; what these reserve is `reservation`'s to say.
    """
    return serve.deployment(actor).options(
        num_replicas=replicas,
        max_ongoing_requests=MAX_ONGOING_REQUESTS,
        ray_actor_options={"num_cpus": 0},
        health_check_period_s=HEALTH_CHECK_PERIOD_S,
        health_check_timeout_s=HEALTH_CHECK_TIMEOUT_S,
        graceful_shutdown_timeout_s=drain_s,
        graceful_shutdown_wait_loop_s=GRACEFUL_SHUTDOWN_POLL_S,
    )


def reservation(config: AppConfig, each: Mapping[str, float], nodes: Sequence[NodeRoom]) -> dict[str, Any]:
    """What Serve reserves for a replica. Where it has several ranks, that is their place, of which it takes nothing,
    as any deployment does by itself.

    Serve's own placement, rather than one that replicas make: it starts none where there is no room, counts what all of
    them take, and gives it back whatever becomes of a replica. Raises NoRoom for what the nodes could never hold, if no
    more may come: Serve would wait for ever.
    """
    if config.parallel.ranks == 1 and "GPU" not in each:
        return {"ray_actor_options": {"num_cpus": each["CPU"]}}
    laid = _laid(config, each, nodes)
    if config.parallel.ranks == 1:
        return {"ray_actor_options": {"num_cpus": each["CPU"], "num_gpus": each["GPU"]}}
    options: dict[str, Any] = {
        "placement_group_bundles": list(laid.resources),
        "placement_group_strategy": laid.strategy,
    }
    if any(laid.labels):
        options["placement_group_bundle_label_selector"] = list(laid.labels)
    return options


def _laid(config: AppConfig, each: Mapping[str, float], nodes: Sequence[NodeRoom]) -> Bundles:
    """What holds the ranks of a replica. Raises NoRoom."""
    try:
        return lay_bundles(config.parallel, each, nodes, config.replicas, totals=True)
    except NoRoom as error:
        if not config.nodes_may_join:
            raise
        logger.warning("Replicas wait for nodes to join: %s", error)
        return lay_bundles(config.parallel, each, ())


def check_cut(config: AppConfig) -> None:
    """Raises ModelError where the model cannot be cut as asked: before replicas start, if its files are here, too."""
    model = config.engine.model
    if config.parallel.ranks > 1 and (model == BUILT_IN or (Path(model).expanduser() / "config.json").is_file()):
        cuttable_spec(resolve_model(model), config.engine, config.parallel)
