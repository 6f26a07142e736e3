"""How an application's configuration is fitted to the machines it runs on."""

from pathlib import Path

import pytest

from cluster.config import ParallelConfig
from cluster.shards.placement import NodeRoom, NoRoom
from deployments import app
from deployments.app import cpu_share, rank_resources, reservation, share_machine
from deployments.config import AppConfig, GatewayConfig
from deployments.serve_settings import DRAIN, FAST_PATH, HANGING, NODE_FAILURE, hasty_proxy, missing_settings
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


@pytest.fixture
def nodes(monkeypatch: pytest.MonkeyPatch) -> list[NodeRoom]:
    """Those of the cluster."""
    found: list[NodeRoom] = []
    monkeypatch.setattr(app, "living_nodes", lambda *, free: found)
    return found


def test_a_replica_and_its_ranks_are_reserved_together_and_the_ranks_take_it_all(nodes: list[NodeRoom]) -> None:
    nodes += [NodeRoom(name, {"CPU": 4.0}, {"zone": "x"}) for name in "ab"]
    config = AppConfig(replicas=2, parallel=ParallelConfig(tensor=2, pipeline=2, labels=({"zone": "x"},)))
    assert reservation(config, {"CPU": 1.0}) == {
        "ray_actor_options": {"num_cpus": 0},
        "placement_group_bundles": [{"CPU": 2.0}, {"CPU": 2.0}],
        "placement_group_strategy": "SPREAD",
        "placement_group_bundle_label_selector": [{"zone": "x"}, {"zone": "x"}],
    }
    with pytest.raises(NoRoom, match="3 replicas are asked for"):
        reservation(config.model_copy(update={"replicas": 3}), {"CPU": 1.0})


def test_a_rank_reserves_a_gpu_where_it_is_to_compute_on_one(nodes: list[NodeRoom]) -> None:
    assert rank_resources(EngineConfig(), 2.0) == {"CPU": 2.0}
    assert rank_resources(EngineConfig(device="cuda"), 2.0) == {"CPU": 2.0, "GPU": 1.0}
    nodes.append(NodeRoom("a", {"CPU": 8.0, "GPU": 4.0}, {}))
    assert rank_resources(EngineConfig(), 2.0) == {"CPU": 2.0, "GPU": 1.0}
    assert rank_resources(EngineConfig(device="cpu"), 2.0) == {"CPU": 2.0}


def test_nothing_is_missing_with_all_settings() -> None:
    assert missing_settings(FAST_PATH) == ""


def test_a_proxy_that_does_not_wait_for_gateways_is_complained_of() -> None:
    proxy = {"RAY_SERVE_ENABLE_HA_PROXY": "1"}
    line = hasty_proxy(600.0, proxy)
    assert "120 s" in line and "RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S=660" in line and "\n" not in line
    assert hasty_proxy(GatewayConfig().drain_timeout_s, {**proxy, **DRAIN}) == ""
    assert hasty_proxy(100.0, proxy) == ""
    assert hasty_proxy(600.0, {}) == "", "Serve's own proxy is another matter"


def test_the_example_environment_has_every_setting_of_a_cluster() -> None:
    lines = (Path(__file__).parents[2] / "examples" / "ray.env").read_text().splitlines()
    settings = dict(line.split("=") for line in lines if line and not line.startswith("#"))
    assert settings == {**FAST_PATH, **NODE_FAILURE, **HANGING, **DRAIN}


def test_missing_settings_are_named_in_one_line() -> None:
    line = missing_settings({"RAY_SERVE_ENABLE_HA_PROXY": "1"})
    assert "RAY_SERVE_THROUGHPUT_OPTIMIZED=1" in line
    assert "RAY_SERVE_ENABLE_HA_PROXY" not in line
    assert "\n" not in line
