"""Runs the application over fake engines on a private Ray.

`python -m tests.deployments.app.server MODEL_DIR PORT [GATEWAYS [TENSOR PIPELINE]]`

A process of its own, because Ray reads its settings once, when it is imported. Prints "ready" and serves until its
standard input is closed; then everything it started ends. Each line of its input is a JSON object and a deployment, as
`serve deploy` makes it: "args" are merged into those of the application, "num_replicas" is Serve's own number of
replicas of the model. It prints "deployed" once that is what runs.
"""

import json
import sys
import time
import urllib.request
from typing import Any

from deployments.private_ray import PrivateRay


def main(model: str, port: int, gateways: int = 1, tensor: int = 1, pipeline: int = 1) -> None:
    ray = PrivateRay(num_cpus=2, dashboard=False)
    try:
        ray.start("127.0.0.1", port)
        args: dict[str, Any] = {"replicas": 2, "cpus_per_replica": 1, "served_model_name": "fake"}
        args |= {"engine": {"model": model, "device": "cpu"}, "gateway": {"replicas": gateways}}
        args |= {"parallel": {"tensor": tensor, "pipeline": pipeline}}
        deploy(args, 2)
        while not _answers(f"http://127.0.0.1:{port}/ready"):
            time.sleep(0.1)
        print("ready", flush=True)
        num_replicas = 2
        for line in sys.stdin:
            change = json.loads(line)
            args |= change.get("args", {})
            num_replicas = change.get("num_replicas", num_replicas)
            deploy(args, num_replicas)
            print("deployed", flush=True)
    finally:
        ray.stop()


def deploy(args: dict[str, Any], num_replicas: int) -> None:
    """Brings the application to this state, and waits for it."""
    from ray import serve
    from ray.serve.context import _get_global_client
    from ray.serve.schema import ServeDeploySchema

    application = {
        "name": "default",
        "route_prefix": "/",
        "import_path": "tests.deployments.app.fake_application:build",
        "args": args,
        "deployments": [{"name": "LLMReplica", "num_replicas": num_replicas}],
    }
    _get_global_client().deploy_apps(ServeDeploySchema.model_validate({"applications": [application]}))
    while serve.status().applications["default"].status != "RUNNING":
        time.sleep(0.1)


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as response:
            return bool(response.status == 200)
    except OSError:
        return False


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
