"""Runs the application with KV hosts over fake engines: `python -m tests.deployments.app.host_server MODEL_DIR PORT`.

Prints the path of the node's socket. Then each line of standard input is a command: "deploy" replaces everything by a new
version, "delete" deletes the application; it prints "done" when it is.
When standard input is closed, everything ends.
"""

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

        args = {"engine": {"model": model}, "kv_host": {"memory": "1MiB", "disk": f"{model}/kv", "disk_size": "1MiB"}}
        config = AppConfig.model_validate(args)
        serve.run(assemble(config, build_fake_engine), name="served")
        print(host_socket("served"), flush=True)
        for command in sys.stdin:
            if command == "deploy\n":
                serve.run(assemble(config, build_fake_engine), name="served")
            else:
                assert command == "delete\n"
                serve.delete("served")
            print("done", flush=True)
    finally:
        ray.stop()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
