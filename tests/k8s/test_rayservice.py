"""The manifest's Serve config is one that the application accepts."""

from pathlib import Path

import yaml

from deployments.config import AppConfig

MANIFEST = Path(__file__).parents[2] / "k8s" / "rayservice.yaml"


def test_the_manifests_arguments_are_valid_and_every_container_has_the_throughput_settings() -> None:
    spec = yaml.safe_load(MANIFEST.read_text())["spec"]
    (application,) = yaml.safe_load(spec["serveConfigV2"])["applications"]
    assert application["import_path"] == "deployments.app:build"
    config = AppConfig.model_validate(application["args"])
    workers = spec["rayClusterConfig"]["workerGroupSpecs"][0]
    assert config.replicas == workers["replicas"], "one replica of the model per worker"
    groups = [spec["rayClusterConfig"]["headGroupSpec"], workers]
    for container in (c for group in groups for c in group["template"]["spec"]["containers"]):
        env = {e["name"]: e["value"] for e in container["env"]}
        assert env["RAY_SERVE_ENABLE_HA_PROXY"] == env["RAY_SERVE_THROUGHPUT_OPTIMIZED"] == "1"
