"""How an application's configuration is fitted to the machines it runs on."""

from pathlib import Path

import pytest

from cluster.config import ParallelConfig
from cluster.shards.placement import NodeRoom, NoRoom
from deployments import app
from deployments.app import assemble, build, reservation
from deployments.config import AppConfig, GatewayConfig
from deployments.serve_settings import DRAIN, FAST_PATH, HANGING, NODE_FAILURE, hasty_proxy, missing_settings
from engine.config import EngineConfig
from engine.errors import ModelError


def test_a_replica_and_its_ranks_are_reserved_together_and_the_ranks_take_it_all() -> None:
    nodes = [NodeRoom(name, {"CPU": 4.0}, {"zone": "x"}) for name in "ab"]
    config = AppConfig(replicas=2, parallel=ParallelConfig(tensor=2, pipeline=2, labels=({"zone": "x"},)))
    assert reservation(config, {"CPU": 1.0}, nodes) == {
        "placement_group_bundles": [{"CPU": 2.0}, {"CPU": 2.0}],
        "placement_group_strategy": "SPREAD",
        "placement_group_bundle_label_selector": [{"zone": "x"}, {"zone": "x"}],
    }
    with pytest.raises(NoRoom, match=r"3 replicas are asked for.*\. In all: a has 4 CPU"):
        reservation(config.model_copy(update={"replicas": 3}), {"CPU": 1.0}, nodes)


def test_what_is_deployed_for_several_ranks_reserves_their_place_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(app, "living_nodes", lambda *, free: [NodeRoom("a", {"CPU": 8.0}, {})])
    config = AppConfig(replicas=2, parallel=ParallelConfig(tensor=2))
    gateway = assemble(config, lambda config, find_host: None)._bound_deployment  # type: ignore[arg-type,return-value]
    replicas = gateway.init_args[1]._bound_deployment
    assert replicas.ray_actor_options["num_cpus"] == 0
    assert replicas._replica_config.placement_group_bundles == [{"CPU": 4.0}]


def test_a_replica_that_is_not_cut_reserves_its_cores_and_its_gpu() -> None:
    cpus, gpus = NodeRoom("a", {"CPU": 8.0}, {}), NodeRoom("b", {"CPU": 8.0, "GPU": 2.0}, {})
    config = AppConfig(replicas=2)
    assert reservation(config, {"CPU": 2.0}, [cpus]) == {"ray_actor_options": {"num_cpus": 2.0}}
    both = {"CPU": 2.0, "GPU": 1.0}
    assert reservation(config, both, [cpus, gpus]) == {"ray_actor_options": {"num_cpus": 2.0, "num_gpus": 1.0}}
    with pytest.raises(NoRoom, match=r"2 CPU and 1 GPU each\. In all: a has 8 CPU and 0 GPU"):
        reservation(config, both, [cpus])


def test_what_there_is_no_room_for_waits_where_nodes_may_join() -> None:
    """As on Kubernetes, which deploys as soon as the head is there: that has no CPUs."""
    head = NodeRoom("head", {"CPU": 0.0}, {})
    waits = {"nodes_may_join": True, "replicas": 2}
    cut = AppConfig(parallel=ParallelConfig(tensor=2, pipeline=2), **waits)
    assert reservation(cut, {"CPU": 1.0}, [head]) == {
        "placement_group_bundles": [{"CPU": 2.0}, {"CPU": 2.0}],
        "placement_group_strategy": "SPREAD",
    }
    whole = AppConfig(**waits)
    assert reservation(whole, {"CPU": 2.0, "GPU": 1.0}, [head]) == {
        "ray_actor_options": {"num_cpus": 2.0, "num_gpus": 1.0}
    }
    # Once they are there, what fits them counts.
    small = [NodeRoom(name, {"CPU": 1.0}, {}) for name in "abcdefgh"]
    assert reservation(cut, {"CPU": 1.0}, small)["placement_group_bundles"] == [{"CPU": 1.0}] * 4


def test_replicas_of_a_cluster_with_gpus_are_placed_on_them(monkeypatch: pytest.MonkeyPatch) -> None:
    nodes = [NodeRoom("a", {"CPU": 64.0}, {}), NodeRoom("b", {"CPU": 64.0, "GPU": 8.0}, {})]
    monkeypatch.setattr(app, "living_nodes", lambda *, free: nodes)
    config = AppConfig(replicas=2, engine=EngineConfig(device="cuda"))
    gateway = assemble(config, lambda config, find_host: None)._bound_deployment  # type: ignore[arg-type,return-value]
    replicas = gateway.init_args[1]._bound_deployment
    assert (replicas.ray_actor_options["num_cpus"], replicas.ray_actor_options["num_gpus"]) == (8.0, 1.0)
    assert replicas.init_args[0].kv.memory_share == config.engine.kv.memory_share


def test_a_model_that_cannot_be_cut_as_asked_is_refused_before_anything_is_deployed() -> None:
    with pytest.raises(ModelError, match=r"cannot be cut as asked \(tensor 3, pipeline 1"):
        build(AppConfig(parallel=ParallelConfig(tensor=3)))
    with pytest.raises(ModelError, match="too few for 200 stages"):
        build(AppConfig(parallel=ParallelConfig(pipeline=200)))
    # Its files may be on the nodes of the replicas alone.
    build(AppConfig(engine=EngineConfig(model="/nowhere"), parallel=ParallelConfig(tensor=3)))


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
