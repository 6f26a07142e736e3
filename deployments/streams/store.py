"""The store of streams, as Serve runs it: the one process that outlives the gateways whose streams it keeps.

A thin shell: what is kept, and who gets it, is `deployments.streams.table`'s. In an update the next one takes all of it
over before it calls itself started; from then on this one refuses, and gateways ask again until they reach the other.
"""

import asyncio
import logging
import time

from ray import serve
from ray.serve._private.common import ReplicaState
from ray.serve.handle import DeploymentHandle

from deployments.config import StreamsConfig
from deployments.metrics_push import MetricsPusher
from deployments.streams.messages import Answer, Entry, Kept, Report
from deployments.streams.table import StreamTable
from monitoring.recorder import Delta, Recorder

logger = logging.getLogger(__name__)

HAND_OVER_S = 10.0
"""For the store before this one to say what it keeps."""
REFUSE_S = 30.0
"""How long a store refuses that has handed everything over. It is gone long before, unless its successor has failed."""


class HandedOver(Exception):
    """Another store keeps the streams now."""


class StreamStore:
    """Takes reports from every gateway and hands streams over."""

    # Serve awaits the constructor of a deployment, which Python's typing does not know of.
    async def __init__(self, config: StreamsConfig, hub: DeploymentHandle) -> None:  # type: ignore[misc]
        """Returns once it has what the store before it kept, if there is one."""
        self._table = StreamTable(
            max_streams=config.max_streams,
            max_bytes=config.max_bytes,
            grace_s=config.grace_s,
            lease_s=config.lease_s,
            clock=time.monotonic,
        )
        self._refuses_until = 0.0
        self._recorder = Recorder()
        self._name = f"streams/{time.time_ns()}"
        self._push = hub.options(method_name="push")
        try:
            self._table.inherit(await self._predecessors())
        except Exception:
            logger.exception("The streams of the store before this one are lost")
        self._gauge()
        pusher = MetricsPusher(self._recorder, self._send)
        self._pushing = asyncio.get_running_loop().create_task(pusher.run())

    async def report(self, report: Report) -> Answer:
        """See `StreamTable.report`. Raises HandedOver."""
        self._check()
        answer = self._table.report(report)
        self._gauge()
        return answer

    async def claim(self, gateway_id: str, stream_id: str) -> Kept | None:
        """See `StreamTable.claim`. Raises HandedOver."""
        self._check()
        return self._table.claim(gateway_id, stream_id)

    async def hand_over(self, successor: str) -> tuple[Entry, ...]:
        """Everything, for the store of that name; from now on this one refuses."""
        if successor == self._name:
            return ()
        self._refuses_until = time.monotonic() + REFUSE_S
        return self._table.entries()

    def _check(self) -> None:
        if time.monotonic() < self._refuses_until:
            raise HandedOver("another store keeps the streams now")

    async def _predecessors(self) -> tuple[Entry, ...]:
        context = serve.get_replica_context()
        if not await asyncio.to_thread(_is_running, context.app_name, context.deployment):
            return ()
        handle = serve.get_deployment_handle(context.deployment, context.app_name)
        async with asyncio.timeout(HAND_OVER_S):
            entries: tuple[Entry, ...] = await handle.hand_over.remote(self._name)
        logger.info("%d streams are those of the store before this one", len(entries))
        return entries

    def _gauge(self) -> None:
        self._recorder.set("manta:stream_journal_bytes", self._table.num_bytes)
        self._recorder.set("manta:stream_journal_streams", len(self._table))

    async def _send(self, delta: Delta) -> None:
        await self._push.remote(self._name, delta)


def _is_running(application: str, deployment: str) -> bool:
    """Whether Serve has a replica of it that takes calls."""
    found = serve.status().applications.get(application)
    states = {} if found is None else found.deployments[deployment].replica_states
    return states.get(ReplicaState.RUNNING, 0) > 0


class StreamStoreHandle:
    """The store behind its Serve handle: `deployments.streams.keeper.StoreClient`."""

    def __init__(self, store: DeploymentHandle) -> None:
        self._report = store.options(method_name="report")
        self._claim = store.options(method_name="claim")

    async def report(self, report: Report) -> Answer:
        answer: Answer = await self._report.remote(report)
        return answer

    async def claim(self, gateway_id: str, stream_id: str) -> Kept | None:
        kept: Kept | None = await self._claim.remote(gateway_id, stream_id)
        return kept
