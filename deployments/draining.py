"""The end of a gateway that is told when: no more requests, some time for those that run, and then a last word to each.

Knows neither Ray nor HTTP: it stands between the API and a backend.
"""

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing

from deployments.backend import Backend, NotReady
from deployments.messages import ModelCard
from engine.sequence import Emission, Request

STOPPING = "the server is stopping"
LAST_WORDS_S = 2.0
"""How long requests that were ended may take to end."""


class DrainingBackend:
    """A `Backend` that can be closed."""

    def __init__(self, backend: Backend, end: Callable[[str], None]) -> None:
        """`end` makes every request that runs on `backend` fail with GenerationFailed, for the reason it is given."""
        self._backend = backend
        self._end = end
        self._running = 0
        self._draining = False
        self._idle = asyncio.Event()
        self._idle.set()

    async def card(self) -> ModelCard:
        return await self._backend.card()

    async def ready(self) -> bool:
        if self._draining:
            raise NotReady(STOPPING)
        return await self._backend.ready()

    async def metrics(self) -> bytes:
        return await self._backend.metrics()

    async def generate(self, request: Request) -> AsyncGenerator[Emission, None]:
        """See `Backend.generate`. Raises NotReady once the end has begun."""
        if self._draining:
            raise NotReady(STOPPING)
        self._running += 1
        self._idle.clear()
        try:
            async with aclosing(self._backend.generate(request)) as stream:
                async for emission in stream:
                    yield emission
        finally:
            self._running -= 1
            if not self._running:
                self._idle.set()

    async def drain(self, timeout_s: float) -> int:
        """Takes no more requests, and returns once none runs: those that still do after `timeout_s` are ended then.

        Returns how many those were. Bounded: `LAST_WORDS_S` more, whatever happens.
        """
        self._draining = True
        if await self._quiet(timeout_s):
            return 0
        cut = self._running
        self._end(STOPPING)
        await self._quiet(LAST_WORDS_S)
        return cut

    async def _quiet(self, timeout_s: float) -> bool:
        try:
            await asyncio.wait_for(self._idle.wait(), timeout_s)
        except TimeoutError:
            return False
        return True
