"""How the ranks of a group and the group find each other: addresses, keys, and the sockets at both ends.

Ranks of the group's node come through Unix sockets in a folder that is this user's alone; those of other nodes by TCP.
Their batches are sealed (`cluster.shards.sealed`), all else is encrypted with CURVE (RFC 26/ZMTP), where each socket
admits the one key that was made for its rank. The keys travel through Ray, to the actor that they are for.
"""

import fcntl
import os
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

import zmq
from zmq.auth.thread import ThreadAuthenticator

from cluster.shards.fields import MAX_BYTES
from cluster.shards.link import Entrance, Link, NearEntrance, NearLink
from cluster.shards.sealed import FarEntrance, FarLink, StreamKeys

HIGH_WATER = 1024
"""Messages that may wait at either end of a socket: far more than there are batches in flight."""
_NEAR = "unix://"
_PREFIX = "ranks-"
_LOCK = "lock"
_LONGEST_PATH = 100
"""A socket's, with its name: 107 characters are the most that Linux takes."""


@dataclass(frozen=True, slots=True)
class Keys:
    """What a rank of another node needs to be let in, and to know whom it speaks to."""

    group: bytes
    public: bytes
    secret: bytes = field(repr=False)
    stream: StreamKeys
    """Of the stream of batches."""


@dataclass(frozen=True, slots=True)
class Door:
    """A rank's way to its group; picklable."""

    rank: int
    work: str
    """Where batches come from and outputs go to."""
    pulse: str
    """Where it says that it lives."""
    pages: str
    """Where it is told which pages to copy."""
    keys: Keys | None = field(default=None, repr=False)
    folder: str = ""
    """To be removed when nobody else is left to do so; empty for a rank of another node."""
    long: str = ""
    """Where long batches come from and long outputs go to, for a rank of another node."""

    def link(self, context: "zmq.Context[zmq.Socket[bytes]]", timeout_s: float) -> Link:
        """The rank's end of what carries its batches. Raises ConnectionError."""
        if self.work.startswith(_NEAR):
            return NearLink.to(self.work.removeprefix(_NEAR))
        assert self.keys is not None
        beside = self.connect(context, self.long)
        try:
            if not beside.poll(int(1000 * timeout_s), zmq.POLLOUT):
                raise ConnectionError(f"nobody answers at {self.long}")
            where = urlsplit(self.work)
            assert where.hostname is not None and where.port is not None
            return FarLink.to((where.hostname, where.port), self.keys.stream, beside, timeout_s)
        except ConnectionError:
            beside.close()
            raise

    def connect(self, context: "zmq.Context[zmq.Socket[bytes]]", endpoint: str) -> "zmq.Socket[bytes]":
        """A ZeroMQ socket at the rank's end of one of these."""
        made = socket(context)
        made.ipv6 = "[" in endpoint
        # Once lost, a connection stays lost: what was on its way is gone, and a batch must not be skipped.
        made.reconnect_ivl = -1
        made.immediate = True
        if self.keys is not None:
            made.curve_serverkey = self.keys.group
            made.curve_publickey, made.curve_secretkey = self.keys.public, self.keys.secret
        made.connect(endpoint)
        return made


