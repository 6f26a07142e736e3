"""The backend of a gateway in a cluster: submits requests to replicas and brings their tokens back.

Owns what is between a gateway and the replicas: routing books, one link per replica, retries before a request is taken.
Knows no HTTP and no text. A request whose replica dies fails with ReplicaLost, and so does one whose replica is to go
as soon as another one is there; `deployments.continuation` goes on with it on another replica, from what has arrived.
"""

import asyncio
import contextvars
import itertools
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine
from dataclasses import replace
from typing import Any, TypeVar

from ray.exceptions import RayActorError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle

from deployments.backend import GenerationFailed, NotReady, ReplicaLost
from deployments.messages import Abort, Accepted, Attach, Frame, ModelCard, Submit, Unavailable
from deployments.router import Ledger, ReplicaGone
from deployments.token_streams import Link, TokenStream
from engine.errors import InvalidRequest
from engine.sequence import Emission, Request

logger = logging.getLogger(__name__)
T = TypeVar("T")

RETRY_AFTER_S = 0.1
SUBMIT_TIMEOUT_S = 30.0
"""How long a request may look for a replica. An engine answers between two iterations, so this is not a busy replica
but none at all."""
ATTEMPT_TIMEOUT_S = 5.0
"""How long one replica may take to accept a request: `deployments.intake` answers earlier, whatever its engine does."""
CARD_TIMEOUT_S = 2.0
ABORT_TIMEOUT_S = 20.0
TICK_S = 0.5
SILENT_TICKS = 8
"""A link without a frame for so many ticks of this gateway's own loop is broken: a living replica sends one every
second. Ticks and not seconds, because a gateway that was busy for a while has not listened either."""
FAREWELL = "%d requests leave their replica: %s"
MAX_REMEMBERED = 4096
"""Aborted requests whose late tokens are recognised."""


class _Leaving(Exception):
    """Serve has taken the replica from its list: it drains."""


