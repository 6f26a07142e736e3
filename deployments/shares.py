"""What each replica and each rank may take of the cluster's nodes. Pure arithmetic: nodes in, numbers out."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from cluster.shards.placement import NodeRoom
from deployments.config import AppConfig
from engine.config import EngineConfig

_EPSILON = 1e-9


@dataclass(frozen=True, slots=True)
class Share:
    """Of one rank; a replica that is not cut is one."""

    cpus: float
    gpus: float
    """0 where it computes on cores; less than 1 where several replicas have to do with one."""
    neighbours: int
    """Replicas that divide the memory it keeps its pages in: of its node, or of its GPU."""

    @property
    def resources(self) -> dict[str, float]:
        """As Ray counts them."""
        return {"CPU": self.cpus} | ({"GPU": self.gpus} if self.gpus else {})


def share_of(config: AppConfig, nodes: Sequence[NodeRoom], *, torch_has_gpus: bool) -> Share:
    """What a rank may reserve of `nodes` (all that each has), so that everything fits if it can at all.

    `torch_has_gpus` is whether torch is of a build that can compute on one. A rank of several has a GPU of its own.
    """
    ranks = config.parallel.ranks
    with_gpus = [node for node in nodes if node.free.get("GPU", 0.0) > 0]
    on_gpu = config.engine.device == "cuda" or (config.engine.device == "auto" and torch_has_gpus and bool(with_gpus))
    able = with_gpus if on_gpu and with_gpus else nodes
    cpus = [node.free.get("CPU", 0.0) for node in able]
    per_gpu = [node.free.get("CPU", 0.0) / node.free["GPU"] for node in with_gpus] if on_gpu else []
    if config.cpus_per_replica != "auto":
        share = config.cpus_per_replica / ranks
    else:
        share = rank_cpus(cpus, config.replicas, config.parallel.tensor, config.parallel.pipeline)
        share = _countable(min([share, *per_gpu]))
    if on_gpu:
        gpus = sum(int(node.free["GPU"]) for node in with_gpus)
        crowd = math.ceil(config.replicas / gpus) if gpus and ranks == 1 else 1
        return Share(share, _countable(1 / crowd), crowd)
    return Share(share, 0.0, _neighbours(cpus, share, config))


def rank_cpus(cpus: Sequence[float], replicas: int, tensor: int, pipeline: int) -> float:
    """CPUs of a rank: an equal part of what a stage may have, so that each stage fits a node whole.

    Where a node has fewer CPUs than a stage has ranks, these are given whole ones wherever they are instead.
    """
    share = _countable(cpu_share(cpus, replicas * pipeline) / tensor)
    return share if share >= 1 else max(share, cpu_share(cpus, replicas * pipeline * tensor))


def cpu_share(cpus: Sequence[float], parts: int) -> float:
    """CPUs that each of so many parts, which lie on one node each, may have so that all fit on nodes with `cpus` CPUs.

    The most whole CPUs, or an equal fraction when there are more parts than CPUs. 1 when no node is known.
    """
    for share in range(int(max(cpus, default=0)), 0, -1):
        if sum(int(node // share) for node in cpus) >= parts:
            return float(share)
    if sum(cpus) < 1:
        return 1.0
    return _countable(1 / math.ceil(parts / sum(int(node) for node in cpus)))


def share_machine(engine: EngineConfig, cpus: float, neighbours: int) -> EngineConfig:
    """Resolves what "auto" means for one of `neighbours` replicas of a node: its cores, and its part of the memory."""
    threads = max(1, int(cpus)) if engine.threads == "auto" else engine.threads
    kv = engine.kv.model_copy(update={"memory_share": engine.kv.memory_share / neighbours})
    return engine.model_copy(update={"threads": threads, "kv": kv})


def _neighbours(cpus: Sequence[float], share: float, config: AppConfig) -> int:
    """Replicas that may have a stage, or ranks of one, on one node: the ranks of a replica divide its memory between
    them by themselves."""
    most = max(cpus, default=share)
    stages = math.floor(most / (share * config.parallel.tensor) + _EPSILON)
    return max(1, min(config.replicas, stages or math.floor(most / share + _EPSILON)))


def _countable(share: float) -> float:
    """Whole where it can be, else in ten-thousandths, as Ray counts."""
    return float(math.floor(share)) if share >= 1 else math.floor(10_000 * share + _EPSILON) / 10_000
