"""The backend of a gateway in a cluster: submits requests to replicas and brings their tokens back.

Owns what is between a gateway and the replicas: routing books, one link per replica, retries before a request is taken.
Which replicas there are and what they serve is `deployments.roster`'s. Knows no HTTP and no text. A request whose
replica dies fails with ReplicaLost, and so does one whose replica is to go as soon as another one can go on with it;
`deployments.continuation` sees to that, from what has arrived.
"""

import asyncio
import itertools
import logging
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from dataclasses import replace

from ray.exceptions import RayActorError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle

from deployments.backend import GenerationFailed, Loss, ModelGone, NotReady, ReplicaLost
from deployments.background import Background
from deployments.latest import Latest
from deployments.messages import Abort, Accepted, Attach, Described, Frame, ModelCard, Submit, Unavailable
from deployments.roster import Roster
from deployments.router import Ledger
from deployments.silence import heard, meaning
from deployments.token_streams import Link, TokenStream
from engine.errors import InvalidRequest
from engine.sequence import Emission, Request

logger = logging.getLogger(__name__)

RETRY_AFTER_S = 0.1
SUBMIT_TIMEOUT_S = 30.0
"""How long a request may look for a replica. An engine answers between two iterations, so this is not a busy replica
but none at all."""
ATTEMPT_TIMEOUT_S = 5.0
"""How long one replica may take to accept a request: `deployments.intake` answers earlier, whatever its engine does."""
MOST_DEATHS = 2
"""Replicas that may die with a request on its way to them before that is held against it. One that is killed dies with
all that are on their way, and routers may not know of that at once."""
ABORT_TIMEOUT_S = 20.0
FAREWELL = "%d requests leave their replica: %s"
LOOK_S = 0.25
"""How often it is asked who can go on with the streams of a replica that is to go."""
MAX_REMEMBERED = 4096
"""Aborted requests, and links that broke, of which something may still come."""

Answer = Accepted | Described | InvalidRequest | Unavailable


class _Leaving(Exception):
    """Serve has taken the replica from its list: it drains. All its streams have left."""


