"""The KV host as Ray runs it: one actor a node, which outlives the replicas, and how it reaches those of other nodes.

Owns the life of `cluster.kv.server.KVServer` inside an actor. Who wants hosts, and for how long, says so by `renew`,
again and again: a host that nobody has renewed for LEASE_S ends itself, so that none stays behind when an application
is gone, however that came about.
"""

import asyncio
import hashlib
import logging
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cluster.config import KVTierConfig
from cluster.kv.host_config import HostConfig
from cluster.kv.peers import PageCopy
from cluster.kv.server import SOCKET_NAME, KVServer
from cluster.kv.stats import HostStats
from engine.machine import available_bytes

logger = logging.getLogger(__name__)

NAMESPACE = "manta"
LEASE_S = 30.0
"""How long a host lives without being renewed."""
AUTO_SHARE = 0.25
"""Of the free memory that "auto" takes."""
HAVE_TIMEOUT_S = 0.25
"""For other hosts to say what they have; a client waits for it."""
PAGES_TIMEOUT_S = 3.0
"""For a piece of pages to come from another host. Less than what a client waits for it: it is to be told."""
CLOSE_TIMEOUT_S = 5.0
"""For a host to give back what it can, before its process is ended regardless."""
END_TIMEOUT_S = 7.0
"""For a host to say that it has ended: CLOSE_TIMEOUT_S, and less than Serve gives to the one who asks for it."""
NUMBER_TIMEOUT_S = 5.0
"""For a host to say which keeper it has; one that takes longer is starting, and has none."""
_MAX_SOCKET_PATH = 107


class KVHostActor:
    """Keeps pages for the replicas of its node. Ray starts it again, on the same path, when its process dies."""

    # Ray awaits the constructor of an actor with asynchronous methods, which Python's typing does not know of.
    async def __init__(  # type: ignore[misc]
        self, directory: str, config: KVTierConfig, prepare: Callable[[], None]
    ) -> None:
        """Listens at `host_directory`. `prepare` is called first, in this process. Raises HostError."""
        prepare()
        self._directory = Path(directory)
        self._config = config
        self._peers = RayPeers()
        self._server = KVServer(self._directory, resolve(config), self._peers)
        self._keeper = 0
        self._renewing = asyncio.Lock()
        self._closing: asyncio.Task[None] | None = None
        await self._server.start()
        # Only now: nobody can renew it before, and to look through a disk takes its time.
        self._renewed = time.monotonic()
        self._watching = asyncio.get_running_loop().create_task(self._watch())

    async def keeper(self) -> int:
        """The number of the newest keeper that it has had, 0 if none."""
        return self._keeper

    async def renew(self, keeper: int, config: KVTierConfig, peers: Mapping[str, Any]) -> HostStats:
        """Lives on for LEASE_S, for this keeper unless there is a newer one: keepers are numbered by `next_keeper`.

        With another configuration it begins anew. `peers`: the hosts of the other nodes by name.
        """
        # At once: it is wanted, however long it then takes to begin anew.
        self._renewed = time.monotonic()
        async with self._renewing:
            if keeper >= self._keeper:
                self._keeper = keeper
                self._peers.hosts = dict(peers)
                if config != self._config:
                    await self._begin_anew(config)
            return self._server.stats()

    async def end(self, keeper: int) -> bool:
        """Gives everything back, unless it has a newer keeper; whether it did."""
        if keeper < self._keeper:
            return False
        # The lease goes on: it ends the process if whoever asked for this does not live to do so.
        await self._close()
        return True

    async def have(self, layout: bytes, keys: Sequence[bytes]) -> int:
        """See `KVServer.have`."""
        return self._server.have(layout, keys)

    async def pages(self, layout: bytes, keys: Sequence[bytes]) -> list[PageCopy]:
        """See `KVServer.pages`."""
        return await self._server.pages(layout, keys)

    async def _begin_anew(self, config: KVTierConfig) -> None:
        logger.info("The KV host has another configuration now: it begins anew")
        await self._close()
        self._closing = None
        self._server = KVServer(self._directory, resolve(config), self._peers)
        await self._server.start()
        self._config = config

    async def _close(self) -> None:
        """Closes the server, once, as far as that goes: what hangs ends with the process."""
        if self._closing is None:
            self._closing = asyncio.get_running_loop().create_task(self._server.close())
        done, _ = await asyncio.wait([self._closing], timeout=CLOSE_TIMEOUT_S)
        if not done:
            logger.warning("The KV host has not closed in %.0f s: something hangs", CLOSE_TIMEOUT_S)
        elif (error := self._closing.exception()) is not None:
            logger.error("The KV host did not close as it should", exc_info=error)

    async def _watch(self) -> None:
        while (left := self._renewed + LEASE_S - time.monotonic()) > 0:
            await asyncio.sleep(left)
        logger.warning("Nobody has wanted this KV host for %.0f s: it ends", LEASE_S)
        await self._close()
        # Without a restart, unlike any other end of the process.
        ray.kill(ray.get_runtime_context().current_actor, no_restart=True)


