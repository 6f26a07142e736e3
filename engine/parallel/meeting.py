"""Where the ranks of a replica find each other, and the connections that they keep. Owns sockets and who listens where.

Knows no model. What goes over the connections is not encrypted, and the store takes whoever comes: both belong on the
cluster's own network.
"""

import os
import socket
from datetime import timedelta
from pathlib import Path
from typing import Any, Protocol, cast
from urllib.parse import urlsplit

import torch
from torch import Tensor
from torch.distributed import GatherOptions, PrefixStore, ProcessGroupGloo, TCPStore, Work

from engine.errors import RanksLost
from engine.machine import CoreShare
from engine.parallel.place import Place

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
ARRIVAL_TIMEOUT = timedelta(seconds=120)
"""For the others to come."""
TIMEOUT = timedelta(minutes=30)
"""For the others to take part in what all do: longer than a first step of many tokens may take on a slow machine, which
is minutes. Ranks that are lost are found by their pulse, in seconds, and their neighbours ended; this is for whoever
has no group that does so."""
LOADING_TIMEOUT = timedelta(minutes=30)
"""For the others to read their weights."""


class Connections(Protocol):
    """A process group of torch: what of one is used here."""

    def allreduce(self, tensors: list[Tensor], /) -> Work: ...

    def gather(self, outputs: list[list[Tensor]], inputs: list[Tensor], options: GatherOptions, /) -> Work: ...

    def send(self, tensors: list[Tensor], rank: int, tag: int, /) -> Work: ...

    def recv(self, tensors: list[Tensor], rank: int, tag: int, /) -> Work: ...


class Meeting:
    """One rank among those of its replica."""

    def __init__(self, place: Place, rendezvous: str, timeout: timedelta = TIMEOUT) -> None:
        """`rendezvous` is "tcp://HOST:PORT"; rank 0 listens there. Raises ValueError for another form, and RanksLost if
        the others do not come in time. `timeout` is for all that they do together, and for coming if it is shorter."""
        self.place = place
        self.timeout = timeout
        host, port = _address(rendezvous)
        try:
            self._store = _open_store(host, port, place, min(timeout, ARRIVAL_TIMEOUT))
            self._listens_at = _own_address(host, port)
            self.share = self._find_neighbours()
            """This one among the ranks that have its cores."""
            # From here on some load for longer than others.
            self._store.set_timeout(timeout)
        except (RuntimeError, OSError) as error:
            raise RanksLost(f"rank {place.rank} of {place.world} met nobody at {rendezvous}: {error}") from error

    def store(self, name: str) -> PrefixStore:
        """A part of the store that all ranks see."""
        return PrefixStore(name, self._store)

    def connect(self, name: str, rank: int, size: int, device: torch.device) -> Connections:
        """Connections among the ranks that call it with this name, for tensors on this kind of device. Raises
        RanksLost."""
        store = self.store(f"connections/{name}")
        try:
            if device.type == "cuda":
                return self._nccl(store, rank, size)
            return self._gloo(store, rank, size)
        except RuntimeError as error:
            raise RanksLost(f"rank {self.place.rank} has no connections to {size - 1} others: {error}") from error

    def _gloo(self, store: PrefixStore, rank: int, size: int) -> Connections:
        gloo: Any = ProcessGroupGloo  # torch's stubs lack its options and its operations
        options = gloo._Options()
        options._devices = [gloo.create_device(hostname=self._listens_at)]
        options._timeout = self.timeout
        return cast(Connections, gloo(store, rank, size, options))

    def _nccl(self, store: PrefixStore, rank: int, size: int) -> Connections:
        nccl: Any = torch.distributed.ProcessGroupNCCL
        options = nccl.Options()
        options._timeout = self.timeout
        return cast(Connections, nccl(store, rank, size, options))

    def wait_for_all(self, name: str, timeout: timedelta) -> None:
        """Returns once every rank of the replica has called it with this name. Raises RanksLost."""
        try:
            self._store.set(f"{name}/{self.place.rank}", "here")
            self._store.wait([f"{name}/{rank}" for rank in range(self.place.world)], timeout)
        except RuntimeError as error:
            raise RanksLost(f"rank {self.place.rank} waited for the others ({name}): {error}") from error

    def _find_neighbours(self) -> CoreShare:
        own = _cores()
        self._store.set(f"cores/{self.place.rank}", own)
        ranks = range(self.place.world)
        neighbours = [rank for rank in ranks if self._store.get(f"cores/{rank}") == own.encode()]
        return CoreShare(neighbours.index(self.place.rank), len(neighbours))


def _address(rendezvous: str) -> tuple[str, int]:
    parts = urlsplit(rendezvous)
    try:
        port = parts.port
    except ValueError:
        port = None
    if parts.scheme != "tcp" or not parts.hostname or port is None:
        raise ValueError(f'rendezvous {rendezvous!r}: expected "tcp://HOST:PORT"')
    return parts.hostname, port


def _open_store(host: str, port: int, place: Place, timeout: timedelta) -> TCPStore:
    if place.rank:
        return TCPStore(host, port, place.world, is_master=False, timeout=timeout, wait_for_workers=False)
    # By itself it would listen at all addresses of the machine.
    family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
    listening = socket.create_server((host, port), family=family, backlog=place.world)
    return TCPStore(
        host,
        port,
        place.world,
        is_master=True,
        timeout=timeout,
        wait_for_workers=False,
        master_listen_fd=listening.detach(),
    )


def _own_address(host: str, port: int) -> str:
    """The address of this machine from which `host` is reached. Nothing is sent to find out."""
    family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind) as probe:
        probe.connect(address)
        return str(probe.getsockname()[0])


def _cores() -> str:
    """What only ranks that share their cores have in common: the machine, since it was started, and the cores."""
    try:
        machine = _BOOT_ID.read_text().strip()
    except OSError:
        machine = socket.gethostname()
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    return f"{machine} {cores}"
