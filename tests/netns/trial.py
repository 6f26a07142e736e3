"""One host is killed, or cut off, under streams: what became of them, and when what was noticed. Owns the measuring.

All moments are seconds from the strike; what did not come about, or was not asked for, has none.
"""

import asyncio
import re
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Literal

from benchmarks.chaos_client import ask_all
from benchmarks.chaos_streams import IN_FLIGHT_S, Answer, Kind, salted
from tests.netns.cluster import GATEWAY, LOG, POLL_S, RANK, REPLICA, STORE, Cluster, until
from tests.netns.hosts import Host, is_alive

How = Literal["killed", "cut off"]
Whose = Literal["replica", "rank"]
BEGUN_EVENTS = 20
"""That each stream has brought when it happens."""
SETTLED_S = 90.0
"""For all to be as it should be again, and for what is left on a host that was cut off to end."""
_NOTICED = re.compile(r"is lost: |leave their replica: |the engine failed")
_ASK_RAY_EVERY_S = 0.1


@dataclass(frozen=True, slots=True)
class Strike:
    """What is done to whom."""

    how: How
    whose: Whose
    """The host of the replica, which drives the ranks, or one that has a rank alone."""

    def __str__(self) -> str:
        return f"host of {'the replica' if self.whose == 'replica' else 'a rank'} {self.how}"


@dataclass(slots=True)
class Report:
    """What came of it."""

    what: str
    host: str
    also_there: list[str]
    """What else of the application ran on that host."""
    cut: int
    """Answers that were under way."""
    resumed: int = 0
    """Those whose client had to come back for them."""
    noticed_s: float | None = None
    """Somebody on another host said that a rank, or the replica, is lost."""
    ended_s: float | None = None
    """The last rank of the group on another host had ended."""
    forgotten_s: float | None = None
    """Ray took the host for dead."""
    loaded_s: float | None = None
    """A new group had loaded the model."""
    went_on_s: float | None = None
    """The last of the streams had gone on."""
    orphans_s: float | None = None
    """The last rank on a host that was cut off had ended by itself."""
    complaints: list[str] = field(default_factory=list)
    """What is wrong with the answers."""


class Observer:
    """Looks out for what becomes of a group, from a strike on. A thread of its own."""

    def __init__(self, cluster: Cluster, victim: Host, report: Report, *, wants_orphans: bool) -> None:
        self._cluster = cluster
        self._victim = victim
        self._report = report
        self._others = [host for host in cluster.hosts if host is not victim]
        ranks = cluster.where(RANK)
        self._survivors = [pid for pid, host in ranks.items() if host is not victim]
        self._orphans = [pid for pid, host in ranks.items() if host is victim]
        self._said = {host.name: len(host.read(LOG)) for host in self._others}
        self._wants_orphans = wants_orphans
        self._asked_ray = 0.0
        self._began = 0.0
        self._thread = threading.Thread(target=self._look, name="observer")
        self._closing = False

    def start(self) -> float:
        """The moment from which all is counted."""
        self._began = time.monotonic()
        self._thread.start()
        return self._began

    def finish(self) -> None:
        """Returns once all that is looked out for has come about, or time is up."""
        self._thread.join(SETTLED_S)
        self._closing = True
        self._thread.join()

    def _look(self) -> None:
        report = self._report
        looks: dict[str, Callable[[], bool]] = {
            "noticed_s": lambda: bool(_NOTICED.search(self._new())),
            "ended_s": lambda: not any(map(is_alive, self._survivors)),
            "forgotten_s": self._is_forgotten,
            "loaded_s": lambda: " batches in flight, " in self._new(),
        }
        if self._wants_orphans:
            looks["orphans_s"] = lambda: not any(map(is_alive, self._orphans))
        while looks and not self._closing:
            for name in [name for name, is_so in looks.items() if is_so()]:
                setattr(report, name, time.monotonic() - self._began)
                del looks[name]
            time.sleep(POLL_S)

    def _new(self) -> str:
        """What has been said on other hosts since."""
        return "\n".join(host.read(LOG)[self._said[host.name] :] for host in self._others)

    def _is_forgotten(self) -> bool:
        if time.monotonic() - self._asked_ray < _ASK_RAY_EVERY_S:
            return False
        self._asked_ray = time.monotonic()
        return self._victim.address not in self._cluster.nodes()


def run(cluster: Cluster, strike: Strike, asked: Sequence[Kind], wanted: Sequence[Answer], salt: str) -> Report:
    """Strikes while each of `asked` is being answered; `wanted` are their answers when nothing happens.

    The host stays as it was left. Raises ClusterFailed.
    """
    victim = _victim(cluster, strike.whose)
    kinds = {"gateway": GATEWAY, "store of streams": STORE}
    also = [name for name, kind in kinds.items() if victim in cluster.where(kind).values()]
    report = Report(str(strike), victim.name, also, 0)
    observer = Observer(cluster, victim, report, wants_orphans=strike.how == "cut off")
    answers, moment = asyncio.run(_ask_under(cluster.url, salted(asked, salt), report, observer, strike, victim))
    observer.finish()
    for kind, answer, expected in zip(asked, answers, wanted, strict=True):
        found = answer.error or answer.difference(expected)
        if found is not None:
            report.complaints.append(f"{kind.name}: {found}")
    report.resumed = sum(answer.resumed or answer.repeated for answer in answers)
    report.went_on_s = max((end for answer in answers if (end := went_on(answer, moment)) is not None), default=None)
    return report


async def _ask_under(
    url: str, asked: Sequence[Kind], report: Report, observer: Observer, strike: Strike, victim: Host
) -> tuple[list[Answer], float]:
    """The answers, and when it happened."""
    answers = [Answer() for _ in asked]
    asking = asyncio.create_task(ask_all(url, asked, comes_back=True, into=answers))
    streams = [answer for kind, answer in zip(asked, answers, strict=True) if kind.body.get("stream")]
    while not all(answer.num_events >= BEGUN_EVENTS or answer.error for answer in streams) and not asking.done():
        await asyncio.sleep(POLL_S)
    report.cut = sum(not (answer.usage or answer.error) for answer in streams)
    moment = observer.start()
    await asyncio.to_thread(victim.kill if strike.how == "killed" else victim.cut)
    return await asking, moment


def _victim(cluster: Cluster, whose: Whose) -> Host:
    """Waits for the one replica and its ranks to be there."""
    until(lambda: len(cluster.where(REPLICA)) == 1 and len(cluster.where(RANK)) >= 2, "there is not one whole replica")
    (home,) = cluster.where(REPLICA).values()
    if whose == "replica":
        return home
    return next(host for host in cluster.where(RANK).values() if host is not home)


def went_on(answer: Answer, moment: float) -> float | None:
    """When a stream went on after the silence that began at a moment; None if it was over."""
    around = [
        (end - begin, end) for begin, end in pairwise(answer.times) if moment < end and begin < moment + IN_FLIGHT_S
    ]
    return max(around)[1] - moment if around else None
