"""A Unix stream between a group and a rank: messages of any length arrive whole, and what cannot be one is refused."""

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.kv.wire import WireError
from cluster.shards.fields import MAX_BYTES
from cluster.shards.link import INLINE_BYTES, NearLink


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, NearLink]]:
    """A bare end, and a link at the other."""
    theirs, ours = socket.socketpair()
    link = NearLink(ours)
    with theirs:
        yield theirs, link
    link.close()


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def test_messages_of_all_lengths_come_in_order_and_leave_nothing_open(pair: tuple[socket.socket, NearLink]) -> None:
    theirs, link = pair
    sent = [os.urandom(count) for count in (0, 1, INLINE_BYTES, INLINE_BYTES + 1, 3, 5_000_000, INLINE_BYTES + 1, 2)]
    other, before = NearLink(theirs), open_files()
    for each in sent:
        other.send(each)
    assert [bytes(link.receive()) for _ in sent] == sent
    assert open_files() == before


def test_a_length_that_comes_in_pieces_is_read(pair: tuple[socket.socket, NearLink]) -> None:
    theirs, link = pair
    theirs.send(b"\x03")
    theirs.send(b"\0\0\0abc")
    assert link.receive() == b"abc"


def test_more_than_a_message_may_have_is_not_read(pair: tuple[socket.socket, NearLink]) -> None:
    theirs, link = pair
    theirs.sendall((MAX_BYTES + 1).to_bytes(4, "little"))
    with pytest.raises(WireError, match="are the most"):
        link.receive()


@pytest.mark.parametrize("kept", [0, 99])
def test_a_file_that_is_shorter_than_announced_is_refused_and_closed(
    pair: tuple[socket.socket, NearLink], kept: int
) -> None:
    theirs, link = pair
    before = open_files()
    file = os.memfd_create("message")
    os.write(file, b"x" * kept)
    socket.send_fds(theirs, [(100).to_bytes(4, "little")], [file])
    os.close(file)
    with pytest.raises(WireError, match="shorter"):
        link.receive()
    assert open_files() == before


def test_an_end_that_is_gone_is_said(pair: tuple[socket.socket, NearLink]) -> None:
    theirs, link = pair
    theirs.send(b"\x03\0")
    theirs.close()
    with pytest.raises(ConnectionError):
        link.receive()
