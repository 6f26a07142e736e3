"""One replica of the model, as Serve runs it: an engine in its thread, and the frames that leave it.

Owns the life of the engine inside Serve: loading, health, metrics, the end. Knows no HTTP and no text.
"""

import asyncio
import hashlib
import logging
import os
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from pathlib import Path
from typing import Protocol

from ray import serve
from ray.serve.handle import DeploymentHandle

from cluster.kv_host import host_finder
from deployments.engine_thread import EngineLike, EngineStopped, EngineThread
from deployments.intake import Intake
from deployments.links import FrameStreams
from deployments.logs import configure_logging
from deployments.messages import Abort, Accepted, Attach, Describe, Described, Frame, ModelCard, Submit, Unavailable
from deployments.metrics_push import MetricsPusher
from engine.ahead import begin_compiling
from engine.config import EngineConfig
from engine.errors import InvalidRequest, ModelError
from engine.models.identity import model_identity
from engine.sequence import Emission
from engine.stats import EngineStats
from monitoring.recorder import Delta, EngineMeter, Recorder

logger = logging.getLogger(__name__)

WATCH_S = 0.5


class ServedEngine(EngineLike, Protocol):
    """What a replica asks of an engine beyond running it: the facts of the model card."""

    @property
    def model_path(self) -> Path | None: ...

    @property
    def max_model_len(self) -> int: ...

    @property
    def vocab_size(self) -> int: ...

    @property
    def eos_token_ids(self) -> tuple[int, ...]: ...

    @property
    def failure(self) -> Exception | None:
        """Why it can compute no more, if so. Any thread may ask."""


FindHost = Callable[[], Path | None]
"""The socket of this node's KV host; None while there is none."""
EngineFactory = Callable[[EngineConfig, FindHost | None], ServedEngine]
"""The engine of a configuration; without a way to find a KV host it is to have none."""


def load_engine(config: EngineConfig, find_host: FindHost | None) -> ServedEngine:
    """Builds the real engine. torch is imported here, in the engine's thread, not by whoever imports this module."""
    begin_compiling(config)
    from cluster.kv.client import Bandwidth, TierClient
    from engine.build import build_engine
    from engine.kv.tier import PageMemory, Tier

    def make_tier(layout: bytes, memory: PageMemory) -> Tier:
        assert find_host is not None
        bandwidth = Bandwidth(save=config.kv.offload_bandwidth)
        return TierClient(find_host, layout, memory, name=f"replica {os.getpid()}", bandwidth=bandwidth)

    return build_engine(config, make_tier if find_host is not None and config.kv.offload else None)


def identity_of(config: EngineConfig, path: Path | None) -> str:
    """Equal for replicas of which any can go on with what another one began.

    It tells the files of the model, and what was chosen about its numbers. Not what follows from the machine, like the
    kernels: those differ by rounding, and a cluster may have several kinds of machines. Raises ModelError.
    """
    choices = (config.dtype, config.quantization, config.quantization_group, config.activations, config.kv.dtype)
    files = b"" if path is None else model_identity(path)
    return hashlib.blake2b(files + repr(choices).encode(), digest_size=16).hexdigest()


