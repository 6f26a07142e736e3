"""The manifest's Serve config is one that the application accepts."""

from pathlib import Path

import yaml

from deployments.config import AppConfig
from deployments.serve_settings import DRAIN, FAST_PATH, HANGING, NODE_FAILURE

FOLDER = Path(__file__).parents[2] / "k8s"
MANIFEST, POLICY = FOLDER / "rayservice.yaml", FOLDER / "network-policy.yaml"


def test_the_manifests_arguments_are_valid_and_every_container_has_the_settings_of_a_cluster() -> None:
    spec = yaml.safe_load(MANIFEST.read_text())["spec"]
    (application,) = yaml.safe_load(spec["serveConfigV2"])["applications"]
    assert application["import_path"] == "deployments.app:build"
    config = AppConfig.model_validate(application["args"])
    workers = spec["rayClusterConfig"]["workerGroupSpecs"][0]
    assert config.replicas == workers["replicas"], "one replica of the model per worker"
    (worker,) = workers["template"]["spec"]["containers"]
    assert config.cpus_per_replica == float(worker["resources"]["requests"]["cpu"]), "no worker is there to look at yet"
    assert config.nodes_may_join
    groups = [spec["rayClusterConfig"]["headGroupSpec"], workers]
    for container in (c for group in groups for c in group["template"]["spec"]["containers"]):
        env = {e["name"]: e["value"] for e in container["env"]}
        assert env == {**FAST_PATH, **NODE_FAILURE, **HANGING, **DRAIN}
    # An old cluster stays for as long as its gateways may take to finish the streams of their clients.
    assert spec["rayClusterDeletionDelaySeconds"] >= config.gateway.drain_timeout_s


def test_only_the_applications_own_pods_reach_its_ranks() -> None:
    cluster = yaml.safe_load(MANIFEST.read_text())["spec"]["rayClusterConfig"]
    policy = yaml.safe_load(POLICY.read_text())["spec"]
    own = policy["podSelector"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        assert group["template"]["metadata"]["labels"] == own["matchLabels"], "the policy is about all of its pods"
    assert policy["policyTypes"] == ["Ingress"]
    open_ports = {}
    for rule in policy["ingress"]:
        who = str(rule.get("from", "anybody"))
        open_ports[who] = {port["port"] for port in rule.get("ports", [])} or "all"
    operator = [
        {"namespaceSelector": {}, "podSelector": {"matchLabels": {"app.kubernetes.io/name": "kuberay-operator"}}}
    ]
    assert open_ports == {str([{"podSelector": own}]): "all", "anybody": {8000}, str(operator): {8265}}
