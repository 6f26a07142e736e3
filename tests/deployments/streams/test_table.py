"""Whose a stream is, and what is kept within which bounds."""

from array import array
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from deployments.messages import ModelCard
from deployments.streams.messages import Answer, Growth, Opened, Report, StreamSpec
from deployments.streams.table import StreamTable
from deployments.streams.token_log import TokenLog
from engine.sequence import Emission
from tests.deployments.streams.gateways import Clock

CARD = ModelCard("tiny", "/models/tiny", 256, 320, (0,), 0, "tiny-1")
SPEC = StreamSpec("chat", b"{}", (array("I", [1, 2]),), (7,), "chatcmpl-1", 0, CARD)
GRACE_S, LEASE_S = 60.0, 5.0
IDS = [f"stream-{number}" for number in range(4)]
GATEWAYS = ["a", "b", "c"]


@pytest.fixture
def clock() -> Clock:
    return Clock()


def table_of(clock: Clock, **limits: int) -> StreamTable:
    bounds: dict[str, Any] = {"max_streams": 100, "max_bytes": 1 << 20, **limits}
    return StreamTable(grace_s=GRACE_S, lease_s=LEASE_S, clock=clock, **bounds)


def log_of(count: int) -> TokenLog:
    log = TokenLog()
    for token in range(count):
        log.append(0, Emission("", 0, (token,)))
    return log


def opened(stream_id: str = "s", count: int = 0, *, attended: bool = True, finished: bool = False) -> Opened:
    return Opened(stream_id, SPEC, log_of(count).since(0), attended, finished)


def grown(
    stream_id: str = "s", start: int = 0, end: int = 0, *, attended: bool = True, finished: bool = False
) -> Growth:
    return Growth(stream_id, start, log_of(end).since(start), attended, finished)


def tokens(table: StreamTable, gateway: str, stream_id: str = "s") -> list[int] | None:
    kept = table.claim(gateway, stream_id)
    return None if kept is None else [emission.token_ids[0] for _, emission in TokenLog.of(kept.log)]


def test_what_was_reported_is_what_the_next_gateway_gets(clock: Clock) -> None:
    table = table_of(clock)
    assert table.report(Report("a", opened=(opened(),))) == Answer()
    assert table.report(Report("a", grown=(grown(end=3),))) == Answer()
    assert table.report(Report("a", grown=(grown(start=2, end=5),))) == Answer(), "a part that was sent again"
    assert tokens(table, "b") == [0, 1, 2, 3, 4]
    assert table.report(Report("a", grown=(grown(start=5, end=6),))) == Answer(taken=("s",))
    assert table.report(Report("b", grown=(grown(start=5, end=6),))) == Answer()


def test_a_gap_or_an_unknown_stream_is_to_be_sent_whole(clock: Clock) -> None:
    table = table_of(clock)
    assert table.report(Report("a", grown=(grown(end=3),))) == Answer(unknown=("s",))
    table.report(Report("a", opened=(opened(count=3),)))
    assert table.report(Report("a", grown=(grown(start=4, end=5),))) == Answer(unknown=("s",))


def test_a_stream_of_which_nothing_was_heard_goes_to_who_has_room(clock: Clock) -> None:
    table = table_of(clock)
    table.report(Report("a", opened=tuple(opened(stream_id, 2) for stream_id in IDS)))
    clock.now = LEASE_S - 1
    table.report(Report("a", grown=(grown(IDS[0], 2, 2),)))
    assert table.report(Report("b", room=10)).orphans == ()
    clock.now = LEASE_S + 1
    assert table.report(Report("b", room=0)).orphans == ()
    assert [kept.stream_id for kept in table.report(Report("b", room=2)).orphans] == IDS[1:3]
    assert [kept.stream_id for kept in table.report(Report("c", room=9)).orphans] == IDS[3:]
    # The answer may have been lost on the way: who says nothing of them has not got them.
    clock.now += LEASE_S + 1
    assert {kept.stream_id for kept in table.report(Report("c", room=9)).orphans} == set(IDS)


def test_of_two_that_go_on_with_a_stream_the_one_whose_client_reads_keeps_it(clock: Clock) -> None:
    table = table_of(clock)
    table.report(Report("slow", opened=(opened(count=2),)))
    clock.now = LEASE_S + 1
    assert table.report(Report("b", room=1)).orphans
    assert table.report(Report("slow", grown=(grown(start=2, end=4),))) == Answer(unknown=("s",))
    assert table.report(Report("slow", opened=(opened(count=4),))) == Answer()
    assert table.report(Report("b", grown=(grown(start=2, end=9, attended=False),))) == Answer(taken=("s",))
    assert tokens(table, "b") == [0, 1, 2, 3], "but a client that comes gets it wherever it comes"
    assert table.report(Report("slow", opened=(opened(count=4),))) == Answer(taken=("s",))


def test_complete_answers_are_kept_for_the_grace_period_and_live_ones_for_as_long_as_they_live(clock: Clock) -> None:
    table = table_of(clock)
    table.report(Report("a", opened=(opened("done", 2, finished=True), opened("live"))))
    for _ in range(20):
        clock.now += 4
        table.report(Report("a", grown=(grown("live"),)))
        assert (tokens(table, "b", "done") is None) == (clock.now > GRACE_S)
    assert len(table) == 1
    # An orphan that nobody has room for, and nobody asks for.
    clock.now += GRACE_S + LEASE_S + 1
    assert table.claim("b", "live") is None
    assert (len(table), table.num_bytes) == (0, 0)


