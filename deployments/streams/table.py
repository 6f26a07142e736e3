"""Which streams are kept, whose they are, and until when. Pure: the clock is an argument, and calls are another's.

A stream belongs to the gateway that reports it, for as long as it does: one that has not been mentioned for the time of
a lease is an orphan, and goes to the next gateway that has room. A client that reconnects moves its stream to the
gateway it reached, whoever had it. The loser learns of it with its next report.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from deployments.streams.messages import Answer, Entry, Growth, Kept, Opened, Report, StreamSpec
from deployments.streams.token_log import TokenLog

MAX_HANDED_BYTES = 16 * 2**20
"""Of orphans that one answer carries; the rest goes with the next."""


@dataclass(slots=True)
class _Row:
    """One stream."""

    spec: StreamSpec
    log: TokenLog
    owner: str
    attended: bool
    mentioned: float
    finished: float | None = None
    """When the answer was complete."""

    @property
    def num_bytes(self) -> int:
        return self.spec.num_bytes + self.log.num_bytes

    def kept(self, stream_id: str) -> Kept:
        return Kept(stream_id, self.spec, self.log.since(0), self.finished is not None)


class StreamTable:
    """The streams of an application, bounded in number, bytes and age."""

    def __init__(
        self, *, max_streams: int, max_bytes: int, grace_s: float, lease_s: float, clock: Callable[[], float]
    ) -> None:
        """`grace_s`: how long an answer is kept that is complete, or that no gateway goes on with. `clock`: seconds."""
        self._max_streams = max_streams
        self._max_bytes = max_bytes
        self._grace_s = grace_s
        self._lease_s = lease_s
        self._clock = clock
        self._rows: dict[str, _Row] = {}
        self._num_bytes = 0

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def num_bytes(self) -> int:
        """Memory of everything that is kept, estimated."""
        return self._num_bytes

    def report(self, report: Report) -> Answer:
        """Takes a gateway's news in. Saying the same again changes nothing."""
        now = self._clock()
        self._expire(now)
        owner = report.gateway_id
        for stream_id in report.closed:
            row = self._rows.get(stream_id)
            if row is not None and row.owner == owner:
                self._drop(stream_id)
        unknown: list[str] = []
        taken: list[str] = []
        refused: list[str] = []
        for opened in report.opened:
            if self._is_held_against(opened.stream_id, owner, opened.attended):
                taken.append(opened.stream_id)
            elif not self._open(opened, owner, now):
                refused.append(opened.stream_id)
        for growth in report.grown:
            row = self._rows.get(growth.stream_id)
            if self._is_held_against(growth.stream_id, owner, growth.attended):
                taken.append(growth.stream_id)
            elif row is None or row.owner != owner or growth.start > len(row.log):
                unknown.append(growth.stream_id)
            elif not self._grow(growth, row, now):
                refused.append(growth.stream_id)
        orphans = tuple(self._adopted(owner, report.room, now)) if report.room > 0 else ()
        return Answer(tuple(unknown), tuple(taken), tuple(refused), orphans)

    def claim(self, gateway_id: str, stream_id: str) -> Kept | None:
        """Gives a stream to the gateway that its client has reached; None if there is none of that name."""
        now = self._clock()
        self._expire(now)
        row = self._rows.get(stream_id)
        if row is None:
            return None
        if row.finished is None:
            row.owner, row.attended, row.mentioned = gateway_id, True, now
        return row.kept(stream_id)

    def entries(self) -> tuple[Entry, ...]:
        """Everything, for another table."""
        now = self._clock()
        return tuple(
            Entry(
                row.kept(stream_id),
                row.owner,
                row.attended,
                now - row.mentioned,
                None if row.finished is None else now - row.finished,
            )
            for stream_id, row in self._rows.items()
        )

    def inherit(self, entries: Iterable[Entry]) -> None:
        """Goes on with what another table had, as far as there is room; what is reported to this one counts more."""
        now = self._clock()
        for entry in entries:
            finished = None if entry.finished_s is None else now - entry.finished_s
            log = TokenLog.of(entry.kept.log)
            row = _Row(entry.kept.spec, log, entry.owner, entry.attended, now - entry.silent_s, finished)
            if entry.kept.stream_id not in self._rows and not self._is_over(row.num_bytes, 1):
                self._rows[entry.kept.stream_id] = row
                self._num_bytes += row.num_bytes

    def _is_held_against(self, stream_id: str, caller: str, attended: bool) -> bool:
        """Whether another gateway has the stream and keeps it: where a client reads counts more than who was late."""
        row = self._rows.get(stream_id)
        return row is not None and row.owner != caller and (row.attended or not attended)

    def _open(self, opened: Opened, owner: str, now: float) -> bool:
        if opened.stream_id in self._rows:
            self._drop(opened.stream_id)
        row = _Row(opened.spec, TokenLog.of(opened.log), owner, opened.attended, now, now if opened.finished else None)
        if not self._make_room(row.num_bytes, 1):
            return False
        self._rows[opened.stream_id] = row
        self._num_bytes += row.num_bytes
        return True

    def _grow(self, growth: Growth, row: _Row, now: float) -> bool:
        row.attended, row.mentioned = growth.attended, now
        before = row.log.num_bytes
        row.log.extend(growth.part, skip=min(len(row.log) - growth.start, len(growth.part)))
        self._num_bytes += row.log.num_bytes - before
        if growth.finished and row.finished is None:
            row.finished = now
        if not self._make_room(0, 0, spare=growth.stream_id):
            self._drop(growth.stream_id)
            return False
        return True

    def _adopted(self, owner: str, room: int, now: float) -> Iterable[Kept]:
        orphans = [
            (stream_id, row)
            for stream_id, row in self._rows.items()
            if row.finished is None and now - row.mentioned > self._lease_s
        ]
        num_bytes = 0
        for stream_id, row in orphans[:room]:
            if num_bytes > MAX_HANDED_BYTES:
                return
            num_bytes += row.num_bytes
            row.owner, row.attended, row.mentioned = owner, False, now
            yield row.kept(stream_id)

    def _make_room(self, num_bytes: int, num_streams: int, spare: str = "") -> bool:
        """Drops complete answers, oldest first, until so much more fits; whether it does."""
        complete = sorted(
            (row.finished, stream_id)
            for stream_id, row in (self._rows.items() if self._is_over(num_bytes, num_streams) else ())
            if row.finished is not None and stream_id != spare
        )
        for _, stream_id in complete:
            if not self._is_over(num_bytes, num_streams):
                break
            self._drop(stream_id)
        return not self._is_over(num_bytes, num_streams)

    def _is_over(self, num_bytes: int, num_streams: int) -> bool:
        return self._num_bytes + num_bytes > self._max_bytes or len(self._rows) + num_streams > self._max_streams

    def _expire(self, now: float) -> None:
        horizon = now - self._grace_s
        expired = [
            stream_id
            for stream_id, row in self._rows.items()
            # An orphan that no gateway has room for is not kept for ever either.
            if (row.finished if row.finished is not None else row.mentioned + self._lease_s) < horizon
        ]
        for stream_id in expired:
            self._drop(stream_id)

    def _drop(self, stream_id: str) -> None:
        self._num_bytes -= self._rows.pop(stream_id).num_bytes
