"""Which replica takes the next request: fewest outstanding tokens. Decisions and their books only.

Owns the rule (`choose`) and one gateway's account of the replicas and loads it knows of (`Ledger`). Knows nothing of
Ray: `deployments.router_adapter` fits both to Serve's request router.
"""

import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b

REPORT_LIFETIME_S = 2.0
"""For how long a replica's word about its load is believed; a replica without work of ours sends no frames."""

AVOID_S = 15.0
"""For how long a replica that takes nothing, or does not answer, comes last; Serve replaces it meanwhile."""


class ReplicaGone(Exception):
    """A call is meant for one replica, and the router does not know that replica any more."""


def choose(candidates: Sequence[str], outstanding: Mapping[str, int], request_id: str) -> list[str]:
    """Ranks `candidates`, replica ids, by outstanding tokens, fewest first; a replica without an entry has none.

    Equals are ordered by a hash of request and replica, so that no replica is everyone's first choice and the same
    request always sees the same order.
    """
    return sorted(candidates, key=lambda replica: (outstanding.get(replica, 0), _lot(request_id, replica)))


@dataclass(slots=True)
class _Debt:
    replica_id: str
    tokens: int


@dataclass(frozen=True, slots=True)
class _Released:
    """What was left of a request when it was released: the replica may report it until it has heard of that."""

    replica_id: str
    tokens: int
    until: float


@dataclass(frozen=True, slots=True)
class _Report:
    others: int
    """Tokens that other gateways had outstanding there."""
    at: float


