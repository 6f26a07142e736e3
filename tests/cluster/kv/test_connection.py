"""Whom a client speaks to."""

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.kv.connection import HostRefused, connect
from cluster.kv.wire import VERSION, Hello

HELLO = Hello(VERSION, b"L" * 32, 4096, "test")


@pytest.fixture
def listening(place: Path) -> Iterator[socket.socket]:
    """Somebody who listens and says nothing."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as server:
        server.bind(str(place / "kv.sock"))
        server.listen()
        server.settimeout(5)
        yield server


def test_a_process_of_another_user_is_told_nothing(
    place: Path, listening: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    another = os.geteuid() + 1
    monkeypatch.setattr(os, "geteuid", lambda: another)
    with pytest.raises(HostRefused, match=r"kv\.sock: a process of user \d+ listens there, expected one of user"):
        connect(place / "kv.sock", HELLO).__enter__()
    accepted, _ = listening.accept()
    with accepted:
        assert accepted.recv(100) == b""


def test_one_of_our_own_is_greeted(place: Path, listening: socket.socket, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cluster.kv.connection.TIMEOUT_S", 0.2)
    with pytest.raises(TimeoutError):
        connect(place / "kv.sock", HELLO).__enter__()
    accepted, _ = listening.accept()
    with accepted:
        assert b"test" in accepted.recv(100)
