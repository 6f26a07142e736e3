"""The store of streams, as Serve runs it: the one process that outlives the gateways whose streams it keeps.

A thin shell: what is kept, and who gets it, is `deployments.streams.table`'s.
"""

import asyncio
import time

from ray.serve.handle import DeploymentHandle

from deployments.config import StreamsConfig
from deployments.metrics_push import MetricsPusher
from deployments.streams.messages import Answer, Kept, Report
from deployments.streams.table import StreamTable
from monitoring.recorder import Delta, Recorder


class StreamStore:
    """Takes reports from every gateway and hands streams over."""

    def __init__(self, config: StreamsConfig, hub: DeploymentHandle) -> None:
        self._table = StreamTable(
            max_streams=config.max_streams,
            max_bytes=config.max_bytes,
            grace_s=config.grace_s,
            lease_s=config.lease_s,
            clock=time.monotonic,
        )
        self._recorder = Recorder()
        self._name = f"streams/{time.time_ns()}"
        self._push = hub.options(method_name="push")
        self._gauge()
        pusher = MetricsPusher(self._recorder, self._send)
        self._pushing = asyncio.get_running_loop().create_task(pusher.run())

    async def report(self, report: Report) -> Answer:
        """See `StreamTable.report`."""
        answer = self._table.report(report)
        self._gauge()
        return answer

    async def claim(self, gateway_id: str, stream_id: str) -> Kept | None:
        """See `StreamTable.claim`."""
        return self._table.claim(gateway_id, stream_id)

    def _gauge(self) -> None:
        self._recorder.set("manta:stream_journal_bytes", self._table.num_bytes)
        self._recorder.set("manta:stream_journal_streams", len(self._table))

    async def _send(self, delta: Delta) -> None:
        await self._push.remote(self._name, delta)


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