class RayBackend:
    """`deployments.backend.Backend` over the handle of the replicas' deployment."""

    def __init__(self, gateway_id: str, replicas: DeploymentHandle, metrics: Callable[[], Awaitable[bytes]]) -> None:
        """`gateway_id`: a name that no other gateway process ever has. `metrics`: renders the exposition."""
        self._gateway_id = gateway_id
        self._metrics = metrics
        self._submit_call = replicas.options(method_name="submit")
        self._abort_call = replicas.options(method_name="abort")
        self._card_call = replicas.options(method_name="card")
        self._frames_call = replicas.options(method_name="frames", stream=True)
        self._ledger = Ledger()
        self._tickets = itertools.count()
        self._streams: dict[str, TokenStream] = {}
        self._links: dict[str, Link] = {}
        self._aborted: dict[str, None] = {}
        """Wire ids of the latest aborts, oldest first: tokens of theirs may still be on the way."""
        self._ended: str | None = None
        """Why no request goes on any more."""
        self._card: ModelCard | None = None
        self._background: set[asyncio.Task[Any]] = set()

    async def card(self) -> ModelCard:
        """The model that is served; asked once, then remembered. Raises NotReady while no replica has loaded it."""
        if self._card is None:
            self._card = await self._ask_card()
        return self._card

    async def ready(self) -> bool:
        """Whether some replica answers now."""
        try:
            answer = await self._ask_card()
        except NotReady:
            return False
        # The first answer stays: replicas differ in when they were created.
        self._card = self._card or answer
        return True

    async def metrics(self) -> bytes:
        return await self._metrics()

    def end(self, reason: str) -> None:
        """Ends every stream after what has arrived, and any request that comes later, with GenerationFailed."""
        self._ended = reason
        for stream in tuple(self._streams.values()):
            stream.fail(GenerationFailed(reason))

    async def generate(self, request: Request) -> AsyncGenerator[Emission, None]:
        """See `Backend.generate`."""
        # Ids of clients may repeat; on the wire every attempt has its own, so that whatever an abandoned attempt still
        # brings belongs to nobody.
        stream = await self._submit(request)
        try:
            while not stream.finished:
                for emission in await stream.take():
                    yield emission._replace(request_id=request.request_id)
        finally:
            self._close(stream)

    async def _submit(self, request: Request) -> TokenStream:
        """The stream of the replica that took the request; looks for another one when a replica is gone."""
        cost = await self._cost(request)
        try:
            async with asyncio.timeout(SUBMIT_TIMEOUT_S):
                while self._ended is None:
                    stream = await self._attempt(request, cost)
                    if stream is not None:
                        return stream
                    # Serve replaces a replica within seconds: better to wait for it than to send the client away.
                    await asyncio.sleep(RETRY_AFTER_S)
        except (TimeoutError, BackPressureError, DeploymentUnavailableError) as error:
            raise NotReady("no replica took the request") from error
        raise GenerationFailed(self._ended)

    async def _attempt(self, request: Request, cost: int) -> TokenStream | None:
        """Sends the request to one replica; None if that one turned out to be gone. Raises InvalidRequest."""
        stream = self._open(request)
        try:
            answer = await self._call(self._submit_to_any(stream, request, cost), ATTEMPT_TIMEOUT_S)
        except BaseException as error:
            if isinstance(error, TimeoutError):
                self._ledger.avoid_place_of(stream.wire_id)
            self._close(stream)
            if isinstance(error, RayActorError | TimeoutError):
                return None
            raise
        match answer:
            case Accepted():
                return stream
            case Unavailable(replica_id):
                self._close(stream)
                self._ledger.avoid(replica_id)
                return None
            case InvalidRequest():
                self._close(stream)
                raise answer

    async def _cost(self, request: Request) -> int:
        """Tokens to run at most: the prompt, what was given elsewhere, and what is still to come."""
        prompt, most = len(request.prompt_token_ids), request.params.max_tokens
        if most is None:
            most = max(0, (await self.card()).max_model_len - prompt)
        return prompt + most * len(request.open_samples)

    async def _submit_to_any(
        self, stream: TokenStream, request: Request, cost: int
    ) -> Accepted | InvalidRequest | Unavailable:
        call = Submit(replace(request, request_id=stream.wire_id), self._gateway_id, cost, self._ledger)
        answer: Accepted | InvalidRequest | Unavailable = await self._submit_call.remote(call)
        if isinstance(answer, Accepted):
            self._accepted(stream, answer.replica_id)
        return answer

    def _accepted(self, stream: TokenStream, replica_id: str) -> None:
        stream.replica_id = replica_id
        if stream.closed:
            # The client left while the request was on its way.
            self._abort(stream.wire_id, replica_id)
            return
        self._ledger.assign(stream.wire_id, replica_id)
        if not stream.finished:
            self._link(replica_id).add(stream)

    def _open(self, request: Request) -> TokenStream:
        wire_id = f"{request.request_id}@{self._gateway_id}.{next(self._tickets)}"
        stream = self._streams[wire_id] = TokenStream(wire_id, len(request.prompt_token_ids), len(request.open_samples))
        return stream

    def _close(self, stream: TokenStream) -> None:
        """Forgets a stream, and aborts its request at the replica if it has not finished there."""
        stream.closed = True
        self._streams.pop(stream.wire_id, None)
        self._ledger.release(stream.wire_id)
        link = self._links.get(stream.replica_id or "")
        if link is not None:
            link.remove(stream)
        if stream.replica_id is not None and not stream.complete and not stream.broken:
            self._abort(stream.wire_id, stream.replica_id)

    def _abort(self, wire_id: str, replica_id: str) -> None:
        self._aborted[wire_id] = None
        while len(self._aborted) > MAX_REMEMBERED:
            del self._aborted[next(iter(self._aborted))]
        call = Abort(self._gateway_id, replica_id, (wire_id,))

        async def send() -> None:
            try:
                async with asyncio.timeout(ABORT_TIMEOUT_S):
                    await self._abort_call.remote(call)
            except Exception as error:
                # The replica, or this gateway's stream there, is gone: then so is the request, now or after a grace.
                logger.debug("Abort of %s was not delivered: %s", call.request_ids, error)

        self._spawn(send())

    def _link(self, replica_id: str) -> Link:
        link = self._links.get(replica_id)
        if link is None:
            link = self._links[replica_id] = Link(replica_id)
            self._spawn(self._read(link))
        return link

    async def _read(self, link: Link) -> None:
        """Follows one replica's frames while requests of ours run there."""
        failure = "the replica closed the stream"
        planned = False
        try:
            while link.streams:
                await self._read_stream(link)
        except _Leaving:
            failure, planned = f"replica {link.replica_id} is to go", True
        except (ReplicaGone, RayActorError):
            failure = f"replica {link.replica_id} is gone"
        except TimeoutError:
            failure = f"replica {link.replica_id} sent nothing for {SILENT_TICKS * TICK_S:.0f} s"
        except Exception as error:
            failure = f"the stream of replica {link.replica_id} broke: {error}"
        finally:
            del self._links[link.replica_id]
            if link.streams:
                logger.log(logging.INFO if planned else logging.WARNING, FAREWELL, len(link.streams), failure)
                self._ledger.forget(link.replica_id)
                # Serve's router may list it for a while, and without debts it would come first.
                self._ledger.avoid(link.replica_id)
            for stream in tuple(link.streams.values()):
                stream.fail(ReplicaLost(failure, planned=planned))

    async def _read_stream(self, link: Link) -> None:
        """Reads until the replica ends the stream, which it does when it has had no request of ours for a while.

        Raises _Leaving once the replica is to go and its streams can go on elsewhere. There is always a next frame to
        look at this after: a replica with requests sends one every second.
        """
        frames = self._frames_call.remote(Attach(self._gateway_id, link.replica_id))
        try:
            while True:
                frame = await _heard(anext(frames, None))
                if frame is None:
                    return
                self._demultiplex(frame)
                if self._ledger.is_leaving(link.replica_id) and (not link.streams or self._ledger.has_place()):
                    raise _Leaving
        except BaseException:
            frames.cancel()
            raise

    def _demultiplex(self, frame: Frame) -> None:
        link = self._links.get(frame.replica_id)
        for emission in frame.emissions:
            stream = self._streams.get(emission.request_id)
            if stream is None:
                self._disown(emission, frame.replica_id)
                continue
            self._ledger.spend(stream.wire_id, stream.put(emission))
            if stream.complete and link is not None:
                link.remove(stream)
        self._ledger.observe(frame.replica_id, frame.stats.num_outstanding_tokens)

    def _disown(self, emission: Emission, replica_id: str) -> None:
        """Stops a request that nobody waits for: an attempt that was given up although its replica had taken it."""
        if emission.finish_reason is None and emission.request_id not in self._aborted:
            self._abort(emission.request_id, replica_id)

    async def _ask_card(self) -> ModelCard:
        async def ask() -> ModelCard:
            card: ModelCard = await self._card_call.remote()
            return card

        try:
            return await self._call(ask(), CARD_TIMEOUT_S)
        except (TimeoutError, RayActorError, BackPressureError, DeploymentUnavailableError) as error:
            raise NotReady("the model is loading") from error

    async def _call(self, call: Coroutine[Any, Any, T], timeout_s: float) -> T:
        """Awaits a call that goes on by itself when its caller is cancelled."""

        async def bounded() -> T:
            async with asyncio.timeout(timeout_s):
                return await call

        return await asyncio.shield(self._spawn(bounded()))

    def _spawn(self, coroutine: Coroutine[Any, Any, T]) -> "asyncio.Task[T]":
        # In a context of its own: Serve cancels the calls that were made in the context of an HTTP request when that
        # request ends, and a link serves many.
        task = asyncio.get_running_loop().create_task(coroutine, context=contextvars.Context())
        self._background.add(task)
        task.add_done_callback(self._background.discard)
        return task


async def _heard(coming: Awaitable[T]) -> T:
    """What is awaited. Raises TimeoutError after SILENT_TICKS of this loop without it."""
    task = asyncio.ensure_future(coming)
    try:
        for _ in range(SILENT_TICKS):
            done, _ = await asyncio.wait({task}, timeout=TICK_S)
            if done:
                return task.result()
        raise TimeoutError
    finally:
        task.cancel()
