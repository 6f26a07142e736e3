"""What each replica and each rank may take of the cluster."""

import pytest

from cluster.config import ParallelConfig
from cluster.shards.placement import NodeRoom, lay_bundles
from deployments.config import AppConfig
from deployments.shares import Share, cpu_share, rank_cpus, share_machine, share_of
from engine.config import EngineConfig, KVConfig


@pytest.mark.parametrize(
    ("cpus", "replicas", "share"),
    [
        ([2], 1, 2.0),
        ([2], 2, 1.0),
        ([8], 3, 2.0),
        ([8, 8], 2, 8.0),
        ([8, 8], 3, 4.0),
        ([8, 4], 2, 4.0),
        ([16, 2], 3, 5.0),
        ([], 4, 1.0),
    ],
)
def test_replicas_get_the_most_whole_cpus_that_let_all_of_them_fit(
    cpus: list[float], replicas: int, share: float
) -> None:
    assert cpu_share(cpus, replicas) == share


@pytest.mark.parametrize(("cpus", "replicas"), [([2], 3), ([2], 7), ([1], 2), ([2, 2], 5), ([4, 1], 16)])
def test_more_replicas_than_cpus_share_them_and_all_fit(cpus: list[float], replicas: int) -> None:
    share = cpu_share(cpus, replicas)
    assert 0 < share < 1
    assert sum(int(node / share + 1e-9) for node in cpus) >= replicas


def test_threads_follow_the_cpus_and_memory_is_divided_between_neighbours() -> None:
    engine = share_machine(EngineConfig(kv=KVConfig(memory_share=0.6)), cpus=4.0, neighbours=2)
    assert engine.threads == 4
    assert engine.kv.memory_share == pytest.approx(0.3)


def test_fraction_of_a_cpu_is_still_one_thread() -> None:
    assert share_machine(EngineConfig(), cpus=0.5, neighbours=4).threads == 1


def test_chosen_threads_stay() -> None:
    assert share_machine(EngineConfig(threads=3), cpus=8.0, neighbours=1).threads == 3


@pytest.mark.parametrize(
    ("cpus", "replicas", "tensor", "pipeline", "share"),
    [
        ([8, 8], 1, 2, 1, 4.0),
        ([8, 8], 1, 2, 2, 4.0),
        ([8, 8], 2, 2, 1, 4.0),
        ([2], 1, 2, 1, 1.0),
        ([2], 1, 1, 2, 1.0),
        ([8], 1, 3, 1, 2.0),
        # Less than a core each on one node, or one on each of two.
        ([4, 4], 1, 8, 1, 1.0),
        ([2], 1, 4, 1, 0.5),
        ([1], 1, 3, 1, 0.3333),
        ([], 1, 4, 1, 1.0),
    ],
)
def test_the_ranks_of_a_stage_divide_what_fits_one_node(
    cpus: list[float], replicas: int, tensor: int, pipeline: int, share: float
) -> None:
    assert rank_cpus(cpus, replicas, tensor, pipeline) == share


def node(cpus: float, gpus: float = 0.0) -> NodeRoom:
    return NodeRoom("a", {"CPU": cpus} | ({"GPU": gpus} if gpus else {}), {})


def share(config: AppConfig, *nodes: NodeRoom, torch_has_gpus: bool = True) -> Share:
    found = share_of(config, nodes, torch_has_gpus=torch_has_gpus)
    # Whatever is shared out has its place.
    lay_bundles(config.parallel, found.resources, nodes, config.replicas)
    return found


def cut(tensor: int = 1, pipeline: int = 1, replicas: int = 1, device: str = "auto") -> AppConfig:
    engine = EngineConfig.model_validate({"device": device})
    return AppConfig(replicas=replicas, engine=engine, parallel=ParallelConfig(tensor=tensor, pipeline=pipeline))


def test_a_stage_of_two_ranks_fits_one_of_two_nodes() -> None:
    found = share(cut(tensor=2), node(8), node(8))
    assert found == Share(cpus=4.0, gpus=0.0, neighbours=1)
    bundles = lay_bundles(ParallelConfig(tensor=2), found.resources, [node(8), node(8)])
    assert bundles.resources == ({"CPU": 8.0},), "one bundle, and so one node"


def test_cores_of_nodes_without_gpus_do_not_count_for_what_computes_on_one() -> None:
    nodes = node(64), node(64, 8)
    assert share(cut(tensor=8), *nodes) == Share(cpus=8.0, gpus=1.0, neighbours=1)
    assert share(cut(), *nodes) == Share(cpus=8.0, gpus=1.0, neighbours=1), "seven GPUs have their cores yet"
    assert share(cut(tensor=8, device="cpu"), *nodes) == Share(cpus=8.0, gpus=0.0, neighbours=1)
    assert share(cut(replicas=2), node(2, 8)) == Share(cpus=0.25, gpus=1.0, neighbours=1)


def test_replicas_have_a_gpu_each_and_its_memory_to_themselves() -> None:
    assert share(cut(replicas=2), node(16, 4)) == Share(cpus=4.0, gpus=1.0, neighbours=1)
    assert share(cut(tensor=2, replicas=2), node(16, 4)) == Share(cpus=4.0, gpus=1.0, neighbours=1)


def test_more_replicas_than_gpus_share_them_and_their_memory() -> None:
    assert share(cut(replicas=2), node(8, 1)) == Share(cpus=4.0, gpus=0.5, neighbours=2)
    assert share(cut(replicas=3), node(8, 1)) == Share(cpus=2.0, gpus=0.3333, neighbours=3)


def test_a_gpu_is_reserved_where_it_would_be_computed_on() -> None:
    assert share(cut(), node(8, 2), torch_has_gpus=False) == Share(cpus=8.0, gpus=0.0, neighbours=1)
    assert share_of(cut(device="cuda"), [node(8)], torch_has_gpus=True).gpus == 1.0
    assert share_of(cut(), [], torch_has_gpus=True) == Share(cpus=1.0, gpus=0.0, neighbours=1)


def test_replicas_that_meet_on_a_node_divide_its_memory() -> None:
    assert share(cut(replicas=2), node(8)).neighbours == 2
    assert share(cut(replicas=2), node(8), node(8)).neighbours == 1
    assert share(cut(pipeline=2, replicas=2), node(8), node(8)).neighbours == 2, "each has a stage on either"
    assert share(cut(pipeline=2, replicas=1), node(8)).neighbours == 1


def test_chosen_cpus_are_divided_among_the_ranks() -> None:
    config = cut(tensor=2).model_copy(update={"cpus_per_replica": 3.0})
    assert share(config, node(8)).cpus == 1.5
