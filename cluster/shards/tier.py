"""The tier of a group: every rank copies its part of a page to the host of its own node, and a page is there if all
parts are.

Owns what is on its way and who has answered. The group's end is `engine.kv.tier.Tier`, used by the engine's thread; a
rank's end is a thread of its own beside the one that computes, so that pages come while batches run. The messages have
sockets of their own: neither batches nor the pulse wait for them.
"""

import contextlib
import itertools
import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import zmq

from cluster.kv.wire import WireError
from cluster.shards.tier_wire import Fetch, Fetched, GiveUp, News, Saved, Saves, State, decode, encode
from engine.kv import tier
from engine.kv.tier import Answer, Load, Loaded, Save, Tier, TierStats

logger = logging.getLogger(__name__)

POLL_S = 0.002
"""How often a rank looks for answers while it waits for some."""
STATE_S = 0.25
"""Between two reports of a rank of which nothing is asked."""
MAX_REMEMBERED = 65_536
"""Keys of pages that were saved and are believed to be there still."""

_UNKNOWN = State(0, 0, 0, 0.0, 0, 0)


@dataclass(slots=True)
class _Saving:
    """A page that ranks are copying."""

    save: Save
    awaited: set[int]
    stored: bool = True


@dataclass(slots=True)
class _Loading:
    """Pages that ranks are bringing back."""

    load: Load
    awaited: set[int]
    """Ranks that may still write to its pages: those are the tier's until none is left."""
    num_pages: int
    """That all who have answered have brought."""
    told: set[int] = field(default_factory=set)
    """Ranks that know that it is not waited for any more."""
    seconds: float = 0.0
    predicted_seconds: float = 0.0


class GroupTier:
    """See `engine.kv.tier.Tier`. Pages of which a rank has lost its part are as if they had never been saved."""

    def __init__(self, sockets: Sequence["zmq.Socket[bytes]"]) -> None:
        """`sockets`: by rank, the group's ends."""
        self._sockets = list(sockets)
        self._states = [_UNKNOWN] * len(sockets)
        self._poller = zmq.Poller()
        for socket in sockets:
            self._poller.register(socket, zmq.POLLIN)
        self._saving: dict[int, _Saving] = {}
        self._loading: dict[int, _Loading] = {}
        self._there: OrderedDict[bytes, None] = OrderedDict()
        self._answers: list[Answer] = []
        self._hosts: tuple[int, ...] = ()
        self._host = 0
        self._numbers = itertools.count(1)
        self._given = 0
        """Pages to copy that each rank was given."""
        self._stats = TierStats()

    def host(self) -> int:
        return self._host

    def may_have(self, key: bytes) -> bool:
        # What others have saved is not known here: `load` asks the hosts of all ranks.
        return key in self._there

    def room(self) -> int:
        return max(0, min(state.room + state.received for state in self._states) - self._given)

    def save(self, pages: list[Save]) -> None:
        self._given += len(pages)
        for save in pages:
            self._saving[save.page] = _Saving(save, set(range(len(self._sockets))))
        self._tell(Saves(tuple(pages)))

    def load(self, load: Load) -> None:
        recompute = np.array([load.recompute_seconds(count) for count in range(len(load.keys) + 1)], np.float64)
        self._loading[load.ticket] = _Loading(load, set(range(len(self._sockets))), len(load.keys))
        self._tell(Fetch(load.ticket, tuple(load.keys), tuple(load.pages), recompute))

    def give_up(self, ticket: int) -> None:
        loading = self._loading.get(ticket)
        if loading is None:
            return
        # It is over only when each of these has said that it has stopped, and not when they have been told to.
        data = encode(GiveUp(ticket))
        loading.told |= {rank for rank in loading.awaited - loading.told if self._send(rank, data)}

    def poll(self, timeout_s: float = 0.0) -> list[Answer]:
        self._receive(0.0)
        if not self._answers and timeout_s:
            self._receive(timeout_s)
        answers, self._answers = self._answers, []
        return answers

    def page_seconds(self) -> float:
        return max(state.page_seconds for state in self._states)

    def stats(self) -> TierStats:
        self._stats.pages_corrupt = sum(state.corrupt for state in self._states)
        self._stats.failures = sum(state.failures for state in self._states)
        return self._stats

    def close(self) -> None:
        """The sockets are closed with the channel; what was begun is not answered."""
        self._sockets = []
        self._saving.clear()
        self._loading.clear()

    def _tell(self, message: Saves | Fetch) -> None:
        data = encode(message)
        deaf = [rank for rank in range(len(self._sockets)) if not self._send(rank, data)]
        for rank in deaf:  # once all others have it: it may be given up now
            self._refuse(rank, message)

    def _send(self, rank: int, data: bytes) -> bool:
        """Whether the rank takes it."""
        try:
            self._sockets[rank].send(data, zmq.NOBLOCK)
        except zmq.Again:
            return False
        return True

    def _refuse(self, rank: int, message: Saves | Fetch) -> None:
        """What a rank says that takes no messages: it is about to be lost, and the engine must not wait for it."""
        match message:
            case Saves(pages):
                for save in pages:
                    self._saved(rank, Saved(save.page, False))
            case Fetch(ticket):
                self._fetched(rank, Fetched(ticket, 0, 0.0, 0.0))

    def _receive(self, timeout_s: float) -> None:
        if not self._sockets:
            return
        ready = dict(self._poller.poll(int(timeout_s * 1000)))
        for rank, socket in enumerate(self._sockets):
            with contextlib.suppress(zmq.Again):
                while socket in ready:
                    self._hear(rank, socket.recv(zmq.NOBLOCK))

    def _hear(self, rank: int, data: bytes) -> None:
        try:
            news = decode(data)
            if not isinstance(news, News):
                raise WireError(f"a {type(news).__name__}")
        except WireError as error:
            logger.warning("Rank %d sent of its pages what is no message: %s", rank, error)
            return
        self._states[rank] = news.state
        self._look_at_hosts()
        for saved in news.saved:
            self._saved(rank, saved)
        for fetched in news.fetched:
            self._fetched(rank, fetched)

    def _look_at_hosts(self) -> None:
        """Numbers the hosts of all ranks together anew when one has changed: what it took may be gone."""
        hosts = tuple(state.host for state in self._states)
        if hosts != self._hosts:
            self._hosts = hosts
            self._host = next(self._numbers) if all(hosts) else 0
            self._there.clear()

    def _saved(self, rank: int, saved: Saved) -> None:
        saving = self._saving.get(saved.page)
        if saving is None or rank not in saving.awaited:
            return
        saving.awaited.remove(rank)
        saving.stored &= saved.stored
        if saving.awaited:
            return
        del self._saving[saved.page]
        if saving.stored:
            self._stats.pages_saved += 1
            self._remember(saving.save.key)
        else:
            self._stats.pages_refused += 1
        self._answers.append(tier.Saved(saved.page, saving.stored))

    def _fetched(self, rank: int, fetched: Fetched) -> None:
        loading = self._loading.get(fetched.ticket)
        if loading is None or rank not in loading.awaited:
            return
        loading.awaited.remove(rank)
        loading.num_pages = min(loading.num_pages, fetched.num_pages)
        loading.seconds = max(loading.seconds, fetched.seconds)
        loading.predicted_seconds = max(loading.predicted_seconds, fetched.predicted_seconds)
        if loading.awaited:
            if not loading.num_pages:  # whatever the others bring is of no use
                self.give_up(fetched.ticket)
            return
        del self._loading[fetched.ticket]
        load, count = loading.load, loading.num_pages
        self._stats.pages_loaded += count
        for key in load.keys[:count]:
            self._remember(key)
        for key in load.keys[count:]:
            self._there.pop(key, None)
        recompute = load.recompute_seconds(0) - load.recompute_seconds(count)
        self._answers.append(Loaded(load.ticket, count, loading.seconds, loading.predicted_seconds, recompute))

    def _remember(self, key: bytes) -> None:
        self._there[key] = None
        if len(self._there) > MAX_REMEMBERED:
            self._there.popitem(last=False)


