"""Token streams, the gateway's side: the emissions of one attempt at a request, and the replica that they come from.

Plain books on one event loop; makes no call to Ray and decides nothing.
"""

import asyncio
from collections import deque

from deployments.backend import GenerationFailed
from engine.sequence import Emission, Request

MAX_BEHIND = 512
"""Emissions that may wait for their reader, for each sample: several seconds of tokens. A reader so far behind does not
read, and what waits for it takes memory: up to some kilobytes each, if there are logprobs."""


class TokenStream:
    """The emissions of one attempt at a request, between the link that brings them and the client's generator."""

    def __init__(self, wire_id: str, request: Request, caller: str) -> None:
        """`caller`: the name under which the request is sent, and its tokens are asked for."""
        self.wire_id = wire_id
        self.request = request
        self.caller = caller
        self.replica_id: str | None = None
        self.closed = False
        """Nobody reads this stream any more."""
        self._unspent = len(request.prompt_token_ids)
        self._open_samples = len(request.open_samples)
        self._max_waiting = MAX_BEHIND * self._open_samples
        self._waiting: deque[Emission] = deque()
        self._failure: GenerationFailed | None = None
        self._wake = asyncio.Event()

    @property
    def complete(self) -> bool:
        """Whether every sample's last emission has arrived."""
        return self._open_samples == 0

    @property
    def broken(self) -> bool:
        return self._failure is not None

    @property
    def finished(self) -> bool:
        """Whether there is nothing more to take."""
        return self.complete and not self._waiting

    @property
    def is_behind(self) -> bool:
        """Whether more waits for the reader than should."""
        return len(self._waiting) > self._max_waiting

    def put(self, emission: Emission) -> int:
        """Adds what arrived; returns how many tokens of work it shows to be done, the prompt's with the first.

        Nothing once it has failed: what came before this may be lost, and an answer must have no hole.
        """
        if self.broken:
            return 0
        self._waiting.append(emission)
        self._wake.set()
        if emission.finish_reason is not None:
            self._open_samples -= 1
        done = len(emission.token_ids)
        if done:
            done, self._unspent = done + self._unspent, 0
        return done

    def fail(self, reason: GenerationFailed) -> None:
        """Ends the stream after what has already arrived."""
        if not self.complete and self._failure is None:
            self._failure = reason
            self._wake.set()

    async def take(self) -> list[Emission]:
        """Everything that has arrived, after waiting for something. Raises what it failed with if no more will come."""
        while not self._waiting:
            if self._failure is not None:
                raise self._failure
            self._wake.clear()
            await self._wake.wait()
        taken = list(self._waiting)
        self._waiting.clear()
        return taken


class Link:
    """The frame stream from one replica, and the token streams that live on it."""

    def __init__(self, replica_id: str, caller: str) -> None:
        self.replica_id = replica_id
        self.caller = caller
        """The name that the replica knows the gateway by."""
        self.streams: dict[str, TokenStream] = {}

    def add(self, stream: TokenStream) -> None:
        self.streams[stream.wire_id] = stream

    def remove(self, stream: TokenStream) -> None:
        self.streams.pop(stream.wire_id, None)
