"""Frame streams, the replica's side: which gateway gets which emissions, one frame per iteration and gateway.

Owns who reads what and until when; runs on one event loop and makes no call to Ray. Emissions are kept from the moment
a request is announced until its gateway attaches, so no order of submit and attach loses a token.
"""

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence

from deployments.messages import Frame
from engine.sequence import Emission, FinishReason, Request
from engine.stats import EngineStats

HEARTBEAT_S = 1.0
"""Longest silence of a stream with unfinished requests, so that its reader can tell a long prefill from a dead node."""
LINGER_S = 2.0
"""For how long a stream without requests waits for the next one. It must end by itself, and well within the graceful
shutdown time: Serve drains a replica by waiting for its calls, and a stream is a call."""
GRACE_S = 5.0
"""For how long a gateway may be without a stream before its requests are aborted."""


class FrameStreams:
    """The frame streams of one replica, at most one per gateway."""

    def __init__(
        self,
        replica_id: str,
        stats: EngineStats,
        abort: Callable[[Sequence[str]], None],
        *,
        heartbeat_s: float = HEARTBEAT_S,
        linger_s: float = LINGER_S,
        grace_s: float = GRACE_S,
    ) -> None:
        """`abort` is called with the request ids of a gateway that has vanished."""
        self._replica_id = replica_id
        self._stats = stats
        self._abort = abort
        self._heartbeat_s = heartbeat_s
        self._linger_s = linger_s
        self._grace_s = grace_s
        self._streams: dict[str, _Stream] = {}
        self._owners: dict[str, _Stream] = {}

    @property
    def num_requests(self) -> int:
        """Requests with unfinished samples."""
        return len(self._owners)

    def announce(self, gateway_id: str, request: Request) -> None:
        """Names the gateway that reads a request's emissions; before the engine sees the request."""
        stream = self._stream(gateway_id)
        stream.open_samples[request.request_id] = len(request.open_samples)
        self._owners[request.request_id] = stream
        self._watch(stream)

    def forget(self, request_ids: Sequence[str]) -> None:
        """Drops requests that nobody reads any more, and what is still waiting to be sent for them."""
        for request_id in request_ids:
            stream = self._owners.pop(request_id, None)
            if stream is not None:
                del stream.open_samples[request_id]
                stream.waiting = [emission for emission in stream.waiting if emission.request_id != request_id]
                self._watch(stream)

    def publish(self, emissions: Sequence[Emission], stats: EngineStats | None = None) -> None:
        """Hands one iteration's emissions to the streams of their gateways; those of forgotten requests are dropped.

        Without `stats` they come from no iteration, and the latest stay.
        """
        self._stats = stats or self._stats
        for emission in emissions:
            stream = self._owners.get(emission.request_id)
            if stream is None:
                continue
            stream.waiting.append(emission)
            stream.wake.set()
            if emission.finish_reason is not None:
                stream.open_samples[emission.request_id] -= 1
                if stream.open_samples[emission.request_id] == 0:
                    del stream.open_samples[emission.request_id], self._owners[emission.request_id]

    def give_up(self, error: str) -> None:
        """Tells every gateway that this replica does not go on with its requests; others can."""
        moved = [Emission(request_id, 0, finish_reason=FinishReason.MOVED, error=error) for request_id in self._owners]
        for emission in moved:
            stream = self._owners.pop(emission.request_id)
            del stream.open_samples[emission.request_id]
            stream.waiting.append(emission)
            stream.wake.set()

    async def attach(self, gateway_id: str) -> AsyncGenerator[Frame, None]:
        """The frames of one gateway, beginning with an empty one at once.

        Frames that wait while the reader is busy are merged. Ends when it has had no request for a while, or when the
        same gateway attaches again, which takes the stream over.
        """
        stream = self._stream(gateway_id)
        stream.reader = reader = object()
        stream.wake.set()
        self._watch(stream)
        try:
            yield self._frame(stream)
            while await self._wait(stream, reader):
                yield self._frame(stream)
        finally:
            if stream.reader is reader:
                stream.reader = None
                self._watch(stream)

    async def _wait(self, stream: "_Stream", reader: object) -> bool:
        """Waits until a frame is due; False when the stream is over for this reader."""
        timeout = self._heartbeat_s if stream.open_samples else self._linger_s
        try:
            async with asyncio.timeout(None if stream.waiting else timeout):
                while not stream.waiting and stream.reader is reader:
                    stream.wake.clear()
                    await stream.wake.wait()
        except TimeoutError:
            return stream.reader is reader and stream.needed
        return stream.reader is reader

    def _frame(self, stream: "_Stream") -> Frame:
        emissions, stream.waiting = stream.waiting, []
        return Frame(self._replica_id, tuple(emissions), self._stats)

    def _stream(self, gateway_id: str) -> "_Stream":
        return self._streams.setdefault(gateway_id, _Stream(gateway_id))

    def _watch(self, stream: "_Stream") -> None:
        """Starts or stops the clock of a gateway without a reader, and drops a stream that nobody needs."""
        if stream.reader is None and stream.needed:
            if stream.deadline is None:
                stream.deadline = asyncio.get_running_loop().call_later(self._grace_s, self._vanished, stream)
            return
        if stream.deadline is not None:
            stream.deadline.cancel()
            stream.deadline = None
        if stream.reader is None:
            self._streams.pop(stream.gateway_id, None)

    def _vanished(self, stream: "_Stream") -> None:
        stream.deadline = None
        stream.waiting.clear()
        request_ids = tuple(stream.open_samples)
        self.forget(request_ids)
        self._watch(stream)
        if request_ids:
            self._abort(request_ids)


class _Stream:
    """What is on its way to one gateway."""

    def __init__(self, gateway_id: str) -> None:
        self.gateway_id = gateway_id
        self.open_samples: dict[str, int] = {}
        """Request id -> samples that have not finished."""
        self.waiting: list[Emission] = []
        self.wake = asyncio.Event()
        self.reader: object | None = None
        """Identity of the call that reads the stream now."""
        self.deadline: asyncio.TimerHandle | None = None

    @property
    def needed(self) -> bool:
        return bool(self.open_samples or self.waiting)