class RankTier:
    """A rank's end: hands what the group asks for to the tier of this rank, and tells what came of it."""

    def __init__(self, socket: "zmq.Socket[bytes]", client: Tier, on_failure: Callable[[Exception], None]) -> None:
        """Starts the thread, which owns both from now on. `on_failure` is called there when it ends by itself: the
        group would wait for its answers for ever."""
        self._socket = socket
        self._client = client
        self._on_failure = on_failure
        self._awaited = self._received = 0
        self._untold: list[Answer] = []
        self._told: State | None = None
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="shard-tier", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._closing = True
        self._thread.join(2 * STATE_S)

    def _run(self) -> None:
        try:
            while not self._closing:
                if self._socket.poll(int(1000 * (POLL_S if self._awaited else STATE_S))):
                    self._obey(self._socket.recv())
                answers = self._client.poll()
                self._awaited -= len(answers)
                self._untold += answers
                self._report()
        except Exception as error:
            logger.exception("Pages of this rank do not overflow any more")
            self._on_failure(error)
        finally:
            self._client.close()
            self._socket.close()

    def _obey(self, data: bytes) -> None:
        match decode(data):
            case Saves(pages):
                self._awaited += len(pages)
                self._received += len(pages)
                self._client.save(list(pages))
            case Fetch(ticket, keys, pages, recompute):
                self._awaited += 1
                seconds = recompute.tolist()
                self._client.load(Load(ticket, list(keys), list(pages), seconds.__getitem__))
            case GiveUp(ticket):
                self._client.give_up(ticket)
            case other:
                raise WireError(f"the group sent a {type(other).__name__}")

    def _report(self) -> None:
        """Tells what is news; again, if the group does not take it now."""
        stats = self._client.stats()
        state = State(
            self._client.host(),
            self._client.room(),
            self._received,
            self._client.page_seconds(),
            stats.pages_corrupt,
            stats.failures,
        )
        if not self._untold and state == self._told:
            return
        saved = tuple(Saved(each.page, each.stored) for each in self._untold if isinstance(each, tier.Saved))
        fetched = tuple(
            Fetched(each.ticket, each.num_pages, each.seconds, each.predicted_seconds)
            for each in self._untold
            if isinstance(each, Loaded)
        )
        with contextlib.suppress(zmq.Again):
            self._socket.send(encode(News(saved, fetched, state)), zmq.NOBLOCK)
            self._untold, self._told = [], state
