"""TCP ports for whoever must name one before it is bound. Knows nothing of what listens there."""

import contextlib
import random
import socket
from pathlib import Path

_FIRST_PORT = 20000
"""Ray gives the ports from 10002 to 19999 to its workers."""
_EPHEMERAL_RANGE = Path("/proc/sys/net/ipv4/ip_local_port_range")
_LINUX_FIRST_EPHEMERAL = 32768
_MIN_CANDIDATES = 1000


def free_ports(count: int, address: str = "127.0.0.1") -> list[int]:
    """Distinct TCP ports of an address of this machine that nobody listens on, and that nobody is given by chance.

    A port that the kernel hands out by itself would not stay free: between this call and the moment that it is
    bound, Ray opens hundreds of sockets with ports of the kernel's choice.
    """
    family = family_of(address)
    candidates = list(range(_FIRST_PORT, _first_ephemeral_port()))
    random.SystemRandom().shuffle(candidates)
    found: list[int] = []
    for port in candidates:
        with socket.socket(family) as probe, contextlib.suppress(OSError):
            probe.bind((address, port))
            found.append(port)
        if len(found) == count:
            return found
    raise RuntimeError(f"no {count} free TCP ports between {_FIRST_PORT} and {_first_ephemeral_port()}")


def hold_port(address: str) -> socket.socket:
    """A free port of an address that `free_ports` gives to nobody else, whichever process asks, until this is closed;
    whoever is told of it may listen there meanwhile, with SO_REUSEADDR."""
    held = socket.socket(family_of(address))
    held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    held.bind((address, *free_ports(1, address)))
    return held


def family_of(address: str) -> socket.AddressFamily:
    """Of an IP address."""
    return socket.AF_INET6 if ":" in address else socket.AF_INET


def _first_ephemeral_port() -> int:
    """The lowest port that the kernel gives to a socket that asked for none."""
    try:
        low = int(_EPHEMERAL_RANGE.read_text().split()[0])
    except (OSError, ValueError, IndexError):
        return _LINUX_FIRST_EPHEMERAL
    return low if low >= _FIRST_PORT + _MIN_CANDIDATES else _LINUX_FIRST_EPHEMERAL