class RayBackend:
    """`deployments.backend.Backend` over the handle of the replicas' deployment."""

    def __init__(self, gateway_id: str, replicas: DeploymentHandle, metrics: Callable[[], Awaitable[bytes]]) -> None:
        """`gateway_id`: a name that no other gateway process ever has. `metrics`: renders the exposition."""
        self._gateway_id = gateway_id
        self._era = 0
        """Links of ours that have broken so far; see `_break`."""
        self._metrics = metrics
        self._submit_call = replicas.options(method_name="submit")
        self._abort_call = replicas.options(method_name="abort")
        self._frames_call = replicas.options(method_name="frames", stream=True)
        self._ledger = Ledger()
        self._background = Background()
        self._roster = Roster(replicas, self._ledger, self._background)
        self._tickets = itertools.count()
        self._streams: dict[str, TokenStream] = {}
        self._links: dict[tuple[str, str], Link] = {}
        """By replica, and by the name that it knows this gateway by."""
        self._broken: Latest[tuple[str, str]] = Latest(MAX_REMEMBERED)
        """Links that broke."""
        self._aborted: Latest[str] = Latest(MAX_REMEMBERED)
        """Wire ids: tokens of theirs may still be on the way."""
        self._ended: str | None = None
        """Why no request goes on any more."""

    async def card(self) -> ModelCard:
        return await self._roster.card()

    async def ready(self) -> bool:
        return await self._roster.has_ready()

    async def metrics(self) -> bytes:
        return await self._metrics()

    def end(self, reason: str) -> None:
        """Ends every stream after what has arrived, and any request that comes later, with GenerationFailed."""
        self._ended = reason
        for stream in tuple(self._streams.values()):
            stream.fail(GenerationFailed(reason))

    async def generate(self, request: Request) -> AsyncGenerator[Emission, None]:
        """See `Backend.generate`. Raises ModelGone once all replicas serve another model than the request is for."""
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
        died: set[str] = set()
        try:
            async with asyncio.timeout(SUBMIT_TIMEOUT_S):
                while self._ended is None:
                    self._roster.look_around()
                    if self._roster.is_gone(request.model):
                        raise ModelGone("the model that the request was made for has been replaced by another one")
                    stream = await self._attempt(request, cost, died)
                    if stream is not None:
                        return stream
                    if len(died) >= MOST_DEATHS:
                        raise ReplicaLost(f"{len(died)} replicas died before they took the request")
                    # Serve replaces a replica within seconds: better to wait for it than to send the client away.
                    await asyncio.sleep(RETRY_AFTER_S)
        except (TimeoutError, BackPressureError, DeploymentUnavailableError) as error:
            raise NotReady("no replica took the request") from error
        raise GenerationFailed(self._ended)

    async def _attempt(self, request: Request, cost: int, died: set[str]) -> TokenStream | None:
        """Sends the request to one replica; None if that one cannot take it, or is gone. Raises InvalidRequest.

        A replica that dies meanwhile is added to `died`.
        """
        stream = self._open(request)
        try:
            answer = await self._background.call(self._submit_to_any(stream, request, cost), ATTEMPT_TIMEOUT_S)
        except BaseException as error:
            if isinstance(error, RayActorError | TimeoutError):
                place = self._ledger.avoid_place_of(stream.wire_id)
                if isinstance(error, RayActorError) and place is not None:
                    died.add(place)
            self._close(stream)
            if isinstance(error, RayActorError | TimeoutError):
                return None
            raise
        if isinstance(answer, Accepted):
            return stream
        self._close(stream)
        match answer:
            case Unavailable(replica_id):
                self._ledger.avoid(replica_id)
            case Described(replica_id, card):
                logger.info("Request %s is not for replica %s: %s", request.request_id, replica_id, card)
                self._roster.cards.note(replica_id, card)
            case InvalidRequest():
                raise answer
        return None

    async def _cost(self, request: Request) -> int:
        """Tokens to run at most: the prompt, what was given elsewhere, and what is still to come."""
        prompt, most = len(request.prompt_token_ids), request.params.max_tokens
        if most is None:
            most = max(0, (await self._roster.card()).max_model_len - prompt)
        return prompt + most * len(request.open_samples)

    async def _submit_to_any(self, stream: TokenStream, request: Request, cost: int) -> Answer:
        sent = replace(request, request_id=stream.wire_id)
        call = Submit(sent, stream.caller, cost, self._ledger, self._roster.cards.unfit(request))
        answer: Answer = await self._submit_call.remote(call)
        if isinstance(answer, Accepted):
            self._accepted(stream, answer.replica_id)
        return answer

    def _accepted(self, stream: TokenStream, replica_id: str) -> None:
        stream.replica_id = replica_id
        if stream.closed:
            # The client left while the request was on its way.
            self._abort(replica_id, stream.wire_id)
            return
        self._ledger.assign(stream.wire_id, replica_id)
        if stream.finished or stream.broken:
            return
        if (replica_id, stream.caller) in self._broken:
            # It was running before that was known here, and what it brought may have been lost.
            self._give_up(stream, f"the link to replica {replica_id} broke", Loss.GONE)
            self._abort(replica_id, stream.wire_id)
            return
        self._link(replica_id, stream.caller).add(stream)

    def _open(self, request: Request) -> TokenStream:
        wire_id = f"{request.request_id}@{self._gateway_id}.{next(self._tickets)}"
        stream = self._streams[wire_id] = TokenStream(wire_id, request, f"{self._gateway_id}/{self._era}")
        # A router may place the request after it was given up, be it by a client that left or for lack of an answer.
        self._ledger.expect(wire_id)
        return stream

    def _close(self, stream: TokenStream) -> None:
        """Forgets a stream, and aborts its request at the replica if it has not finished there."""
        stream.closed = True
        self._let_go(stream)
        if stream.replica_id is not None and not stream.complete and not stream.broken:
            self._abort(stream.replica_id, stream.wire_id)

    def _give_up(self, stream: TokenStream, reason: str, loss: Loss) -> None:
        """Ends a stream after what has arrived; what its replica still sends for it belongs to nobody."""
        self._let_go(stream)
        stream.fail(ReplicaLost(reason, loss))

    def _let_go(self, stream: TokenStream) -> None:
        self._streams.pop(stream.wire_id, None)
        self._ledger.release(stream.wire_id)
        link = self._links.get((stream.replica_id or "", stream.caller))
        if link is not None:
            link.remove(stream)

    def _abort(self, replica_id: str, *wire_ids: str) -> None:
        self._aborted.add(*wire_ids)
        call = Abort(self._gateway_id, replica_id, wire_ids)

        async def send() -> None:
            try:
                async with asyncio.timeout(ABORT_TIMEOUT_S):
                    await self._abort_call.remote(call)
            except Exception as error:
                # The replica, or this gateway's stream there, is gone: then so is the request, now or after a grace.
                logger.debug("Abort of %s was not delivered: %s", call.request_ids, error)

        self._background.spawn(send())

    def _link(self, replica_id: str, caller: str) -> Link:
        link = self._links.get((replica_id, caller))
        if link is None:
            link = self._links[replica_id, caller] = Link(replica_id, caller)
            self._background.spawn(self._read(link))
        return link

    def _break(self, link: Link) -> None:
        """Nothing is read from this link any more, and frames of it may be lost.

        The replica may live nevertheless, and not know yet: what it makes for the name that it knows this gateway by
        may go the same way, so requests are sent under another one from now on.
        """
        self._era += 1
        self._broken.add((link.replica_id, link.caller))

    async def _read(self, link: Link) -> None:
        """Follows one replica's frames while requests of ours run there."""
        failure, loss = "the replica closed the stream", Loss.GONE
        try:
            while link.streams:
                await self._read_stream(link)
        except _Leaving:
            self._break(link)
        except Exception as error:
            self._break(link)
            failure, loss = meaning(error, link.replica_id)
        finally:
            del self._links[link.replica_id, link.caller]
            if link.streams:
                logger.warning(FAREWELL, len(link.streams), failure)
                self._shun(link.replica_id)
                if loss is not Loss.FAILED:
                    # It may be there after all, and need not work for nobody.
                    self._abort(link.replica_id, *link.streams)
            for stream in tuple(link.streams.values()):
                self._give_up(stream, failure, loss)
                link.remove(stream)

    async def _read_stream(self, link: Link) -> None:
        """Reads until the replica ends the stream, which it does when it has had no request of ours for a while.

        Raises _Leaving once the replica is to go and all its streams go on elsewhere. There is always a next frame to
        look at this after: a replica with requests sends one every second.
        """
        frames = self._frames_call.remote(Attach(link.caller, link.replica_id))
        look_at = 0.0
        try:
            while True:
                frame = await heard(anext(frames, None))
                if frame is None:
                    return
                self._demultiplex(frame, link)
                if self._ledger.is_leaving(link.replica_id):
                    if time.monotonic() >= look_at:
                        look_at = time.monotonic() + LOOK_S
                        self._hand_over(link)
                    if not link.streams:
                        raise _Leaving
        except BaseException:
            frames.cancel()
            raise

    def _hand_over(self, link: Link) -> None:
        """Gives up the streams of a replica that is to go, if another one is known to be able to go on with them.

        The others have the time that the replica has to drain.
        """
        self._roster.look_around()
        streams = tuple(link.streams.values())
        moving = [stream for stream in streams if self._ledger.has_place(self._roster.cards.fit(stream.request))]
        if not moving:
            return
        reason = f"replica {link.replica_id} is to go"
        logger.info(FAREWELL, len(moving), reason)
        self._shun(link.replica_id)
        for stream in moving:
            self._give_up(stream, reason, Loss.MOVED)

    def _shun(self, replica_id: str) -> None:
        self._ledger.forget(replica_id)
        # Serve's router may list it for a while, and without debts it would come first.
        self._ledger.avoid(replica_id)

    def _demultiplex(self, frame: Frame, link: Link) -> None:
        for emission in frame.emissions:
            stream = self._streams.get(emission.request_id)
            if stream is None:
                self._disown(emission, frame.replica_id)
                continue
            self._ledger.spend(stream.wire_id, stream.put(emission))
            if stream.complete:
                link.remove(stream)
            elif stream.is_behind and not stream.complete:
                self._pause(stream, frame.replica_id)
        self._ledger.observe(frame.replica_id, frame.stats.num_outstanding_tokens)

    def _pause(self, stream: TokenStream, replica_id: str) -> None:
        """Stops a request whose client does not read. Should it read on, another attempt goes on from there."""
        logger.info("Request %s waits for its client", stream.wire_id)
        self._give_up(stream, "its client does not read", Loss.PAUSED)
        self._abort(replica_id, stream.wire_id)

    def _disown(self, emission: Emission, replica_id: str) -> None:
        """Stops a request that nobody waits for: an attempt that was given up although its replica had taken it."""
        if emission.finish_reason is None and emission.request_id not in self._aborted:
            self._abort(replica_id, emission.request_id)
