"""The HTTP ingress, as Serve runs it: builds the API over a backend that reaches the replicas through Serve.

Owns the life of the API inside a gateway process; what the API does is `deployments.gateway_app`'s.
"""

import asyncio
import logging
import secrets

from fastapi import FastAPI
from ray.serve.handle import DeploymentHandle

from deployments.config import GatewayConfig
from deployments.continuation import ContinuingBackend
from deployments.draining import DrainingBackend
from deployments.gateway_app import build_http
from deployments.logs import configure_logging
from deployments.metrics_push import MetricsPusher
from deployments.ray_backend import RayBackend
from deployments.serve_settings import hasty_proxy, missing_settings
from deployments.streams.keeper import StreamKeeper
from deployments.streams.store import StreamStoreHandle
from deployments.version import installed_version
from monitoring.recorder import Delta, Recorder

logger = logging.getLogger(__name__)


class Gateway:
    """Speaks the OpenAI API to clients and frames to replicas."""

    def __init__(
        self, config: GatewayConfig, replicas: DeploymentHandle, hub: DeploymentHandle, streams: DeploymentHandle
    ) -> None:
        configure_logging("gateway")
        self._config = config
        self._gateway_id = f"gateway-{secrets.token_hex(6)}"
        self._recorder = Recorder()
        self._push = hub.options(method_name="push")
        self._render = hub.options(method_name="render")
        self._pusher = MetricsPusher(self._recorder, self._send)
        replies = RayBackend(self._gateway_id, replicas, self._metrics)
        continuing = ContinuingBackend(
            replies,
            timeout_s=config.continuation_timeout_s,
            count=lambda reason: self._recorder.increment("manta:request_continuations_total", labels=(reason,)),
        )
        self._backend = DrainingBackend(continuing, replies.end)
        self._keeper = StreamKeeper(self._gateway_id, StreamStoreHandle(streams))
        self._pushing = asyncio.get_running_loop().create_task(self._pusher.run())
        for complaint in filter(None, (missing_settings(), hasty_proxy(config.drain_timeout_s))):
            logger.warning(complaint)

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Serve's hook for an ingress whose application exists only once its deployment does."""
        # Serve answers with the request's id by itself.
        return build_http(
            self._backend,
            self._config,
            self._recorder,
            installed_version(),
            echo_request_id=False,
            keeper=self._keeper,
        )

    async def drain(self, timeout_s: float) -> int:
        """Takes no more requests; those that run after `timeout_s` end with an error. Returns how many those were."""
        return await self._backend.drain(timeout_s)

    async def _send(self, delta: Delta) -> None:
        await self._push.remote(self._gateway_id, delta)

    async def _metrics(self) -> bytes:
        # What this gateway has counted is part of the picture it is asked for.
        await self._pusher.push()
        exposition: bytes = await self._render.remote()
        return exposition