class RayPeers:
    """`cluster.kv.peers.Peers` over actor calls."""

    def __init__(self) -> None:
        self.hosts: dict[str, Any] = {}
        """Handles of the hosts of the other nodes."""

    async def have(self, layout: bytes, keys: Sequence[bytes]) -> tuple[str, int]:
        hosts = dict(self.hosts)
        asked = {asyncio.ensure_future(_call(host.have.remote(layout, keys))): name for name, host in hosts.items()}
        if not asked:
            return "", 0
        answered, late = await asyncio.wait(asked, timeout=HAVE_TIMEOUT_S)
        for task in late:
            task.cancel()
        counts = {asked[task]: task.result() or 0 for task in answered}
        best = max(counts, key=lambda name: counts[name], default="")
        return best, counts.get(best, 0)

    async def pages(self, host: str, layout: bytes, keys: Sequence[bytes]) -> list[PageCopy]:
        handle = self.hosts.get(host)
        if handle is None:
            return []
        return await _call(asyncio.wait_for(_awaited(handle.pages.remote(layout, keys)), PAGES_TIMEOUT_S)) or []


async def _awaited(reference: Any) -> Any:
    return await reference


async def _call(answer: Any) -> Any:
    """What a host answers; None if it is gone or takes too long."""
    try:
        return await answer
    except (ray.exceptions.RayError, TimeoutError) as error:
        logger.debug("A KV host does not answer: %s", error)
        return None


def resolve(config: KVTierConfig) -> HostConfig:
    """The configuration in numbers, on the node that it is for."""
    memory = int(available_bytes() * AUTO_SHARE) if config.memory == "auto" else config.memory
    return HostConfig(memory, config.disk, config.disk_size)


def _do_nothing() -> None:
    pass


def start_hosts(application: str, config: KVTierConfig, prepare: Callable[[], None] = _do_nothing) -> dict[str, Any]:
    """The handle of the host of every living node, by node id; starts those that are missing.

    `prepare`, which must be importable there, is the first that each does in its process: its logging.
    They are detached, so that they survive whoever calls this: that one renews them, and ends them by `end_hosts`.
    """
    return {
        node["NodeID"]: ray.remote(KVHostActor)
        .options(
            name=f"kv-host:{application}:{node['NodeID']}",
            namespace=NAMESPACE,
            get_if_exists=True,
            lifetime="detached",
            num_cpus=0,
            max_restarts=-1,
            scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False),
        )
        .remote(str(host_directory(application, node)), config, prepare)
        for node in ray.nodes()
        if node["Alive"]
    }


async def next_keeper(hosts: Sequence[Any]) -> int:
    """A number for a new keeper of these hosts, above those of all keepers before it: the time in nanoseconds, or
    more where the clock has been set back since."""
    numbers = await asyncio.gather(
        *(_call(asyncio.wait_for(_awaited(host.keeper.remote()), NUMBER_TIMEOUT_S)) for host in hosts)
    )
    return max([time.time_ns(), *(number + 1 for number in numbers if number is not None)])


async def end_hosts(keeper: int, hosts: Sequence[Any]) -> None:
    """Ends those hosts that nobody but `keeper` wants, with all they keep in memory.

    One that does not answer is ended too: it is of no use as it is, and a newer keeper starts it again.
    """
    ended = await asyncio.gather(
        *(_call(asyncio.wait_for(_awaited(host.end.remote(keeper)), END_TIMEOUT_S)) for host in hosts)
    )
    for host, has_ended in zip(hosts, ended, strict=True):
        if has_ended is not False:
            ray.kill(host, no_restart=True)


def host_socket(application: str) -> Path:
    """Where the host of this process's node listens, or will."""
    here = ray.get_runtime_context().get_node_id()
    node = next(node for node in ray.nodes() if node["NodeID"] == here)
    return host_directory(application, node) / SOCKET_NAME


def host_finder(application: str) -> Callable[[], Path | None]:
    """Finds the socket of the host of this process's node, None while there is none; asks Ray only now."""
    socket = host_socket(application)
    return lambda: socket if socket.exists() else None


def host_directory(application: str, node: Mapping[str, Any]) -> Path:
    """A directory of one application on one node: among Ray's own sockets, and gone with them."""
    name = "kv-" + hashlib.blake2b(f"{application}:{node['NodeID']}".encode(), digest_size=4).hexdigest()
    directory = Path(node["RayletSocketName"]).parent / name
    if len(str(directory / SOCKET_NAME)) > _MAX_SOCKET_PATH:
        return Path(tempfile.gettempdir()) / f"manta-{name}"
    return directory
