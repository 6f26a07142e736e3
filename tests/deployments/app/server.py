"""Runs the application over fake engines on a private Ray.

`python -m tests.deployments.app.server MODEL_DIR PORT [GATEWAYS]`

A process of its own, because Ray reads its settings once, when it is imported. Prints "ready" and serves until its
standard input is closed; then everything it started ends.
"""

import sys
import time
import urllib.request

from deployments.config import AppConfig
from deployments.private_ray import PrivateRay
from tests.deployments.fakes import build_fake_engine


def main(model: str, port: int, gateways: int = 1) -> None:
    ray = PrivateRay(num_cpus=2, dashboard=False)
    try:
        ray.start("127.0.0.1", port)
        from ray import serve

        from deployments.app import assemble

        args = {
            "replicas": 2,
            "served_model_name": "fake",
            "engine": {"model": model},
            "gateway": {"replicas": gateways},
        }
        config = AppConfig.model_validate(args)
        serve.run(assemble(config, build_fake_engine))
        while not _answers(f"http://127.0.0.1:{port}/ready"):
            time.sleep(0.1)
        print("ready", flush=True)
        sys.stdin.read()
    finally:
        ray.stop()


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as response:
            return bool(response.status == 200)
    except OSError:
        return False


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
