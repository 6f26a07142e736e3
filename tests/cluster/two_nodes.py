"""Two nodes of a private Ray with a KV host on each: `python -m tests.cluster.two_nodes TEMP_DIR`.

Prints the sockets, then renews the hosts until standard input is closed.
"""

import asyncio
import os
import sys
from pathlib import Path

from cluster.config import KVTierConfig


async def keep(hosts: dict[str, object], config: KVTierConfig) -> None:
    while True:
        for node, host in hosts.items():
            others = {name: other for name, other in hosts.items() if name != node}
            await host.renew.remote(1, config, others)
        await asyncio.sleep(0.5)


async def main(directory: str) -> None:
    os.environ.update(
        {
            "RAY_TMPDIR": directory,
            "RAY_AUTH_MODE": "disabled",
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_enable_metrics_collection": "0",
        }
    )
    (Path(directory) / "ray").mkdir()
    import ray
    from ray.cluster_utils import Cluster

    from cluster.kv.server import SOCKET_NAME
    from cluster.kv_host import end_hosts, host_directory, start_hosts

    node = {"num_cpus": 1, "object_store_memory": 100 * 2**20, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=node)
    try:
        cluster.add_node(num_cpus=1, object_store_memory=100 * 2**20)
        ray.init(address=cluster.address, logging_level="error", log_to_driver=False)
        config = KVTierConfig(memory=2**20)
        hosts = start_hosts("two", config)
        again = start_hosts("two", config)
        assert {name: host._actor_id for name, host in hosts.items()} == {n: h._actor_id for n, h in again.items()}
        # Once each host has answered, each knows the other.
        keeping = asyncio.create_task(keep(hosts, config))
        for host in hosts.values():
            await host.renew.remote(1, config, {})
        await asyncio.sleep(1)
        print(*(host_directory("two", node) / SOCKET_NAME for node in ray.nodes()), flush=True)
        await asyncio.to_thread(sys.stdin.read)
        keeping.cancel()
        await end_hosts(1, list(hosts.values()))
    finally:
        ray.shutdown()
        cluster.shutdown()


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1]))
