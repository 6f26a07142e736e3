"""The two ends of what connects a group with its ranks: batches there, outputs back, and a pulse of each.

A batch goes from the thread that makes it to the thread that runs it without another between them. The pulse has
threads of its own at both ends, so that a rank that computes is not taken for one that is gone, and a rank that is gone
is noticed while nothing is asked of it. Knows neither Ray nor models.
"""

import contextlib
import logging
import math
import os
import queue
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

import zmq

from cluster.kv.wire import WireError
from cluster.shards.door import Door, Doors
from cluster.shards.link import Entrance, Link
from cluster.shards.watch import BEAT_S, Loss, Watch
from cluster.shards.wire import Alive, Beat, Fault, Message, decode, encode, without_edits
from engine.batch import Batch

logger = logging.getLogger(__name__)

CONNECT_TIMEOUT_S = 20.0
"""For a rank to reach its group."""
GROUP_PATIENCE_S = 5.0
"""How long a rank goes on without hearing of its group."""
CLOSE_TIMEOUT_S = 2.0
_ENDED = "its process has ended"


class ChannelClosed(Exception):
    """Nothing more comes: a rank is lost, or the other end is gone."""


class GroupChannel:
    """The group's end. `send` and `receive` are for one thread; `gone` and `loss` for any."""

    def __init__(
        self, near: Sequence[bool], answering: int, address: str, parent: Path, on_loss: Callable[[Loss], None]
    ) -> None:
        """See `Doors`; `answering` is the rank that outputs come from. `on_loss` is called once, on the pulse's thread,
        before `receive` raises. Raises OSError."""
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._doors = Doors(self._context, near, address, parent)
        self._near = list(near)
        self._answering = answering
        # Far ones first: what they get is encrypted and on its way while the others are written to.
        self._order = sorted(range(len(near)), key=self._near.__getitem__)
        self._links: list[Link] = []
        """By rank, once it has come."""
        self._on_loss = on_loss
        self._watch = Watch(len(near))
        self._news: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._news_bell, self._lost_bell = os.eventfd(0, os.EFD_NONBLOCK), os.eventfd(0, os.EFD_NONBLOCK)
        self._poller = zmq.Poller()
        """For what `receive` waits for."""
        self._poller.register(self._lost_bell, zmq.POLLIN)
        self._pulse_poller = zmq.Poller()
        self._ends: dict[object, int] = {}
        """Links that end with the process at their other end, and its rank."""
        self._closing = self._closed = False
        self.loss: Loss | None = None
        """The rank that was lost, if one was."""
        self._pulse = threading.Thread(target=self._listen, name="shard-pulse", daemon=True)
        self._pulse.start()

    @property
    def doors(self) -> list[Door]:
        """By rank, its way here."""
        return self._doors.of_ranks

    @property
    def pages(self) -> "list[zmq.Socket[bytes]]":
        """By rank, where it is told which pages to copy; for the thread that sends. `close` closes them."""
        return self._doors.pages

    @property
    def finished(self) -> tuple[int, ...]:
        """Batches that each rank has finished, as far as is known."""
        return self._watch.finished

    @property
    def waited_s(self) -> tuple[float, ...]:
        """Seconds, in all, that each rank had nothing to run, as far as is known."""
        return self._watch.waited_s

    def expect(self, silence: float) -> None:
        """From now on each rank is to connect and to beat: one that is silent for so many seconds is lost."""
        self._tell(lambda: self._watch.arm(silence))

    def arm(self) -> None:
        """Returns once each rank is connected; from then on one that is silent for a moment is lost. Raises
        ChannelClosed.

        Nothing is sent before: it would be lost on whoever is not there yet.
        """
        for rank, entrance in enumerate(self._doors.work):
            link = self._admit(rank, entrance)
            self._links.append(link)
            self._await(rank, link.readable, CONNECT_TIMEOUT_S)
            self._receive(rank)
        self._poller.register(self._links[self._answering].readable, zmq.POLLIN)
        self._tell(self._follow)

    def gone(self, rank: int, reason: str) -> None:
        """The process of a rank has ended."""
        self._tell(lambda: self._watch.gone(rank, reason))

    def send(self, message: Message) -> None:
        """To all ranks, each once; of a batch's edits all but the answering one learn only where they are. Raises
        ChannelClosed when a rank is lost, or takes nothing more, and WireError before anything is sent."""
        if self.loss is not None or self._closed:
            raise ChannelClosed
        whole = rest = encode(message)
        if isinstance(message, Batch) and message.samples.edits:
            rest = encode(without_edits(message))
        for rank in self._order:
            try:
                self._links[rank].send(whole if rank == self._answering else rest)
            except TimeoutError:
                self._give_up(rank, "it takes no more messages")
            except ConnectionError:
                self._give_up(rank, _ENDED)

    def receive(self) -> Message:
        """The next message of the answering rank. Raises ChannelClosed when a rank is lost, and WireError."""
        if self._closed:
            raise ChannelClosed
        link = self._links[self._answering]
        if not link.has_more and link.readable not in dict(self._poller.poll()):
            raise ChannelClosed
        return decode(self._receive(self._answering))

    def close(self) -> None:
        """Closes the sockets and removes their files; ranks that are still there end themselves."""
        if self._closed:
            return
        self._closing = True
        _ring(self._news_bell)
        if self._pulse is not threading.current_thread():
            self._pulse.join(CLOSE_TIMEOUT_S)
        self._closed = True
        for link in self._links:
            link.close()
        for socket in self._doors.pages:
            socket.close()
        self._doors.close()
        self._context.destroy()
        for bell in (self._news_bell, self._lost_bell):
            os.close(bell)

    def _admit(self, rank: int, entrance: Entrance) -> Link:
        """The link to a rank, whoever else may come before it."""
        deadline = time.monotonic() + CONNECT_TIMEOUT_S
        while True:
            self._await(rank, entrance.readable, deadline - time.monotonic())
            if (link := entrance.admit()) is not None:
                return link

    def _await(self, rank: int, readable: int, seconds: float) -> None:
        """Waits for something that a rank does while it starts."""
        poller = zmq.Poller()
        poller.register(readable, zmq.POLLIN)
        poller.register(self._lost_bell, zmq.POLLIN)
        if readable not in dict(poller.poll(_milliseconds(seconds))):
            self._give_up(rank, f"it has not come in {CONNECT_TIMEOUT_S:g} s")

    def _receive(self, rank: int) -> bytearray:
        try:
            return self._links[rank].receive()
        except ConnectionError:
            self._give_up(rank, _ENDED)

    def _give_up(self, rank: int, reason: str) -> NoReturn:
        """Takes a rank for lost, unless another one is."""
        self.gone(rank, reason)
        bell = zmq.Poller()
        bell.register(self._lost_bell, zmq.POLLIN)
        bell.poll(_milliseconds(CLOSE_TIMEOUT_S))
        raise ChannelClosed

    def _tell(self, news: Callable[[], None]) -> None:
        self._news.put(news)
        with contextlib.suppress(OSError):  # closed
            _ring(self._news_bell)

    # -- the pulse's thread --------------------------------------------------------------------------------------------

    def _listen(self) -> None:
        sockets = {socket: rank for rank, socket in enumerate(self._doors.pulse)}
        poller = self._pulse_poller
        for socket in sockets:
            poller.register(socket, zmq.POLLIN)
        poller.register(self._news_bell, zmq.POLLIN)
        said_at = 0.0
        while not self._closing:
            # In the order in which they were registered: what a rank has said comes before its end.
            for ready, _ in poller.poll(_milliseconds(BEAT_S)):
                if ready in sockets:
                    self._hear(sockets[ready], ready)
                elif ready in self._ends:
                    poller.unregister(ready)
                    self._watch.gone(self._ends[ready], _ENDED)
                else:
                    self._read_news()
            if time.monotonic() - said_at >= 2 * BEAT_S:
                said_at = time.monotonic()
                self._say_alive()
            if self.loss is None and (loss := self._watch.verdict()) is not None:
                self._lose(loss)
        for socket in sockets:
            socket.close()

    def _follow(self) -> None:
        """All ranks are there: from now on each is to be heard, and none is to end."""
        self._watch.arm()
        for rank, link in enumerate(self._links):
            if self._near[rank]:
                self._ends[link.readable] = rank
                self._pulse_poller.register(link.readable, zmq.POLLERR)
            elif rank != self._answering:
                # The end of a TCP stream is read; and nothing else is there, as this rank says nothing on it.
                self._ends[link.readable] = rank
                self._pulse_poller.register(link.readable, zmq.POLLIN)

    def _hear(self, rank: int, socket: "zmq.Socket[bytes]") -> None:
        with contextlib.suppress(zmq.Again):
            while True:
                try:
                    match decode(socket.recv(zmq.NOBLOCK)):
                        case Beat(finished, waited_s):
                            self._watch.beat(rank, finished, waited_s)
                        case Fault(reason, is_victim):
                            self._watch.fault(rank, reason, is_victim=is_victim)
                        case other:
                            raise WireError(f"a {type(other).__name__} among its beats")
                except WireError as error:
                    self._watch.fault(rank, f"it sent what is no message: {error}")

    def _read_news(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._news_bell)
        with contextlib.suppress(queue.Empty):
            while True:
                self._news.get_nowait()()

    def _say_alive(self) -> None:
        for socket in self._doors.pulse:
            with contextlib.suppress(zmq.Again):  # not connected yet, or gone
                socket.send(encode(Alive()), zmq.NOBLOCK)

    def _lose(self, loss: Loss) -> None:
        self.loss = loss
        # Now: whoever is to close this may not live to do so.
        self._doors.remove_files()
        try:
            self._on_loss(loss)
        except Exception:
            logger.exception("The rest of a lost group could not be ended")
        _ring(self._lost_bell)


