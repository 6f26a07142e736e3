"""Keeps a KV host on every node while the application lives, as Serve runs it, and reports what the hosts do.

Owns the lease of the hosts. They survive a crash of this process, which Serve replaces: the next one takes them over.
They end with the application: Serve lets this one say goodbye, and if it cannot, the lease runs out. In an update its
successor has them before that, and the goodbye is of no account. Ray's control plane may hang meanwhile, and so may any
host: neither may cost the others their lease.
"""

import asyncio
import logging
import os
import time
from functools import partial
from typing import Any

import ray
from ray import serve
from ray.serve.handle import DeploymentHandle

from cluster.config import KVTierConfig
from cluster.kv.stats import HostStats
from cluster.kv_host import end_hosts, next_keeper, start_hosts
from deployments.logs import configure_logging
from deployments.metrics_push import MetricsPusher
from monitoring.recorder import Delta, Recorder

logger = logging.getLogger(__name__)

PERIOD_S = 1.0
LOOK_EVERY_S = 5.0
"""Between two looks for nodes without a host: one whose host cannot start is not to be kept busy with that."""
TAKE_OVER_S = 5.0
"""For all hosts to hear of a new keeper before it calls itself started."""
ANSWER_TIMEOUT_S = 10.0
"""For a host to answer; one that starts again after a crash reads its disk first."""
MOST_MISSED = 3
"""Answers in a row that a host may owe before it is ended, so that Ray starts it again: as many as Serve allows. One
that hangs would otherwise do so for ever, and its node would be without."""
MOST_MISSED_AT_START = 12
"""The same for one that has not answered yet: it may look through a large disk."""
_NODE_LABEL = 12
"""Characters of a node's id: enough to tell nodes apart."""

_TOTALS = {
    "manta:kv_host_evictions_total": "evictions_total",
    "manta:kv_host_demotions_total": "demotions_total",
    "manta:kv_host_promotions_total": "promotions_total",
    "manta:kv_host_pages_received_total": "received_total",
    "manta:kv_host_pages_served_total": "served_total",
    "manta:kv_host_pages_corrupt_total": "corrupt_total",
    "manta:kv_host_disk_errors_total": "disk_errors_total",
}
_GAUGES = {
    "manta:kv_host_memory_bytes": "memory_bytes",
    "manta:kv_host_memory_pages": "memory_pages",
    "manta:kv_host_disk_bytes": "disk_bytes",
    "manta:kv_host_disk_pages": "disk_pages",
    "manta:kv_host_clients": "clients",
}


class HostMeter:
    """Turns the snapshots of all hosts into gauges and increments."""

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder
        self._last: dict[str, HostStats] = {}

    def update(self, node: str, stats: HostStats) -> None:
        """Records what changed at one host since its previous snapshot, the first of which counts for nothing."""
        last = self._last.get(node, stats)
        self._last[node] = stats
        for name, field in _GAUGES.items():
            self._recorder.set(name, getattr(stats, field), (node,))
        for name, field in _TOTALS.items():
            now, before = getattr(stats, field), getattr(last, field)
            # A host that was started again counts from 0.
            if grown := now - before if now >= before else now:
                self._recorder.increment(name, grown, (node,))

    def forget(self, node: str) -> None:
        """The node is gone."""
        if self._last.pop(node, None) is not None:
            for name in _GAUGES:
                self._recorder.unset(name, (node,))


class Silences:
    """Which hosts owe answers, and when that is too long. Pure."""

    def __init__(self) -> None:
        self._missed: dict[str, int] = {}
        """Node -> answers owed in a row."""
        self._started: set[str] = set()
        """Nodes whose hosts have answered since they were last started."""
        self._said: set[str] = set()
        """Nodes whose hosts did not answer when last asked, which has been said."""

    def answered(self, node: str) -> None:
        self._missed[node] = 0
        self._started.add(node)
        self._said.discard(node)

    def timed_out(self, node: str) -> bool:
        """The host is there and says nothing; whether to end it, after which it is another one."""
        self._missed[node] = self._missed.get(node, 0) + 1
        if self._missed[node] < (MOST_MISSED if node in self._started else MOST_MISSED_AT_START):
            return False
        self.gone(node)
        return True

    def gone(self, node: str) -> None:
        """There is no host now: Ray starts it again, or the node is gone too."""
        self._missed.pop(node, None)
        self._started.discard(node)

    def is_news(self, node: str) -> bool:
        """Whether nobody has been told yet that this host does not answer."""
        known = node in self._said
        self._said.add(node)
        return not known


