"""Streams that outlive the replicas they run on: an interrupted request goes on elsewhere, from what has arrived.

Owns what has come of each request so far, and the rule for requests that replicas do not survive. Knows neither Ray nor
text: it stands between whoever reads emissions and a backend whose streams may be lost.
"""

import asyncio
import logging
import secrets
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import AsyncExitStack, aclosing
from dataclasses import replace

from deployments.backend import Backend, GenerationFailed, NotReady, ReplicaLost
from deployments.messages import ModelCard
from engine.sequence import Emission, FinishReason, Request

logger = logging.getLogger(__name__)

RETRY_AFTER_S = 0.1
SUSPECT_LOSSES = 2
"""Replicas in a row that were lost before a request brought a token there; the next one has it as its only suspect."""


class Progress:
    """What has come of a request: all that another replica needs to go on with it."""

    def __init__(self, request: Request) -> None:
        """`request` may go on from tokens that came elsewhere."""
        # Drawn here and not at the replica: the next one must draw the same.
        seed = secrets.randbits(63) if request.params.seed is None else request.params.seed
        params = request.params.model_copy(update={"seed": seed})
        self._request = replace(request, params=params, given=(), num_scored=0)
        given = request.given or ((),) * request.params.n
        self._tokens: list[list[int]] = [list(tokens or ()) for tokens in given]
        self._open = set(request.open_samples)
        self._num_scored = request.num_scored

    @property
    def done(self) -> bool:
        return not self._open

    @property
    def begun(self) -> bool:
        return any(self._tokens) or self._num_scored > 0 or len(self._open) < len(self._tokens)

    def note(self, emission: Emission) -> None:
        """Takes what an emission brought into account. A finished sample brings nothing more."""
        assert emission.sample_index in self._open, "the sample is finished"
        self._tokens[emission.sample_index].extend(emission.token_ids)
        self._num_scored += len(emission.prompt_logprobs)
        if emission.finish_reason is not None:
            self._open.remove(emission.sample_index)

    def rest(self) -> Request:
        """The request for what is still to come."""
        if not self.begun:
            return self._request
        given = tuple(tuple(tokens) if sample in self._open else None for sample, tokens in enumerate(self._tokens))
        return replace(self._request, given=given, num_scored=self._num_scored)


class ContinuingBackend:
    """A `Backend` over one whose replicas come and go: its streams end when they are finished or time is up.

    A stream whose replica is lost is sent on at once. Who was lost twice in a row without a token may be what ends
    replicas: such requests are tried one at a time, and one that takes a third replica with it fails, alone.
    """

    def __init__(
        self,
        backend: Backend,
        *,
        timeout_s: float,
        count: Callable[[str], None] = lambda _: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`timeout_s`: how long a stream may wait for a replica that goes on with it. `count` is told of every stream
        that is interrupted: "lost" or "moved"."""
        self._backend = backend
        self._timeout_s = timeout_s
        self._count = count
        self._clock = clock
        self._trial = asyncio.Lock()

    async def card(self) -> ModelCard:
        return await self._backend.card()

    async def ready(self) -> bool:
        return await self._backend.ready()

    async def metrics(self) -> bytes:
        return await self._backend.metrics()

    async def generate(self, request: Request) -> AsyncGenerator[Emission, None]:
        """See `Backend.generate`. Raises NotReady only before anything has come."""
        progress = Progress(request)
        losses = 0
        waiting_since: float | None = None
        while True:
            brought = 0
            try:
                async with AsyncExitStack() as trial:
                    if losses >= SUSPECT_LOSSES:
                        await trial.enter_async_context(self._trial)
                    async with aclosing(self._backend.generate(progress.rest())) as stream:
                        async for emission in stream:
                            if emission.finish_reason is FinishReason.MOVED:
                                raise ReplicaLost(emission.error or "", planned=emission.error is None)
                            progress.note(emission)
                            if not brought:
                                await trial.aclose()
                            brought += 1
                            yield emission
                if progress.done:
                    return
                raise GenerationFailed("the backend ended the answer before it was finished")
            except ReplicaLost as lost:
                if progress.done:
                    return
                self._count("moved" if lost.planned else "lost")
                losses = 0 if brought or lost.planned else losses + 1
                if losses > SUSPECT_LOSSES:
                    logger.error("Request %s fails: %d replicas in a row were lost with it", request.request_id, losses)
                    raise GenerationFailed(f"{losses} replicas in a row were lost with this request") from lost
                waiting_since = None
                logger.info("Request %s goes on elsewhere: %s", request.request_id, lost)
            except NotReady:
                if not progress.begun and losses == 0:
                    raise
                now = self._clock()
                waiting_since = now if waiting_since is None else waiting_since
                if now - waiting_since >= self._timeout_s:
                    raise GenerationFailed(
                        f"no replica went on with the request within {self._timeout_s:.0f} s"
                    ) from None
                await asyncio.sleep(RETRY_AFTER_S)
