"""Streams that outlive the replicas they run on: an interrupted request goes on elsewhere, from what has arrived.

Owns what has come of each request so far, and how long one may wait; who is suspected of ending replicas is
`deployments.trials`'s. Knows neither Ray nor text: it stands between whoever reads emissions and a backend whose
streams may be lost.
"""

import asyncio
import logging
import secrets
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import replace

from deployments.backend import Backend, GenerationFailed, Loss, NotReady, ReplicaLost
from deployments.messages import ModelCard
from deployments.trials import Court, Suspicion, Trial
from engine.sequence import Emission, FinishReason, Request

logger = logging.getLogger(__name__)

RETRY_AFTER_S = 0.1
_REASONS = {Loss.FAILED: "lost", Loss.GONE: "lost", Loss.SILENT: "lost", Loss.MOVED: "moved", Loss.PAUSED: "paused"}


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


class _Patience:
    """How long a stream may be without a replica that goes on with it."""

    def __init__(self, timeout_s: float, clock: Callable[[], float]) -> None:
        self._timeout_s = timeout_s
        self._clock = clock
        self._since: float | None = None

    def rewarded(self) -> None:
        """A replica goes on with it."""
        self._since = None

    def left(self) -> float:
        """Seconds that it may still be without one."""
        return self._timeout_s - (0.0 if self._since is None else self._clock() - self._since)

    def interrupted(self) -> None:
        """No replica does now. Raises GenerationFailed if that has been so for too long."""
        now = self._clock()
        if self._since is None:
            self._since = now
        elif now - self._since >= self._timeout_s:
            raise GenerationFailed(f"no replica went on with the request within {self._timeout_s:.0f} s")


class ContinuingBackend:
    """A `Backend` over one whose replicas come and go: its streams end when they are finished or time is up.

    A stream whose replica is lost is sent on at once, unless it is suspected of ending replicas: see
    `deployments.trials`. One that is convicted of that fails, alone.
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
        that is interrupted: "lost", "moved" or "paused"."""
        self._backend = backend
        self._timeout_s = timeout_s
        self._count = count
        self._clock = clock
        self._court = Court()

    async def card(self) -> ModelCard:
        return await self._backend.card()

    async def ready(self) -> bool:
        return await self._backend.ready()

    async def metrics(self) -> bytes:
        return await self._backend.metrics()

    async def generate(self, request: Request) -> AsyncGenerator[Emission, None]:
        """See `Backend.generate`. Raises NotReady only before anything has come."""
        progress, suspicion = Progress(request), Suspicion()
        patience = _Patience(self._timeout_s, self._clock)
        was_taken = progress.begun
        while True:
            trial = Trial(self._court, suspicion, patience.left)
            brought = 0
            try:
                async with trial:
                    if suspicion.is_suspect:
                        await self._begin(trial)
                    async with aclosing(self._backend.generate(progress.rest())) as stream:
                        async for emission in stream:
                            if emission.finish_reason is FinishReason.MOVED:
                                raise ReplicaLost(emission.error or "", Loss.FAILED if emission.error else Loss.MOVED)
                            progress.note(emission)
                            brought += 1
                            if brought == 1:
                                trial.brought()
                                suspicion.acquit()
                                patience.rewarded()
                            yield emission
                if progress.done:
                    return
                raise GenerationFailed("the backend ended the answer before it was finished")
            except ReplicaLost as lost:
                if progress.done:
                    return
                was_taken = True
                self._count(_REASONS[lost.loss])
                suspicion.lost(lost.loss, alone=trial.alone, brought=brought)
                if suspicion.is_convicted:
                    logger.error("Request %s fails: %s with it", request.request_id, suspicion.verdict)
                    raise GenerationFailed(f"{suspicion.verdict} with this request") from lost
                patience.interrupted()
                logger.info("Request %s goes on elsewhere: %s", request.request_id, lost)
                if lost.loss is Loss.GONE and not brought:
                    # Routers may disagree for a moment about who is there.
                    await asyncio.sleep(RETRY_AFTER_S)
            except NotReady:
                if not was_taken:
                    raise
                patience.interrupted()
                await asyncio.sleep(RETRY_AFTER_S)

    async def _begin(self, trial: Trial) -> None:
        """Lets a trial's time run. Raises NotReady while no replica is there: suspects that wait for one are not tried,
        and would all be tried together when it comes."""
        if not await self._backend.ready():
            raise NotReady("no replica to try the request on")
        trial.begin()
