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
MAX_TEXTS = 4
"""Models whose tokenizers are held: the one that is served, and those whose streams came here during an update."""
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
        """`load_text` reads the text side of a model directory; it runs in a thread, once per model."""
        self.backend = backend
        self.config = config
        self._recorder = recorder
        self._load_text = load_text
        self._clock = clock
        self._texts: dict[tuple[str, str], TextModel] = {}
        """By identity and directory; the latest used last."""
        self._loading = asyncio.Lock()
        self._num_live = 0
        self._unknown_fields: set[str] = set()

    async def served(self) -> Served:
        """The model, its tokenizer loaded. Raises NotReady while no replica serves it, ModelError for bad files."""
        return await self.with_text(await self.backend.card())

    async def with_text(self, card: ModelCard) -> Served:
        """A model of that card, maybe an earlier one, its tokenizer loaded. Raises ModelError for bad files."""
        key = card.identity, card.path
        if key not in self._texts:
            async with self._loading:
                if key not in self._texts:
                    self._texts[key] = await asyncio.to_thread(self._load_text, card.path)
        text = self._texts[key] = self._texts.pop(key)
        while len(self._texts) > MAX_TEXTS:
            del self._texts[next(iter(self._texts))]
        return Served(card, text)

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
        """Requests that would be taken now; none if this is not positive."""
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
        with self.counted():
            yield

    @contextmanager
    def counted(self) -> Iterator[None]:
        """Counts a request while it lasts, even where there is no room: it was admitted when it began, maybe elsewhere.

        There are no more of those than streams are kept.
        """
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
