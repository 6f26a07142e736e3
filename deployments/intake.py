"""How a request comes to a replica's engine: who is told when, and what becomes of one that the engine then refuses.

An engine looks at what is new between two iterations, and one over a long prompt may take many seconds. Whoever sends a
request takes a replica for lost before that, so a request that waits counts as taken; a refusal then leaves as its
stream's end. Knows neither Ray nor what the answers are called.
"""

import asyncio
from functools import partial
from typing import Any

from deployments.engine_thread import EngineStopped, EngineThread
from deployments.links import FrameStreams
from engine.sequence import Emission, FinishReason, Request

PATIENCE_S = 2.0
"""How long a request waits for the engine's own answer. Well below `ray_backend.ATTEMPT_TIMEOUT_S`."""


class Intake:
    """Brings requests to an engine, and their owners to its streams. Runs on one event loop."""

    def __init__(self, engine: EngineThread[Any], streams: FrameStreams, *, patience_s: float = PATIENCE_S) -> None:
        self._engine = engine
        self._streams = streams
        self._patience_s = patience_s

    async def take(self, gateway_id: str, request: Request) -> None:
        """Queues a request whose emissions go to this gateway; returns once the engine has it, or is not through with
        its iteration for so long that it surely will.

        Raises what `EngineThread.add` fails with; the request is forgotten then.
        """
        self._streams.announce(gateway_id, request)
        queued = asyncio.wrap_future(self._engine.add(request))
        try:
            await asyncio.wait({queued}, timeout=self._patience_s)
            if queued.done():
                queued.result()
            else:
                queued.add_done_callback(partial(self._settle, request))
        except BaseException:
            queued.cancel()
            self._streams.forget([request.request_id])
            self._engine.abort([request.request_id])
            raise

    def _settle(self, request: Request, queued: "asyncio.Future[None]") -> None:
        """The engine's answer to a request that counted as taken."""
        error = None if queued.cancelled() else queued.exception()
        if error is None:
            return
        # An engine that ends has not begun with it: another one can go on.
        stopped = isinstance(error, EngineStopped)
        reason, text = (FinishReason.MOVED, None) if stopped else (FinishReason.ERROR, str(error))
        self._streams.publish(
            [Emission(request.request_id, sample, finish_reason=reason, error=text) for sample in request.open_samples]
        )
