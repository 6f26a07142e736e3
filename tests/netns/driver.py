"""Speaks to the Ray of the hosts from within: `python -m tests.netns.driver ADDRESS PORT`, on the head.

Starts Serve, says "ready", and then does what each line of its input says, a JSON object, and answers with another.
"""

import json
import sys
import time
from collections.abc import Callable
from typing import Any

import ray
from ray import serve
from ray.serve.context import _get_global_client
from ray.serve.schema import ServeDeploySchema

DEPLOYED_S = 120.0
APPLICATION = "default"


def nodes() -> list[str]:
    """Addresses of the nodes that Ray takes for alive."""
    return [node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]]


def deploy(args: dict[str, Any]) -> None:
    """Brings the application to these args, as `serve deploy` does, and waits until it runs. Raises RuntimeError."""
    application = {"name": APPLICATION, "route_prefix": "/", "import_path": "deployments.app:build", "args": args}
    _get_global_client().deploy_apps(ServeDeploySchema.model_validate({"applications": [application]}))
    until = time.monotonic() + DEPLOYED_S
    while True:
        found = serve.status().applications[APPLICATION]
        if found.status == "RUNNING":
            return
        if found.status == "DEPLOY_FAILED" or time.monotonic() > until:
            messages = [found.message, *(each.message for each in found.deployments.values())]
            raise RuntimeError(f"{found.status}: {' '.join(filter(None, messages))[-2000:]}")
        time.sleep(0.1)


DO: dict[str, Callable[..., Any]] = {"nodes": nodes, "deploy": deploy}


def main(address: str, port: int) -> None:
    # Ray tells of dead nodes on standard output, too.
    answers, sys.stdout = sys.stdout, sys.stderr
    ray.init(address, namespace="manta", log_to_driver=False, logging_level="error")
    serve.start(http_options={"host": "0.0.0.0", "port": port}, proxy_location="HeadOnly")
    print("ready", file=answers, flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        try:
            answer = {"result": DO[asked.pop("do")](**asked)}
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
