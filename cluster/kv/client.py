"""A replica's way to the KV host of its node: the `engine.kv.tier.Tier` of a real engine.

Owns one thread, which talks to the host and makes all copies. Knows no sequence. When the host is gone nothing is
there, until it is back.
"""

import itertools
import logging
import selectors
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from cluster.kv.allowance import Allowance
from cluster.kv.commits import Commits
from cluster.kv.connection import Connection, HostRefused, connect
from cluster.kv.grants import Grants
from cluster.kv.loads import MEMORY_GUESS, LoadCosts, RunningLoad
from cluster.kv.passage import Passage
from cluster.kv.segment import SegmentError
from cluster.kv.wire import (
    VERSION,
    Commit,
    Committed,
    Corrupt,
    Entry,
    Fetch,
    Find,
    Found,
    Grant,
    Hello,
    Message,
    Ready,
    Release,
    WireError,
)
from engine.kv.costs import CopyCost, LoadPolicy, choose_load
from engine.kv.tier import Answer, Load, Loaded, PageMemory, Save, Saved, TierStats

logger = logging.getLogger(__name__)

RETRY_S = 1.0
"""Between two attempts to reach a host that is not there."""
REFUSED_RETRY_S = 30.0
ANSWER_TIMEOUT_S = 5.0
"""For a host that takes longer to say anything of a load: the rest of the sequence is computed instead."""
CLOSE_TIMEOUT_S = 2.0
MAX_QUEUED = 256
"""Pages that may be on their way to the host at once: each is held on the device until it is copied. An iteration may
fill more pages than the host lends slots at a time, and what is not on its way by the next one waits that long."""
GRANT_PATIENCE_S = 2.0
"""How long pages wait for slots before they are refused. Longer than the host lets its disk take to make room. And how
long pages that were copied are held on the device until the host says which it has kept."""
MAX_COMMIT = 8
"""Pages that are copied before the host is told, and before a load that has come meanwhile."""


@dataclass(frozen=True, slots=True)
class Bandwidth:
    """What copies may take, bytes a second; None is no limit. Limits on loading are for measurements."""

    save: float | None = None
    load: float | None = None


UNLIMITED = Bandwidth()