def test_a_complete_answer_stays_where_it_is_when_it_is_read(clock: Clock) -> None:
    table = table_of(clock)
    table.report(Report("a", opened=(opened(count=2, finished=True),)))
    kept = table.claim("b", "s")
    assert kept is not None and kept.finished
    clock.now = LEASE_S + 1
    assert table.report(Report("b", room=9)).orphans == ()


def test_only_its_gateway_closes_a_stream(clock: Clock) -> None:
    table = table_of(clock)
    table.report(Report("a", opened=(opened(),)))
    table.report(Report("b", closed=("s", "unknown")))
    assert len(table) == 1
    table.report(Report("a", closed=("s",)))
    assert (len(table), table.num_bytes) == (0, 0)


def test_complete_answers_make_room_for_live_streams_oldest_first_and_then_there_is_none(clock: Clock) -> None:
    table = table_of(clock, max_streams=2)
    for stream_id in ("first", "second"):
        clock.now += 1
        table.report(Report("a", opened=(opened(stream_id, finished=True),)))
    assert table.report(Report("a", opened=(opened("third"),))) == Answer()
    assert table.claim("b", "first") is None and table.claim("b", "second") is not None
    assert table.report(Report("a", opened=(opened("fourth"), opened("fifth")))) == Answer(refused=("fifth",))


def test_a_stream_that_outgrows_the_memory_is_no_longer_kept(clock: Clock) -> None:
    table = table_of(clock, max_bytes=2 * SPEC.num_bytes + 800)
    table.report(Report("a", opened=(opened("s"), opened("t"))))
    assert table.report(Report("a", grown=(grown("s", 0, 90),))) == Answer()
    assert table.report(Report("a", grown=(grown("t", 0, 90),))) == Answer(refused=("t",))
    assert table.num_bytes <= 2 * SPEC.num_bytes + 800
    assert tokens(table, "b", "s") == list(range(90))


@settings(max_examples=60, stateful_step_count=40)
class Table(RuleBasedStateMachine):
    """Anything that gateways may say, in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.clock = Clock()
        self.table = table_of(self.clock, max_streams=3, max_bytes=3 * SPEC.num_bytes + 400)

    @rule(
        gateway=st.sampled_from(GATEWAYS),
        stream_id=st.sampled_from(IDS),
        count=st.integers(0, 40),
        attended=st.booleans(),
        finished=st.booleans(),
    )
    def open(self, gateway: str, stream_id: str, count: int, attended: bool, finished: bool) -> None:
        self.table.report(Report(gateway, opened=(opened(stream_id, count, attended=attended, finished=finished),)))

    @rule(
        gateway=st.sampled_from(GATEWAYS),
        stream_id=st.sampled_from(IDS),
        start=st.integers(0, 40),
        more=st.integers(0, 30),
        finished=st.booleans(),
    )
    def grow(self, gateway: str, stream_id: str, start: int, more: int, finished: bool) -> None:
        self.table.report(Report(gateway, grown=(grown(stream_id, start, start + more, finished=finished),)))

    @rule(gateway=st.sampled_from(GATEWAYS), stream_id=st.sampled_from(IDS))
    def close(self, gateway: str, stream_id: str) -> None:
        self.table.report(Report(gateway, closed=(stream_id,)))

    @rule(gateway=st.sampled_from(GATEWAYS), room=st.integers(0, 3))
    def adopt(self, gateway: str, room: int) -> None:
        orphans = self.table.report(Report(gateway, room=room)).orphans
        assert len(orphans) <= room
        assert self.table.report(Report("another", room=9)).orphans == () or len(orphans) == room

    @rule(gateway=st.sampled_from(GATEWAYS), stream_id=st.sampled_from(IDS))
    def claim(self, gateway: str, stream_id: str) -> None:
        found = tokens(self.table, gateway, stream_id)
        assert found is None or found == list(range(len(found)))

    @rule(seconds=st.sampled_from([1.0, LEASE_S + 1, GRACE_S + 1]))
    def wait(self, seconds: float) -> None:
        self.clock.now += seconds

    @invariant()
    def is_bounded_and_adds_up(self) -> None:
        assert len(self.table) <= 3
        assert self.table.num_bytes <= 3 * SPEC.num_bytes + 400
        assert self.table.num_bytes == sum(row.num_bytes for row in self.table._rows.values())


TestTable = Table.TestCase


def test_a_table_that_inherits_goes_on_as_if_it_had_been_there_all_the_time(clock: Clock) -> None:
    old, new = table_of(clock), table_of(Clock())
    old.report(Report("a", opened=(opened("done", 3, finished=True), opened("open", 2), opened("orphan", 1))))
    clock.now += LEASE_S + 1.0
    old.report(Report("a", grown=(grown("open", 2, 4),)))
    new.inherit(old.entries())
    assert (len(new), new.num_bytes) == (len(old), old.num_bytes)
    assert new.report(Report("a", grown=(grown("open", 4, 5),))) == Answer()
    (orphan,) = new.report(Report("b", room=3)).orphans
    assert orphan.stream_id == "orphan"
    assert tokens(new, "b", "done") == [0, 1, 2] and tokens(new, "b", "open") == [0, 1, 2, 3, 4]


def test_inherited_answers_are_kept_no_longer_and_take_no_more_room(clock: Clock) -> None:
    old, later = table_of(clock), Clock()
    small = table_of(later, max_streams=1)
    old.report(Report("a", opened=(opened("done", 3, finished=True), opened("other", 3, finished=True))))
    clock.now += GRACE_S - 1.0
    small.inherit(old.entries())
    assert len(small) == 1
    later.now += 2.0
    assert tokens(small, "b", "done") is None
