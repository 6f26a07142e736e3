"""Ports stay the chooser's own between being chosen and being bound."""

import contextlib
import socket

import pytest

from cluster import ports as chosen
from cluster.ports import free_ports, hold_port


def test_free_ports_are_not_ones_that_the_kernel_gives_away() -> None:
    with socket.socket() as given:
        given.bind(("127.0.0.1", 0))
        ports = free_ports(8)
        assert len(set(ports)) == 8
        assert max(ports) < given.getsockname()[1]
    for port in ports:
        with socket.socket() as mine:
            mine.bind(("127.0.0.1", port))


def test_a_port_in_use_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    (first,) = free_ports(1)
    monkeypatch.setattr(chosen, "_FIRST_PORT", first)
    monkeypatch.setattr(chosen, "_first_ephemeral_port", lambda: first + 2)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", first))
        assert free_ports(1) == [first + 1]
        with pytest.raises(RuntimeError, match=f"between {first} and {first + 2}"):
            free_ports(2)


def test_a_port_that_is_held_is_given_to_nobody_else_and_can_be_listened_on(monkeypatch: pytest.MonkeyPatch) -> None:
    with contextlib.closing(hold_port("127.0.0.1")) as held:
        port = held.getsockname()[1]
        monkeypatch.setattr(chosen, "_FIRST_PORT", port)
        monkeypatch.setattr(chosen, "_first_ephemeral_port", lambda: port + 1)
        with pytest.raises(RuntimeError, match="no 1 free TCP ports"):
            free_ports(1)
        socket.create_server(("127.0.0.1", port)).close()
    assert free_ports(1) == [port]