class TierClient:
    """See `engine.kv.tier.Tier`."""

    def __init__(
        self,
        find_host: Callable[[], Path | None],
        layout: bytes,
        memory: PageMemory,
        *,
        name: str,
        parts: int = 1,
        bandwidth: Bandwidth = UNLIMITED,
        choose: LoadPolicy = choose_load,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`find_host` gives the socket of the host, None while there is none; it is asked on the client's thread.
        `parts`: layouts that the budgets of one host are for."""
        self._find_host = find_host
        self._hello = Hello(VERSION, layout, memory.page_bytes, name, parts)
        self._passage = Passage(memory)
        self._bandwidth = bandwidth
        self._choose = choose
        self._clock = clock
        self._changed = threading.Condition()
        self._saves: deque[Save] = deque()
        self._loads: deque[Load] = deque()
        self._given_up: set[int] = set()
        """Tickets of loads that nobody waits for any more."""
        self._answers: list[Answer] = []
        self._stats = TierStats()
        self._num_saving = 0
        self._num_uncopied = 0
        """Pages that were refused without a copy, and whose part of the bandwidth is to be given back."""
        self._commits = Commits()
        self._grants = Grants(GRANT_PATIENCE_S, clock)
        self._allowance = Allowance(bandwidth.save, memory.page_bytes, clock)
        self._load_costs = LoadCosts(memory.page_bytes)
        self._save_cost = CopyCost(MEMORY_GUESS * memory.page_bytes)
        self._connection: Connection | None = None
        self._num_hosts = 0
        """That this client was connected to, the same one each time anew."""
        self._closing = False
        self._woken, self._waker = socket.socketpair()
        self._waker.setblocking(False)
        self._numbers = itertools.count()
        self._running: dict[int, RunningLoad] = {}
        """By a number of each load's own: tickets are used again, and what the host still says of a load that has ended
        must not be taken for a part of the next."""
        self._thread = threading.Thread(target=self._run, name="kv-tier", daemon=True)
        self._thread.start()

    # -- the engine's side -------------------------------------------------------------------------------------------

    @property
    def connected(self) -> bool:
        """Whether there is a host now."""
        return self._connection is not None

    def host(self) -> int:
        return self._num_hosts if self._connection is not None else 0

    def may_have(self, key: bytes) -> bool:
        connection = self._connection
        return connection is not None and connection.segment.may_have(key)

    def room(self) -> int:
        connection = self._connection
        free = MAX_QUEUED - self._num_saving
        if connection is None:
            return free  # they are refused at once: what nobody takes must not pile up
        if not self._grants.lends:  # no more are taken than there are slots for
            free = min(free, len(connection.credits) - self._num_saving)
        return max(0, min(free, self._allowance.pages()))

    def save(self, pages: list[Save]) -> None:
        self._allowance.take(len(pages))
        with self._changed:
            self._num_saving += len(pages)
            self._saves.extend(pages)
        self._wake()

    def load(self, load: Load) -> None:
        with self._changed:
            # The ticket may have been given up just after its last load had ended.
            self._given_up.discard(load.ticket)
            self._loads.append(load)
        self._wake()

    def give_up(self, ticket: int) -> None:
        self._given_up.add(ticket)
        self._wake()

    def poll(self, timeout_s: float = 0.0) -> list[Answer]:
        if not self._answers and timeout_s == 0.0:
            return []
        with self._changed:
            if not self._answers:
                self._changed.wait(timeout_s)
            answers, self._answers = self._answers, []
            uncopied, self._num_uncopied = self._num_uncopied, 0
        self._given_up.difference_update(answer.ticket for answer in answers if isinstance(answer, Loaded))
        # Here and not where they were refused: the allowance is the engine's thread's.
        self._allowance.give_back(uncopied)
        return answers

    def page_seconds(self) -> float:
        return self._save_cost.page_seconds + self._load_costs.memory.page_seconds

    def stats(self) -> TierStats:
        return replace(self._stats)

    def close(self) -> None:
        with self._changed:
            self._closing = True
        self._wake()
        if self._thread is not threading.current_thread():
            self._thread.join(CLOSE_TIMEOUT_S)

    def _wake(self) -> None:
        with suppress(OSError):  # a full pipe: it is awake then; a closed one: it has ended
            self._waker.send(b"\0")

    # -- the thread --------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        retry_at = 0.0
        while not self._closing:
            if self._clock() >= retry_at:
                retry_at = self._clock() + RETRY_S
                try:
                    self._serve()
                except HostRefused as refusal:
                    logger.warning("No KV host for this replica: %s", refusal)
                    retry_at = self._clock() + REFUSED_RETRY_S
                except (OSError, WireError, SegmentError) as error:
                    if self._connection is not None:
                        self._stats.failures += 1
                        logger.warning("The KV host is lost: %s; pages are computed instead of loaded", error)
                    else:
                        logger.debug("No KV host: %s", error)
                except Exception:
                    self._stats.failures += 1
                    logger.exception("The KV tier is off")
                    retry_at = float("inf")
                finally:
                    self._connection = None
                    self._give_up()
            self._sleep(max(0.0, retry_at - self._clock()))
            self._give_up()
        self._woken.close()

    def _sleep(self, seconds: float) -> None:
        with selectors.DefaultSelector() as selector:
            selector.register(self._woken, selectors.EVENT_READ)
            if selector.select(min(seconds, RETRY_S)):
                self._woken.recv(4096)

    def _give_up(self) -> None:
        """Answers everything that waits for a host that is not there."""
        for running in list(self._running.values()):
            self._finish(running)
        with self._changed:
            loads = list(self._loads)
            self._loads.clear()
        for load in loads:
            self._answer(Loaded(load.ticket, 0))
        self._refuse(self._commits.end())
        self._refuse_saves()

    def _serve(self) -> None:
        """Talks to the host for as long as it is there."""
        path = self._find_host()
        if path is None:
            return
        with connect(path, self._hello) as connection:
            self._num_hosts += 1
            self._connection, self._grants = connection, Grants(GRANT_PATIENCE_S, self._clock)
            logger.info("KV host at %s: %d pages", path, connection.segment.num_slots)
            while not self._closing:
                for message in connection.receive(self._woken, self._patience()):
                    self._handle(connection, message)
                self._end_loads(connection)
                self._refuse(self._commits.give_up(self._clock() - GRANT_PATIENCE_S))
                self._work(connection)

    def _end_loads(self, connection: Connection) -> None:
        """Ends the loads of which the host has said nothing for too long, each by itself: a disk or a peer may hang.
        And those that nobody waits for.

        Raises WireError if it has not even said what it has: it knows that at once, and is itself not to be waited for.
        """
        now = self._clock()
        for running in [each for each in self._running.values() if now - each.heard >= ANSWER_TIMEOUT_S]:
            if not running.found:
                raise WireError(f"the host does not say what it has for {ANSWER_TIMEOUT_S:.0f} s")
            logger.warning("The KV host brings no page for %.0f s: the rest is computed", ANSWER_TIMEOUT_S)
            self._end(connection, running)
        for running in [each for each in self._running.values() if each.load.ticket in self._given_up]:
            self._end(connection, running)

    def _work(self, connection: Connection) -> None:
        """Does what the engine has asked for; loads first, as sequences wait for those. Pages wait for slots."""
        while self._loads or (self._saves and connection.credits):
            while self._loads:
                load = self._loads.popleft()
                if load.ticket in self._given_up:
                    self._answer(Loaded(load.ticket, 0))
                    continue
                number, now = next(self._numbers), self._clock()
                self._running[number] = RunningLoad(number, load, now, now)
                connection.send(Find(number, load.keys))
            saves: list[Save] = []
            entries: list[Entry] = []
            while self._saves and connection.credits and not self._loads and len(entries) < MAX_COMMIT:
                saves.append(self._saves.popleft())
                entries.append(self._copy_out(connection, saves[-1]))
            if entries:
                self._commits.add(saves, self._clock())
                connection.send(Commit(entries))
        if self._grants.is_overdue(bool(self._saves)):
            # All of them: those behind one that is not there could not be found.
            self._refuse_saves()

    def _patience(self) -> float:
        """Seconds that the host may be silent before something is to be done."""
        now = self._clock()
        due = [heard + ANSWER_TIMEOUT_S for heard in (now, *(running.heard for running in self._running.values()))]
        due += [self._grants.due(), self._commits.oldest() + GRANT_PATIENCE_S]
        return max(0.0, min(due) - now)

    def _handle(self, connection: Connection, message: Message) -> None:
        match message:
            case Grant(slots):
                connection.credits.extend(slots)
                self._grants.came()
            case Found(number):
                if (running := self._running.get(number)) is not None:
                    self._found(connection, running, message)
            case Ready(number):
                if (running := self._running.get(number)) is not None:
                    self._ready(connection, running, message)
            case Committed(dropped):
                self._committed(frozenset(dropped))
            case _:
                raise WireError(f"the host sent a {type(message).__name__}")

    def _copy_out(self, connection: Connection, save: Save) -> Entry:
        """Copies a page to a slot of ours; what to commit."""
        began = self._clock()
        slot = connection.credits.popleft()
        entry = Entry(slot, save.key, save.parent, self._passage.out(save.page, connection.segment, slot))
        self._save_cost.observe(1, self._clock() - began)
        return entry

    def _committed(self, dropped: frozenset[bytes]) -> None:
        for save in self._commits.answered():
            if save.key in dropped:
                self._refuse([save])
            else:
                self._stats.pages_saved += 1
                self._answer(Saved(save.page, True))

    def _found(self, connection: Connection, running: RunningLoad, found: Found) -> None:
        in_memory = running.decide(found.slots, self._load_costs, self._choose, self._clock())
        if running.slow:
            connection.send(Fetch(running.number, running.wanted))
        self._copy_in(connection, running, found.slots[:in_memory], found.crcs[:in_memory], timed=True)

    def _ready(self, connection: Connection, running: RunningLoad, ready: Ready) -> None:
        skip = running.arrived(ready.first, len(ready.slots), self._clock())
        if skip is not None:
            self._copy_in(connection, running, ready.slots[skip:], ready.crcs[skip:], timed=False)

    def _copy_in(
        self, connection: Connection, running: RunningLoad, slots: list[int], crcs: list[int], *, timed: bool
    ) -> None:
        """Copies the next pages of a load; ends it when these were the last, or one is not what it should be."""
        began, count = self._clock(), 0
        for slot, crc in zip(slots, crcs, strict=True):
            if not self._passage.into(running.load.pages[running.copied], connection.segment, slot, crc):
                self._stats.pages_corrupt += 1
                connection.send(Corrupt([running.load.keys[running.copied]]))
                running.cut_short()
                break
            running.copied += 1
            count += 1
            self._throttle(began, count)
            if running.load.ticket in self._given_up:
                running.cut_short()
                break
        if timed:
            self._load_costs.memory.observe(count, self._clock() - began)
        if running.copied >= running.wanted:
            self._end(connection, running)

    def _throttle(self, began: float, pages: int) -> None:
        if self._bandwidth.load is not None:
            due = began + pages * self._hello.page_bytes / self._bandwidth.load
            time.sleep(max(0.0, due - self._clock()))

    def _end(self, connection: Connection, running: RunningLoad) -> None:
        connection.send(Release(running.number))
        self._finish(running)

    def _finish(self, running: RunningLoad) -> None:
        del self._running[running.number]
        self._stats.pages_loaded += running.copied
        self._answer(running.end(self._load_costs, self._clock()))

    def _refuse_saves(self) -> None:
        """Answers all pages that wait to be saved: they are not."""
        with self._changed:
            saves = list(self._saves)
            self._saves.clear()
            self._num_uncopied += len(saves)
        self._refuse(saves)

    def _refuse(self, saves: Iterable[Save]) -> None:
        for save in saves:
            self._stats.pages_refused += 1
            self._answer(Saved(save.page, False))

    def _answer(self, answer: Answer) -> None:
        with self._changed:
            self._num_saving -= isinstance(answer, Saved)
            self._answers.append(answer)
            self._changed.notify()