class LLMReplica:
    """Generates tokens for whichever gateways ask.

    `submit` and `abort` are short unary calls; tokens leave through `frames`, one stream per gateway.
    """

    # Serve awaits the constructor of a deployment, which Python's typing does not know of.
    async def __init__(  # type: ignore[misc]
        self,
        config: EngineConfig,
        model_name: str,
        hub: DeploymentHandle,
        engine_factory: EngineFactory,
        hosts: DeploymentHandle | None,
    ) -> None:
        """Loads the model. `hosts` is None if the nodes have no KV hosts; they are found without asking it.

        Raises ModelError, whose one line Serve shows as the reason why the deployment failed.
        """
        context = serve.get_replica_context()
        self._replica_id = context.replica_id.unique_id
        host = None if hosts is None else host_finder(context.app_name)
        configure_logging(f"replica {self._replica_id}")
        self._loop = asyncio.get_running_loop()
        self._stuck: str | None = None
        """Why this replica is to be replaced although its engine has not failed."""
        self._engine = EngineThread(lambda: engine_factory(config, host), self._deliver)
        try:
            engine = await asyncio.wrap_future(self._engine.start())
        except ModelError as error:
            raise ModelError(str(error)) from None
        self._card = ModelCard(
            name=model_name,
            path=str(engine.model_path),
            max_model_len=engine.max_model_len,
            vocab_size=engine.vocab_size,
            eos_token_ids=tuple(engine.eos_token_ids),
            created=int(time.time()),
            identity=await asyncio.to_thread(identity_of, config, engine.model_path),
        )
        self._streams = FrameStreams(self._replica_id, engine.stats(), self._engine.abort)
        self._intake = Intake(self._engine, self._streams)
        recorder = Recorder()
        self._meter = EngineMeter(recorder)
        self._meter.update(engine.stats())
        self._start_pushing(recorder, hub)
        self._watching = self._loop.create_task(self._watch(engine))

    def _start_pushing(self, recorder: Recorder, hub: DeploymentHandle) -> None:
        push = hub.options(method_name="push")

        async def send(delta: Delta) -> None:
            await push.remote(f"{self._replica_id}/{os.getpid()}", delta)

        pusher = MetricsPusher(recorder, send)
        self._metrics = self._loop.create_task(pusher.run())

    async def card(self, call: Describe) -> Described | Unavailable:
        """What the gateways must know about the model, and whose word it is; not from who takes no requests."""
        if self._stuck is not None or self._engine.failure is not None:
            return Unavailable(self._replica_id)
        return Described(self._replica_id, self._card)

    async def submit(self, call: Submit) -> Accepted | Described | InvalidRequest | Unavailable:
        """Queues a request; its emissions go to the gateway's frame stream, and wait there if it is not attached yet.

        A refusal is returned, not raised: it is an answer, and Serve would log it as a crash with its traceback.
        """
        if self._stuck is not None:
            return Unavailable(self._replica_id)
        if not self._card.fits(call.request):
            return Described(self._replica_id, self._card)
        try:
            await self._intake.take(call.gateway_id, call.request)
        except InvalidRequest as error:
            return error
        except EngineStopped:
            return Unavailable(self._replica_id)
        return Accepted(self._replica_id)

    async def abort(self, call: Abort) -> None:
        """Ends requests before the next iteration and sends nothing more for them."""
        self._streams.forget(call.request_ids)
        self._engine.abort(call.request_ids)

    async def frames(self, call: Attach) -> AsyncGenerator[Frame, None]:
        """Everything that this replica's iterations bring for one gateway."""
        async for frame in self._streams.attach(call.gateway_id):
            yield frame

    async def check_health(self) -> None:
        """Raises once the engine has failed or is stuck, so that Serve replaces this replica."""
        if self._engine.failure is not None:
            raise EngineStopped(f"the engine failed: {self._engine.failure}")
        if self._stuck is not None:
            raise EngineStopped(self._stuck)

    async def _watch(self, engine: ServedEngine) -> None:
        """Waits for the engine to be stuck, or to fail while it has nothing to do; then its streams go on elsewhere,
        and this replica takes no more."""
        while self._stuck is None:
            await asyncio.sleep(WATCH_S)
            if engine.failure is not None:
                self._stuck = f"the engine failed: {engine.failure}"
            elif (seconds := self._engine.stuck_for()) is not None:
                self._stuck = f"the engine is stuck: an iteration has taken {seconds:.1f} s"
        logger.error("%s; %d requests go on elsewhere", self._stuck, self._streams.num_requests)
        self._streams.give_up(self._stuck)

    def _deliver(self, emissions: Sequence[Emission], stats: EngineStats) -> None:
        # On the engine's thread. One hand-over per iteration, however many requests it served. When the loop is
        # closed there is nobody left to tell.
        try:
            self._loop.call_soon_threadsafe(self._publish, emissions, stats)
        except RuntimeError:
            logger.debug("The event loop is closed; the last iteration is dropped")

    def _publish(self, emissions: Sequence[Emission], stats: EngineStats) -> None:
        self._meter.update(stats)
        self._streams.publish(emissions, stats)

    async def __del__(self) -> None:
        # Serve awaits this at the end of a graceful shutdown.
        for name in ("_metrics", "_watching"):
            task = getattr(self, name, None)
            if task is not None:
                task.cancel()
        engine = getattr(self, "_engine", None)
        if engine is not None:
            await asyncio.to_thread(engine.close)