class Ledger(Mapping[str, int]):
    """Replica id -> outstanding tokens: this gateway's own, exactly, plus what other gateways had at the last report.

    A request counts from the moment it is placed, before any replica has heard of it, so a burst of requests that
    arrive together spreads as if they had come one after another. It is shared between the gateway's event loop and
    the router's, which may be another thread's. When pickled it becomes an empty dict: it means nothing elsewhere.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._debts: dict[str, _Debt] = {}
        self._expected: set[str] = set()
        """Requests that may be booked: a router may place one long after whoever sent it has given it up."""
        self._own: dict[str, int] = {}
        self._reports: dict[str, _Report] = {}
        self._released: list[_Released] = []
        self._avoided: dict[str, float] = {}
        """Replica id -> when it stops coming last."""
        self._listed: frozenset[str] | None = None
        """The replicas that Serve sends requests to; None until it has said so."""

    def update_list(self, replica_ids: Sequence[str]) -> None:
        """Takes note of which replicas Serve sends requests to. One that is to end leaves this list first."""
        with self._lock:
            self._listed = frozenset(replica_ids)

    @property
    def listed(self) -> frozenset[str] | None:
        """The replicas that Serve sends requests to; None until it has said so."""
        return self._listed

    def is_leaving(self, replica_id: str) -> bool:
        """Whether a replica is on the list no more: it drains, or it is dead."""
        return self._listed is not None and replica_id not in self._listed

    def has_place(self, fit: Collection[str]) -> bool:
        """Whether one of these replicas is on the list and takes requests, as far as is known."""
        with self._lock:
            now = self._clock()
            return any(replica in fit and self._avoided.get(replica, now) <= now for replica in self._listed or ())

    def expect(self, request_id: str) -> None:
        """A request is about to be sent: it may be booked until it is released."""
        with self._lock:
            self._expected.add(request_id)

    def place(
        self, request_id: str, cost: int, candidates: Sequence[str], unfit: Collection[str] = frozenset()
    ) -> list[str]:
        """Ranks `candidates` for a request and books its `cost` tokens on the first; a request is booked only once, and
        only while it is expected. `unfit`: replicas that cannot serve it; they come last, as that is not certain."""
        with self._lock:
            self._settle(request_id)
            loads = {replica: self._load(replica) for replica in candidates}
            now = self._clock()
            tiers: tuple[list[str], list[str], list[str]] = ([], [], [])
            for replica in candidates:
                tiers[2 if replica in unfit else 1 if self._avoided.get(replica, now) > now else 0].append(replica)
            ranked = [replica for tier in tiers for replica in choose(tier, loads, request_id)]
            if ranked and request_id in self._expected:
                self._book(request_id, ranked[0], cost)
            return ranked

    def assign(self, request_id: str, replica_id: str) -> None:
        """Moves a placed request to the replica that took it, which need not be the one ranked first."""
        with self._lock:
            debt = self._debts.get(request_id)
            if debt is not None and debt.replica_id != replica_id:
                self._settle(request_id)
                self._book(request_id, replica_id, debt.tokens)

    def spend(self, request_id: str, tokens: int) -> None:
        """Counts `tokens` of a placed request as done."""
        with self._lock:
            debt = self._debts.get(request_id)
            if debt is not None:
                tokens = min(tokens, debt.tokens)
                debt.tokens -= tokens
                self._own[debt.replica_id] = self._own.get(debt.replica_id, 0) - tokens

    def release(self, request_id: str) -> None:
        """Forgets a request, finished or not; unknown ones are ignored.

        What was left of it is not taken for another gateway's work when it turns up in a report that was on its way.
        """
        with self._lock:
            self._expected.discard(request_id)
            debt = self._debts.get(request_id)
            if debt is not None and debt.tokens:
                now = self._clock()
                self._released = [each for each in self._released if each.until > now]
                self._released.append(_Released(debt.replica_id, debt.tokens, now + REPORT_LIFETIME_S))
            self._settle(request_id)

    def observe(self, replica_id: str, outstanding_tokens: int) -> None:
        """Takes a replica's own count of its outstanding tokens, all gateways' together."""
        with self._lock:
            now = self._clock()
            late = sum(each.tokens for each in self._released if each.replica_id == replica_id and each.until > now)
            others = max(0, outstanding_tokens - self._own.get(replica_id, 0) - late)
            self._reports[replica_id] = _Report(others, now)

    def avoid(self, replica_id: str) -> None:
        """Ranks a replica last for a while: it answers, but takes no requests."""
        with self._lock:
            now = self._clock()
            self._avoided = {replica: until for replica, until in self._avoided.items() if until > now}
            self._avoided[replica_id] = now + AVOID_S

    def avoid_place_of(self, request_id: str) -> str | None:
        """The same for the replica that a request was placed on, if it was; that replica."""
        with self._lock:
            debt = self._debts.get(request_id)
        if debt is None:
            return None
        self.avoid(debt.replica_id)
        return debt.replica_id

    def forget(self, replica_id: str) -> None:
        """Drops what a replica that is gone has reported; its requests are released one by one."""
        with self._lock:
            self._reports.pop(replica_id, None)

    def __getitem__(self, replica_id: str) -> int:
        with self._lock:
            if replica_id not in self._own and replica_id not in self._reports:
                raise KeyError(replica_id)
            return self._load(replica_id)

    def __iter__(self) -> Iterator[str]:
        with self._lock:
            return iter(sorted(self._own.keys() | self._reports.keys()))

    def __len__(self) -> int:
        with self._lock:
            return len(self._own.keys() | self._reports.keys())

    def __reduce__(self) -> tuple[type[dict[str, int]], tuple[()]]:
        return dict, ()

    def _load(self, replica_id: str) -> int:
        report = self._reports.get(replica_id)
        fresh = report is not None and self._clock() - report.at <= REPORT_LIFETIME_S
        return self._own.get(replica_id, 0) + (report.others if report is not None and fresh else 0)

    def _book(self, request_id: str, replica_id: str, tokens: int) -> None:
        self._debts[request_id] = _Debt(replica_id, tokens)
        self._own[replica_id] = self._own.get(replica_id, 0) + tokens

    def _settle(self, request_id: str) -> None:
        debt = self._debts.pop(request_id, None)
        if debt is None:
            return
        rest = self._own.get(debt.replica_id, 0) - debt.tokens
        if rest:
            self._own[debt.replica_id] = rest
        else:
            self._own.pop(debt.replica_id, None)


def _lot(request_id: str, replica_id: str) -> bytes:
    # Not a checksum: those are linear, and the same difference would decide between two replicas for every request.
    return blake2b(f"{request_id}/{replica_id}".encode(), digest_size=8).digest()