class RankChannel:
    """A rank's end. `receive` and `send` are for one thread, `fault` for any."""

    def __init__(
        self, door: Door, on_orphaned: Callable[[], None], clock: Callable[[], float] = time.monotonic
    ) -> None:
        """Connects, and begins to beat. `on_orphaned` is called on the pulse's thread when nothing is heard of the
        group, and by `receive` when it has ended. Raises ConnectionError."""
        self._door = door
        self._on_orphaned = on_orphaned
        self._clock = clock
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        try:
            self._link = door.link(self._context, CONNECT_TIMEOUT_S)
        except ConnectionError as error:
            self._context.destroy()
            raise ConnectionError(f"rank {door.rank} does not reach its group: {error}") from None
        self.send(Beat(0, 0.0))
        self.finished = 0
        """Batches that were run: told with each beat, as is `waited_s`."""
        self.waited_s = 0.0
        """Seconds, in all, that this rank had nothing to run, up to the latest batch that it finished."""
        self._fault: Fault | None = None
        self._closing = False
        self._bell = os.eventfd(0, os.EFD_NONBLOCK)
        self._pulse = threading.Thread(target=self._beat, name="shard-pulse", daemon=True)
        self._pulse.start()

    def receive(self) -> Message:
        """Waits for the next message of the group. Raises ChannelClosed where the group has ended, and WireError."""
        try:
            data = self._link.receive()
        except ConnectionError:
            self._on_orphaned()
            raise ChannelClosed from None
        return decode(data)

    def send(self, message: Message) -> None:
        """Raises WireError, TimeoutError where the group does not take what was sent before, and ConnectionError where
        it has ended."""
        self._link.send(encode(message))

    def pages(self) -> "zmq.Socket[bytes]":
        """A socket for what is said of pages, for whichever thread does so, which also closes it."""
        return self._door.connect(self._context, self._door.pages)

    def fault(self, reason: str, *, is_victim: bool = False) -> None:
        """Says that this rank cannot go on, or, as a victim, that others do not; what is said first counts."""
        if self._fault is None and not self._closing:
            self._fault = Fault(reason, is_victim)
            _ring(self._bell)

    def close(self) -> None:
        """Ends the pulse, after a fault was sent."""
        if self._closing:
            return
        self._closing = True
        _ring(self._bell)
        if self._pulse is not threading.current_thread():
            self._pulse.join(CLOSE_TIMEOUT_S)
        self._link.close()
        self._context.destroy()
        os.close(self._bell)

    # -- the pulse's thread --------------------------------------------------------------------------------------------

    def _beat(self) -> None:
        socket = self._door.connect(self._context, self._door.pulse)
        poller = zmq.Poller()
        poller.register(socket, zmq.POLLIN)
        poller.register(self._bell, zmq.POLLIN)
        beat_at, said = 0.0, False
        heard = looked = self._clock()
        while not self._closing:
            if self._clock() >= beat_at:
                beat_at = self._clock() + BEAT_S
                _try_send(socket, Beat(self.finished, self.waited_s))
            if self._fault is not None and not said:
                said = _try_send(socket, self._fault)
            ready = dict(poller.poll(_milliseconds(beat_at - self._clock())))
            now = self._clock()
            # A process that was stopped has heard nothing because it did not listen.
            heard += max(0.0, now - looked - 2 * BEAT_S)
            looked = now
            if self._bell in ready:
                os.eventfd_read(self._bell)
            if socket in ready:
                heard = now
                _drain(socket)
            if now - heard > GROUP_PATIENCE_S:
                self._on_orphaned()
                break
        if self._fault is not None and not said:
            _try_send(socket, self._fault)
        socket.close(linger=_milliseconds(BEAT_S))


def _milliseconds(seconds: float) -> int:
    return max(0, math.ceil(seconds * 1000))


def _ring(bell: int) -> None:
    with contextlib.suppress(BlockingIOError):
        os.eventfd_write(bell, 1)


def _try_send(socket: "zmq.Socket[bytes]", message: Message) -> bool:
    try:
        socket.send(encode(message), zmq.NOBLOCK)
    except zmq.Again:  # not connected yet, or not any more
        return False
    return True


def _drain(socket: "zmq.Socket[bytes]") -> None:
    with contextlib.suppress(zmq.Again):
        while True:
            socket.recv(zmq.NOBLOCK)
