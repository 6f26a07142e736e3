"""A Unix socket between a group and a rank: messages of any length arrive whole, and what cannot be one is refused."""

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
    theirs, ours = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
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


def test_more_than_a_message_has_without_a_file_is_refused(pair: tuple[socket.socket, NearLink]) -> None:
    theirs, link = pair
    theirs.send(b"x" * (INLINE_BYTES + 1))
    theirs.send(b"next")
    with pytest.raises(WireError, match="without a file"):
        link.receive()
    assert link.receive() == b"next"


def test_a_file_that_is_too_long_is_refused_and_closed(pair: tuple[socket.socket, NearLink]) -> None:
    theirs, link = pair
    before = open_files()
    file = os.memfd_create("message")
    os.ftruncate(file, MAX_BYTES + 1)
    socket.send_fds(theirs, [b"\0"], [file])
    os.close(file)
    with pytest.raises(WireError, match="are the most"):
        link.receive()
    assert open_files() == before


def test_an_end_that_is_gone_is_said(pair: tuple[socket.socket, NearLink]) -> None:
    theirs, link = pair
    theirs.send(b"last")
    theirs.close()
    assert link.receive() == b"last"
    with pytest.raises(ConnectionError):
        link.receive()
