"""What is sealed on a stream between nodes: whole and in order it arrives, and anything else is refused."""

import errno
import os
import socket
from collections.abc import Callable, Iterator

import pytest
import zmq

from cluster.kv.wire import WireError
from cluster.shards.link import INLINE_BYTES
from cluster.shards.sealed import FarLink, Seal, StreamKeys

KEYS = StreamKeys.new()
Pair = tuple[FarLink, FarLink, socket.socket]


def frame(sealed: bytes) -> bytes:
    return len(sealed).to_bytes(4, "little") + sealed


@pytest.fixture
def pair() -> Iterator[Pair]:
    """The group's end, the rank's, and the bare socket under the latter."""
    listener = socket.create_server(("127.0.0.1", 0))
    theirs = socket.create_connection(listener.getsockname())
    ours, _ = listener.accept()
    listener.close()
    with zmq.Context() as context, context.socket(zmq.PAIR) as one, context.socket(zmq.PAIR) as other:
        one.bind("inproc://long")
        other.connect("inproc://long")
        group = FarLink(ours, Seal(KEYS.to_rank), Seal(KEYS.to_group), one)
        rank = FarLink(theirs, Seal(KEYS.to_group), Seal(KEYS.to_rank), other)
        yield group, rank, theirs
        group.close()
        rank.close()


def test_messages_of_all_lengths_come_in_order_both_ways(pair: Pair) -> None:
    group, rank, _ = pair
    sent = [os.urandom(count) for count in (1, INLINE_BYTES, INLINE_BYTES + 1, 3, 5_000_000, INLINE_BYTES + 1, 2)]
    for one, other in ((group, rank), (rank, group)):
        received = []
        for each in sent:
            one.send(each)
            received.append(bytes(other.receive()))
        assert received == sent


def test_messages_that_are_read_at_once_and_one_that_comes_in_pieces(pair: Pair) -> None:
    group, _, theirs = pair
    seal = Seal(KEYS.to_group)
    first, second, third = (frame(seal.close(text)) for text in (b"first", b"second", b"third"))
    theirs.sendall(first + second + third[:2])
    assert group.receive() == b"first"
    assert group.has_more, "nothing may be left to be read, and nobody who waits for that would see the second"
    assert group.receive() == b"second"
    assert not group.has_more
    theirs.sendall(third[2:7])
    assert not group.has_more
    theirs.sendall(third[7:])
    assert group.receive() == b"third"


def test_what_was_sent_is_not_what_goes_over_the_network(pair: Pair) -> None:
    group, _, theirs = pair
    group.send(b"a prompt of somebody")
    assert b"prompt" not in theirs.recv(1000)


@pytest.mark.parametrize(
    "wrong",
    [
        pytest.param(lambda first, second: second, id="out of order"),
        pytest.param(lambda first, second: first[:-1] + bytes([first[-1] ^ 1]), id="changed"),
        pytest.param(lambda first, second: first[:-1], id="cut short"),
        pytest.param(lambda first, second: Seal(StreamKeys.new().to_group).close(b"first"), id="with another key"),
        pytest.param(lambda first, second: Seal(KEYS.to_rank).close(b"first"), id="the group's own"),
        pytest.param(lambda first, second: b"", id="not sealed"),
    ],
)
def test_anything_else_is_refused(pair: Pair, wrong: Callable[[bytes, bytes], bytes]) -> None:
    group, _, theirs = pair
    seal = Seal(KEYS.to_group)
    first, second = seal.close(b"first"), seal.close(b"second")
    theirs.sendall(frame(wrong(first, second)))
    with pytest.raises(WireError, match="not sealed by the other end, or not as the next one"):
        group.receive()


def test_what_was_received_is_not_received_again(pair: Pair) -> None:
    group, _, theirs = pair
    first = frame(Seal(KEYS.to_group).close(b"first"))
    theirs.sendall(first + first)
    assert group.receive() == b"first"
    with pytest.raises(WireError):
        group.receive()


def test_more_than_goes_over_the_stream_is_not_read(pair: Pair) -> None:
    group, _, theirs = pair
    theirs.sendall((INLINE_BYTES + 100).to_bytes(4, "little"))
    with pytest.raises(WireError, match="are the most"):
        group.receive()


def test_an_end_that_is_gone_is_said_though_a_long_message_was_announced(pair: Pair) -> None:
    group, _, theirs = pair
    theirs.sendall(frame(Seal(KEYS.to_group).close(b"")))
    theirs.close()
    with pytest.raises(ConnectionError):
        group.receive()


class NoWay(socket.socket):
    """Of a host that was cut off: the system says more than that a connection has ended."""

    def sendall(self, *_: object) -> None:
        raise OSError(errno.EHOSTUNREACH, "no route to host")

    def recv_into(self, *_: object) -> int:
        raise OSError(errno.EHOSTUNREACH, "no route to host")


def test_a_host_that_cannot_be_reached_any_more_is_gone() -> None:
    with zmq.Context() as context, NoWay() as connection:
        link = FarLink(connection, Seal(KEYS.to_rank), Seal(KEYS.to_group), context.socket(zmq.PAIR))
        with pytest.raises(ConnectionError, match="no route to host"):
            link.send(b"batch")
        with pytest.raises(ConnectionError, match="no route to host"):
            link.receive()
        link.close()
