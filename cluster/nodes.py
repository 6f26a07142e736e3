"""The nodes of the cluster, as Ray reports them."""

from typing import Any

import ray
from ray._private.state import available_resources_per_node

from cluster.shards.placement import NodeRoom


def this_node() -> dict[str, Any]:
    """The node of this process."""
    here = ray.get_runtime_context().get_node_id()
    found: dict[str, Any] = next(node for node in ray.nodes() if node["NodeID"] == here)
    return found


def living_nodes(*, free: bool) -> list[NodeRoom]:
    """The nodes that live, with what is free on each, or all that each has; none without a cluster."""
    if not ray.is_initialized():
        return []
    available = available_resources_per_node() if free else {}
    return [
        NodeRoom(
            node["NodeManagerAddress"],
            available.get(node["NodeID"], {}) if free else node["Resources"],
            node.get("Labels") or {},
        )
        for node in ray.nodes()
        if node["Alive"]
    ]
