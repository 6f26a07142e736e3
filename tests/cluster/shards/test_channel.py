"""What connects a group and its ranks, over real sockets: nothing is lost, and whoever is lost is missed."""

import contextlib
import select
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import pytest
import zmq

from cluster.shards import channel as channel_module
from cluster.shards import door as door_module
from cluster.shards import link as link_module
from cluster.shards import sealed as sealed_module
from cluster.shards.channel import ChannelClosed, GroupChannel, RankChannel
from cluster.shards.door import Door, Keys
from cluster.shards.fields import MAX_BYTES
from cluster.shards.sealed import FarLink, Seal, StreamKeys
from cluster.shards.watch import Loss
from cluster.shards.wire import Alive, Beat, without_edits
from engine.batch import Batch, Edit, StepOutput, StepStats
from tests.cluster.shards.batches import decodes, same

PATIENCE_S = 10.0


class Rig:
    """A group and those of its ranks that a test has let in."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.losses: list[Loss] = []
        self.orphans: list[int] = []
        self._groups: list[GroupChannel] = []
        self._ranks: list[RankChannel] = []

    def group(self, *near: bool, answering: int = 0, address: str = "127.0.0.1") -> GroupChannel:
        self._groups.append(GroupChannel(near, answering, address, self.folder, self.losses.append))
        return self._groups[-1]

    def rank(self, door: Door) -> RankChannel:
        self._ranks.append(RankChannel(door, lambda: self.orphans.append(door.rank)))
        return self._ranks[-1]

    def joined(
        self, *near: bool, answering: int = 0, address: str = "127.0.0.1"
    ) -> tuple[GroupChannel, list[RankChannel]]:
        group = self.group(*near, answering=answering, address=address)
        ranks = [self.rank(door) for door in group.doors]
        group.arm()
        return group, ranks

    def close(self) -> None:
        for each in (*self._ranks, *self._groups):
            each.close()


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    made = Rig(tmp_path)
    yield made
    made.close()
    assert list(tmp_path.iterdir()) == [], "files are left"


def until(condition: Callable[[], bool]) -> float:
    """Seconds until it is so."""
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < PATIENCE_S, "it did not come true in time"
        time.sleep(0.005)
    return time.monotonic() - began


@pytest.mark.parametrize("near", [(True, True), (False, False), (True, False)])
def test_every_rank_gets_every_batch_in_order_and_the_answering_one_is_heard(rig: Rig, near: tuple[bool, ...]) -> None:
    group, ranks = rig.joined(*near, answering=1)
    sent = [decodes(4, step=step) for step in range(1, 51)]
    for batch in sent:
        group.send(batch)
    for rank in ranks:
        assert all(same(rank.receive(), batch) for batch in sent)
    for batch in sent:
        ranks[1].send(StepOutput(batch.step, [1], [None], [], StepStats(1, 1, 0.0)))
    got = [group.receive() for _ in sent]
    assert [output.step for output in got if isinstance(output, StepOutput)] == [batch.step for batch in sent]


def test_nodes_may_have_addresses_of_either_kind(rig: Rig) -> None:
    with contextlib.closing(socket.socket(socket.AF_INET6)) as probe:
        try:
            probe.bind(("::1", 0))
        except OSError as error:
            pytest.skip(f"this machine has no IPv6: {error}")
    group, ranks = rig.joined(False, address="::1")
    group.send(decodes(1))
    assert isinstance(ranks[0].receive(), Batch)


def test_edits_go_to_the_rank_that_draws_alone(rig: Rig) -> None:
    group, ranks = rig.joined(True, False, True, answering=1)
    batch = decodes(2)
    batch = replace(batch, samples=replace(batch.samples, edits={1: Edit(allowed=np.arange(1000))}))
    group.send(batch)
    got = [rank.receive() for rank in ranks]
    assert same(got[1], batch)
    assert same(got[0], without_edits(batch)) and same(got[2], without_edits(batch))


def test_nothing_is_sent_before_all_are_there(rig: Rig) -> None:
    group = rig.group(True, True)
    first = rig.rank(group.doors[0])
    armed = threading.Thread(target=group.arm)
    armed.start()
    armed.join(0.2)
    assert armed.is_alive(), "a rank is still missing"
    second = rig.rank(group.doors[1])
    armed.join(PATIENCE_S)
    assert not armed.is_alive()
    group.send(decodes(1))
    assert isinstance(first.receive(), Batch) and isinstance(second.receive(), Batch)


def test_a_rank_that_does_not_come_is_lost(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(channel_module, "CONNECT_TIMEOUT_S", 0.2)
    group = rig.group(True, True)
    rig.rank(group.doors[0])
    with pytest.raises(ChannelClosed):
        group.arm()
    assert group.loss == Loss(1, "it has not come in 0.2 s")


@pytest.mark.parametrize("near", [True, False])
def test_a_rank_that_takes_no_more_is_lost(rig: Rig, monkeypatch: pytest.MonkeyPatch, near: bool) -> None:
    """However long it goes on beating."""
    monkeypatch.setattr(door_module, "HIGH_WATER", 2)
    monkeypatch.setattr(link_module, "TAKE_TIMEOUT_S", 0.2)
    group, _ = rig.joined(near, near)
    with pytest.raises(ChannelClosed):
        for step in range(10_000):
            group.send(decodes(32, step=step))
    assert group.loss is not None and group.loss.reason == "it takes no more messages"


@pytest.mark.parametrize("near", [True, False])
def test_neither_end_waits_for_the_other_to_take_more_than_a_buffer_holds(
    rig: Rig, monkeypatch: pytest.MonkeyPatch, near: bool
) -> None:
    monkeypatch.setattr(link_module, "TAKE_TIMEOUT_S", 0.2)
    group, (rank,) = rig.joined(near)
    batches = [decodes(64, context=100_000, step=step) for step in range(1, 7)]
    output = StepOutput(1, [5] * 100_000, [None] * 100_000, [], StepStats(1, 1, 0.0))
    for batch in batches:
        group.send(batch)
        rank.send(output)
    assert all(same(rank.receive(), batch) for batch in batches)
    assert all(group.receive() == output for _ in batches) and group.loss is None


def test_beats_tell_how_far_a_rank_is(rig: Rig) -> None:
    group, ranks = rig.joined(True, True)
    ranks[1].finished = 12
    until(lambda: group.finished == (0, 12))


def test_beats_tell_for_how_long_a_rank_had_nothing_to_run(rig: Rig) -> None:
    group, ranks = rig.joined(True, True)
    assert group.waited_s == (0.0, 0.0)
    ranks[0].waited_s = 2.5
    until(lambda: group.waited_s == (2.5, 0.0))


def test_a_fault_ends_whoever_waits_with_its_reason(rig: Rig) -> None:
    group, ranks = rig.joined(True, True)
    threading.Timer(0.1, lambda: ranks[1].fault("no memory")).start()
    with pytest.raises(ChannelClosed):
        group.receive()
    assert group.loss == Loss(1, "no memory") and rig.losses == [group.loss]
    with pytest.raises(ChannelClosed):
        group.send(decodes(1))


def test_a_rank_that_says_nothing_any_more_is_lost_in_less_than_two_seconds(rig: Rig) -> None:
    group, ranks = rig.joined(False, True)
    # Its connections stay: it hangs.
    ranks[0]._closing = True
    ranks[0]._pulse.join(PATIENCE_S)
    began = time.monotonic()
    with pytest.raises(ChannelClosed):
        group.receive()
    ranks[0]._closing = False
    assert group.loss is not None and group.loss.rank == 0 and "silent" in group.loss.reason
    assert time.monotonic() - began < 2


@pytest.mark.parametrize("near", [True, False])
@pytest.mark.parametrize("answering", [0, 1])
def test_a_rank_that_ends_is_lost_at_once(rig: Rig, near: bool, answering: int) -> None:
    """Whether somebody waits for its answer or not, on this node or another."""
    group, ranks = rig.joined(near, near, answering=answering)
    began = time.monotonic()
    ranks[0].close()
    with pytest.raises(ChannelClosed):
        group.receive()
    assert group.loss == Loss(0, "its process has ended") and rig.losses == [group.loss]
    assert time.monotonic() - began < 0.5


def test_a_process_that_is_gone_is_lost_at_once_though_nobody_waits(rig: Rig) -> None:
    group, _ = rig.joined(True, True)
    group.gone(1, "killed")
    assert until(lambda: bool(rig.losses)) < 0.5
    assert rig.losses == [Loss(1, "killed")]


def test_what_had_arrived_before_a_loss_is_still_received(rig: Rig) -> None:
    group, ranks = rig.joined(True, True)
    ranks[0].send(Beat(1, 0.5))
    assert select.select([group._links[0].readable], [], [], PATIENCE_S)[0]
    group.gone(1, "killed")
    until(lambda: group.loss is not None)
    assert group.receive() == Beat(1, 0.5)
    with pytest.raises(ChannelClosed):
        group.receive()


def test_what_is_no_message_is_the_fault_of_who_sent_it(rig: Rig) -> None:
    group, _ = rig.joined(True, True)
    with zmq.Context() as context, group.doors[1].connect(context, group.doors[1].pulse) as stranger:
        stranger.send(b"\x93nonsense")
        until(lambda: group.loss is not None)
    assert group.loss is not None and group.loss.rank == 1 and "no message" in group.loss.reason


def test_ranks_whose_group_is_gone_notice(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(channel_module, "GROUP_PATIENCE_S", 0.6)
    group, _ = rig.joined(True, True)
    time.sleep(1.2)
    assert rig.orphans == [], "the group says that it is alive"
    group.close()
    until(lambda: sorted(rig.orphans) == [0, 1])


def test_a_rank_that_waits_notices_at_once(rig: Rig) -> None:
    group, ranks = rig.joined(True, True)
    closing = threading.Timer(0.1, group.close)
    closing.start()
    began = time.monotonic()
    with pytest.raises(ChannelClosed):
        ranks[0].receive()
    assert rig.orphans == [0] and time.monotonic() - began < 0.5
    closing.join()


def test_the_folder_of_the_sockets_is_private(rig: Rig) -> None:
    group = rig.group(True)
    (folder,) = rig.folder.iterdir()
    assert folder.stat().st_mode & 0o777 == 0o700
    assert group.doors[0].folder == str(folder)
    assert {path.name for path in folder.iterdir()} == {"lock", "work0", "pulse0", "pages0"}


def test_a_folder_with_a_long_name_is_not_used(rig: Rig) -> None:
    deep = rig.folder / ("x" * 100)
    deep.mkdir()
    group = GroupChannel([True], 0, "127.0.0.1", deep, rig.losses.append)
    try:
        assert not list(deep.iterdir()) and len(group.doors[0].work) < 107
    finally:
        group.close()
    assert not Path(group.doors[0].folder).exists()
    deep.rmdir()


class TestRanksOfOtherNodes:
    def test_one_with_its_keys_is_let_in_and_they_are_not_shown(self, rig: Rig) -> None:
        group, ranks = rig.joined(False)
        keys = group.doors[0].keys
        assert keys is not None and keys.secret.decode() not in repr(group.doors) + repr(keys)
        group.send(decodes(1))
        assert isinstance(ranks[0].receive(), Batch)

    @pytest.mark.parametrize("known", ["nothing", "the group's key", "the keys of another rank"])
    def test_a_stranger_is_not(self, rig: Rig, known: str) -> None:
        group = rig.group(False, False)
        door, other = group.doors
        public, secret = zmq.curve_keypair()
        assert door.keys is not None and other.keys is not None
        stranger = {
            "nothing": replace(door, keys=None),
            "the group's key": replace(door, keys=Keys(door.keys.group, public, secret, StreamKeys.new())),
            "the keys of another rank": replace(door, keys=other.keys),
        }[known]
        for endpoint in (stranger.long, stranger.pulse, stranger.pages):
            with zmq.Context() as context, stranger.connect(context, endpoint) as made:
                assert not made.poll(200, zmq.POLLOUT)
        assert group.loss is None

    @pytest.mark.parametrize("known", ["nothing", "other keys", "no hello"])
    def test_a_rank_is_let_in_after_strangers_on_its_stream(
        self, rig: Rig, monkeypatch: pytest.MonkeyPatch, known: str
    ) -> None:
        monkeypatch.setattr(sealed_module, "HELLO_TIMEOUT_S", 0.1)
        group = rig.group(False)
        (door,) = group.doors
        where = urlsplit(door.work)
        assert where.hostname is not None and where.port is not None
        with contextlib.closing(socket.create_connection((where.hostname, where.port))) as stranger:
            if known == "other keys":
                hello = Seal(StreamKeys.new().to_group).close(b"hello")
                stranger.sendall(len(hello).to_bytes(4, "little") + hello)
            elif known == "no hello":
                stranger.sendall(b"\0" * 1000)
            ranks = [rig.rank(door)]
            group.arm()
        group.send(decodes(1))
        assert isinstance(ranks[0].receive(), Batch)

    def test_addresses_are_those_of_the_node(self, rig: Rig) -> None:
        door = rig.group(False).doors[0]
        assert door.work.startswith("tcp://127.0.0.1:") and door.folder == ""


def test_sockets_are_bounded_and_forget_what_was_not_sent(rig: Rig) -> None:
    group, ranks = rig.joined(True, False)
    far = [each._beside for each in (group._links[1], ranks[1]._link) if isinstance(each, FarLink)]
    assert len(far) == 2
    for made in (*far, *group._doors.pulse, *group.pages):
        assert made.linger == 0 and 0 < made.sndhwm < 10_000 and 0 < made.rcvhwm < 10_000
        assert made.maxmsgsize == MAX_BYTES


def test_what_a_group_that_was_killed_has_left_is_removed_by_the_next(rig: Rig) -> None:
    group = rig.group(True)
    abandoned, unknown = rig.folder / "ranks-dead", rig.folder / "ranks-mine"
    for each in (abandoned, unknown):
        each.mkdir()
        (each / "work0").touch()
    (abandoned / "lock").touch()
    rig.group(True)
    assert not abandoned.exists() and unknown.exists()
    assert Path(group.doors[0].folder).exists(), "its group lives"
    (unknown / "work0").unlink()
    unknown.rmdir()


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def test_nothing_is_left_open(rig: Rig) -> None:
    before = open_files()
    group, ranks = rig.joined(True, True)
    group.send(Alive())
    for each in (*ranks, group):
        each.close()
    until(lambda: open_files() <= before)
    with pytest.raises(ChannelClosed):
        group.receive()