class Doors:
    """The group's end: three open sockets for each rank."""

    def __init__(
        self, context: "zmq.Context[zmq.Socket[bytes]]", near: Sequence[bool], address: str, parent: Path
    ) -> None:
        """`near`: by rank, whether it is on this node; `address`: of this node, that others reach; `parent`: a folder
        for the one of the sockets. Raises OSError."""
        self._lock: int | None
        self.folder, self._lock = _claim(_fitting(parent))
        self._guard: ThreadAuthenticator | None = None
        self._context = context
        self._secret = self._public = b""
        if not all(near):
            self._public, self._secret = zmq.curve_keypair()
            self._guard = ThreadAuthenticator(context)
            self._guard.start()
        self.work: list[Entrance] = []
        self.pulse: list[zmq.Socket[bytes]] = []
        self.pages: list[zmq.Socket[bytes]] = []
        try:
            self.of_ranks = [
                self._near(rank) if is_near else self._far(rank, address) for rank, is_near in enumerate(near)
            ]
        except (zmq.ZMQError, OSError) as error:
            self.close()
            raise OSError(f"no socket for ranks on {address}: {error}") from error

    def remove_files(self) -> None:
        """Nobody comes in by the node's own doors any more."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def close(self) -> None:
        """Lets nobody in any more. Other sockets than those of `work` are closed by those who use them."""
        for entrance in self.work:
            entrance.close()
        if self._guard is not None:
            self._guard.stop()
            self._guard = None
        self.remove_files()
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _near(self, rank: int) -> Door:
        work = self.folder / f"work{rank}"
        self.work.append(NearEntrance(work))
        pulse, pages = (f"ipc://{self.folder}/{kind}{rank}" for kind in ("pulse", "pages"))
        for sockets, endpoint in ((self.pulse, pulse), (self.pages, pages)):
            sockets.append(socket(self._context))
            sockets[-1].bind(endpoint)
        return Door(rank, f"{_NEAR}{work}", pulse, pages, folder=str(self.folder))

    def _far(self, rank: int, address: str) -> Door:
        public, secret = zmq.curve_keypair()
        assert self._guard is not None
        domain = f"rank{rank}"
        self._guard.configure_curve_callback(domain, _Only(public))
        sockets = [self._encrypted(domain, address) for _ in range(3)]
        long, pulse, pages = sockets
        self.pulse.append(pulse)
        self.pages.append(pages)
        keys = Keys(self._public, public, secret, StreamKeys.new())
        entrance = FarEntrance(address, keys.stream, long)
        self.work.append(entrance)
        host = f"[{address}]" if ":" in address else address
        places = [made.get_string(zmq.LAST_ENDPOINT).rstrip("\0") for made in sockets]
        return Door(rank, f"tcp://{host}:{entrance.port}", places[1], places[2], keys, long=places[0])

    def _encrypted(self, domain: str, address: str) -> "zmq.Socket[bytes]":
        made = socket(self._context)
        made.curve_server = True
        made.curve_publickey, made.curve_secretkey = self._public, self._secret
        made.zap_domain = domain.encode()
        made.ipv6 = ":" in address
        made.bind(f"tcp://[{address}]:*" if ":" in address else f"tcp://{address}:*")
        return made


def _claim(parent: Path) -> tuple[Path, int]:
    """A new folder that is this user's alone, and the lock in it that says that its group lives.

    Folders of groups whose process was killed are removed: their ranks are ended before they can do so themselves.
    """
    folder = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=parent))
    # It is there only once it is locked: others look for folders whose lock they can take.
    lock = _locked(folder / f"{_LOCK}.new", os.O_CREAT)
    assert lock is not None, "nobody else knows of it yet"
    (folder / f"{_LOCK}.new").rename(folder / _LOCK)
    for other in parent.glob(f"{_PREFIX}*"):
        if other != folder and (abandoned := _locked(other / _LOCK)) is not None:
            shutil.rmtree(other, ignore_errors=True)
            os.close(abandoned)
    return folder, lock


def _locked(path: Path, flags: int = 0) -> int | None:
    """The file, open and locked; None if there is none of ours or its owner lives."""
    try:
        found = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC | flags, 0o600)
    except OSError:
        return None
    try:
        fcntl.flock(found, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(found)
        return None
    return found


def socket(context: "zmq.Context[zmq.Socket[bytes]]") -> "zmq.Socket[bytes]":
    """One end of a pair: bounded, and with nothing left to send once it is closed."""
    made = context.socket(zmq.DEALER)
    made.linger = 0
    made.sndhwm = made.rcvhwm = HIGH_WATER
    made.maxmsgsize = MAX_BYTES
    return made


class _Only:
    """Admits one key."""

    def __init__(self, public: bytes) -> None:
        self._public = public

    def callback(self, domain: str, key: bytes) -> bool:
        # A public key: nothing is learnt from how long a comparison takes.
        return key == self._public


def _fitting(parent: Path) -> Path:
    """Where a socket's path is not too long: here, if so."""
    fits = len(str(parent / f"{_PREFIX}12345678" / "pulse1234")) <= _LONGEST_PATH
    return parent if fits else Path(tempfile.gettempdir())