class KVHosts:
    """The keeper of the application's KV hosts."""

    # Serve awaits the constructor of a deployment, which Python's typing does not know of.
    async def __init__(self, config: KVTierConfig, hub: DeploymentHandle) -> None:  # type: ignore[misc]
        """Returns once every node has been given its host, which may not listen yet, and those that do have been told
        that this is their keeper now: none before it may end them any more."""
        configure_logging("kv hosts")
        self._config = config
        self._application = serve.get_replica_context().app_name
        self._keeper = time.time_ns()
        self._hosts: dict[str, Any] = {}
        self._renewals: dict[str, asyncio.Task[None]] = {}
        """Node -> its host is being asked."""
        self._silences = Silences()
        recorder = Recorder()
        self._meter = HostMeter(recorder)
        push = hub.options(method_name="push")
        source = f"kv-hosts-{self._keeper}/{os.getpid()}"

        async def send(delta: Delta) -> None:
            await push.remote(source, delta)

        self._hosts = await asyncio.to_thread(self._start)
        await self._take_over()
        work = (self._keep(), self._look(), MetricsPusher(recorder, send).run())
        self._tasks = [asyncio.get_running_loop().create_task(each) for each in work]

    def _start(self) -> dict[str, Any]:
        return start_hosts(self._application, self._config, partial(configure_logging, "kv host"))

    async def _look(self) -> None:
        """Finds nodes that have come or gone. By itself, as the control plane may take for ever to answer."""
        while True:
            await asyncio.sleep(LOOK_EVERY_S)
            try:
                hosts = await asyncio.to_thread(self._start)
            except Exception:
                logger.exception("Ray does not say which nodes there are")
                continue
            known, self._hosts = self._hosts, hosts
            for node in known.keys() - hosts.keys():
                self._meter.forget(node[:_NODE_LABEL])

    async def _take_over(self) -> None:
        try:
            self._keeper = await next_keeper(list(self._hosts.values()))
        except Exception:
            logger.exception("The KV hosts do not say which keeper they have")
        self._renew_all()
        if self._renewals:
            await asyncio.wait(self._renewals.values(), timeout=TAKE_OVER_S)

    async def _keep(self) -> None:
        """Renews every host, each by itself."""
        while True:
            await asyncio.sleep(PERIOD_S)
            self._renew_all()

    def _renew_all(self) -> None:
        for node, host in self._hosts.items():
            if node not in self._renewals:
                self._renewals[node] = asyncio.create_task(self._renew(node, host))

    async def _renew(self, node: str, host: Any) -> None:
        try:
            await self._ask(node, host)
        except Exception:
            logger.exception("The KV host of node %s cannot be looked after", node[:_NODE_LABEL])
        finally:
            del self._renewals[node]

    async def _ask(self, node: str, host: Any) -> None:
        others = {name: other for name, other in self._hosts.items() if name != node}
        try:
            async with asyncio.timeout(ANSWER_TIMEOUT_S):
                stats = await host.renew.remote(self._keeper, self._config, others)
            self._silences.answered(node)
            if node in self._hosts:
                self._meter.update(node[:_NODE_LABEL], stats)
        except ray.exceptions.RayError as error:
            self._silences.gone(node)
            self._missing(node, _why(error))
        except TimeoutError:
            self._missing(node, f"nothing in {ANSWER_TIMEOUT_S:.0f} s")
            if self._silences.timed_out(node):
                logger.warning("The KV host of node %s is ended and started again", node[:_NODE_LABEL])
                await asyncio.to_thread(ray.kill, host, no_restart=False)

    def _missing(self, node: str, reason: str) -> None:
        self._meter.forget(node[:_NODE_LABEL])
        if self._silences.is_news(node):
            logger.warning("The KV host of node %s does not answer: %s", node[:_NODE_LABEL], reason)

    async def __del__(self) -> None:
        # Serve awaits this at the end of a graceful shutdown.
        for task in (*getattr(self, "_tasks", ()), *self._renewals.values()):
            task.cancel()
        await end_hosts(self._keeper, list(self._hosts.values()))


def _why(error: BaseException) -> str:
    """The last line of what Ray says: the exception itself, below the stack of another process."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
