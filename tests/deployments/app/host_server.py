"""Runs the application with KV hosts over fake engines: `python -m tests.deployments.app.host_server MODEL_DIR PORT`.

Prints the paths of the node's socket and of the log. Then each line of standard input is a command: "deploy" and a JSON
object replaces everything by a new version with other settings of the hosts, "delete" deletes the application; it
prints "done" when it is. When standard input is closed, everything ends.
"""

import json
import sys

from cluster.kv_host import host_socket
from deployments.config import AppConfig
from deployments.private_ray import PrivateRay
from tests.deployments.fakes import build_fake_engine


def main(model: str, port: int) -> None:
    ray = PrivateRay(num_cpus=2, dashboard=False)
    try:
        ray.start("127.0.0.1", port)
        from ray import serve

        from deployments.app import assemble

        hosts = {"memory": "1MiB", "disk": f"{model}/kv", "disk_size": "1MiB"}

        def deploy() -> None:
            config = AppConfig.model_validate({"engine": {"model": model, "device": "cpu"}, "kv_host": hosts})
            serve.run(assemble(config, build_fake_engine), name="served")

        deploy()
        print(host_socket("served"), ray.log_file, flush=True)
        for command in sys.stdin:
            verb, _, change = command.partition(" ")
            if verb == "deploy":
                hosts |= json.loads(change)
                deploy()
            else:
                assert command == "delete\n"
                serve.delete("served")
            print("done", flush=True)
    finally:
        ray.stop()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
