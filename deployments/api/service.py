"""What every endpoint needs: the backend, the model that is served, and room for one more request."""

import asyncio
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from deployments.api.errors import ApiError
from deployments.api.meter import RequestMeter
from deployments.api.schema import Generate
from deployments.backend import Backend
from deployments.config import GatewayConfig
from deployments.messages import ModelCard
from deployments.text import TextModel
from monitoring.recorder import Recorder

log = logging.getLogger(__name__)

LONG_TEXT = 8_000
"""Characters from which on tokenizing takes milliseconds, and moves off the event loop."""
MAX_UNKNOWN_FIELDS = 100
"""Names of unknown fields that are logged, each once, in the life of a gateway."""


@dataclass(frozen=True, slots=True)
class Served:
    """The model behind the API."""

    card: ModelCard
    text: TextModel

    async def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        if len(text) < LONG_TEXT:
            return self.text.encode(text, add_special_tokens=add_special_tokens)
        return await asyncio.to_thread(self.text.encode, text, add_special_tokens=add_special_tokens)


class Service:
    """Shared by all requests of one gateway process."""

    def __init__(
        self,
        backend: Backend,
        config: GatewayConfig,
        recorder: Recorder,
        load_text: Callable[[str], TextModel],
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """`load_text` reads the text side of a model directory; it runs in a thread, once per directory."""
        self.backend = backend
        self.config = config
        self._recorder = recorder
        self._load_text = load_text
        self._clock = clock
        self._served: Served | None = None
        self._loading = asyncio.Lock()
        self._num_live = 0
        self._unknown_fields: set[str] = set()

    async def served(self) -> Served:
        """The model, its tokenizer loaded. Raises NotReady while no replica serves it, ModelError for bad files."""
        card = await self.backend.card()
        served = self._served
        if served is not None and served.card == card:
            return served
        async with self._loading:
            served = self._served
            if served is None or served.card.path != card.path:
                served = Served(card, await asyncio.to_thread(self._load_text, card.path))
            self._served = Served(card, served.text)
            return self._served

    async def model(self, name: str) -> Served:
        """The model of that name. Raises ApiError 404 for another one."""
        served = await self.served()
        if name != served.card.name:
            shown = name if len(name) <= 80 else name[:80] + "..."
            raise ApiError(
                404,
                f"the model `{shown}` does not exist; this server has `{served.card.name}`",
                param="model",
                code="model_not_found",
            )
        return served

    async def ready(self) -> bool:
        """Whether a request sent now would be served."""
        if not await self.backend.ready():
            return False
        await self.served()
        return True

    def room(self) -> int:
        """Requests that would be taken now."""
        return self.config.max_queued_requests - self._num_live

    @contextmanager
    def admitted(self) -> Iterator[None]:
        """Room for one request while it lasts. Raises ApiError 429 when there is none."""
        if self.room() <= 0:
            raise ApiError(
                429,
                f"{self._num_live} requests are being served, and no more are taken at once; try again soon",
                kind="rate_limit_error",
                code="rate_limit_exceeded",
                headers={"Retry-After": "1"},
            )
        self._num_live += 1
        try:
            yield
        finally:
            self._num_live -= 1

    def meter(self) -> RequestMeter:
        return RequestMeter(self._recorder, self._clock)

    def note_unknown_fields(self, body: Generate) -> None:
        """Logs fields that are ignored: each name once, and only so many names."""
        for name in body.unknown_fields():
            if len(self._unknown_fields) < MAX_UNKNOWN_FIELDS and name not in self._unknown_fields:
                self._unknown_fields.add(name)
                log.warning("request field %.80r is not known and was ignored", name)
