"""What carries the batches of one rank to it, and its outputs back: whole messages, in order.

The thread that waits for a batch reads it by itself, from a socket, where ZeroMQ has threads of its own that must wake
first, at both ends. On one node that is a Unix socket; `cluster.shards.sealed` has the stream between nodes. Knows no
message; `cluster.shards.door` opens both kinds.
"""

import array
import contextlib
import os
import socket
import struct
from pathlib import Path
from typing import Protocol

from cluster.kv.wire import WireError
from cluster.shards.fields import MAX_BYTES

TAKE_TIMEOUT_S = 30.0
"""For the other end to take what its buffer has no room for."""
INLINE_BYTES = 64 * 2**10
"""Longer messages go beside the socket, whose buffer holds some 200 KiB where the system allows no more: the group must
not wait for a rank that is busy with the batch before, least of all while that one waits for the group to take an
output."""
_BUFFER_BYTES = 4 * 2**20
"""That may wait, if the system allows it."""
_IN_FILE = b"\0"
"""In place of a message that is in the file that comes with it."""
_TIMEOUT = struct.Struct("@ll")
_EXTRA = socket.CMSG_SPACE(array.array("i").itemsize)


class Link(Protocol):
    """One end, for one thread."""

    @property
    def readable(self) -> int:
        """The file descriptor that a poller is to wait on for something to receive, unless `has_more`."""

    @property
    def has_more(self) -> bool:
        """Whether a message is here that was read with the one before."""

    def send(self, data: bytes) -> None:
        """Raises TimeoutError if the other end takes no more, and ConnectionError if it is gone."""

    def receive(self) -> bytearray:
        """Waits for the next message. Raises ConnectionError if the other end is gone, and WireError."""

    def close(self) -> None: ...


class Entrance(Protocol):
    """Where one rank comes in."""

    @property
    def readable(self) -> int:
        """The file descriptor that a poller is to wait on for it to come."""

    def admit(self) -> Link | None:
        """The group's end, once somebody has come; None where that was not the rank."""

    def close(self) -> None: ...


def limit_sending(connection: socket.socket) -> None:
    """Has it wait no longer than TAKE_TIMEOUT_S, and then raise BlockingIOError. Python's own timeout would ask the
    system before each read and write whether it can be done."""
    timeout = _TIMEOUT.pack(int(TAKE_TIMEOUT_S), int(TAKE_TIMEOUT_S % 1 * 1e6))
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, timeout)


class NearLink:
    """Over a Unix socket that keeps messages apart, so that one call brings one; a long one is in a file in memory that
    comes in its place. It ends when the process at the other end does."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._buffer = bytearray(INLINE_BYTES + 1)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _BUFFER_BYTES)
        limit_sending(connection)

    @classmethod
    def to(cls, path: str) -> "NearLink":
        """The rank's end. Raises ConnectionError."""
        connection = _near_socket()
        try:
            connection.connect(path)
        except OSError as error:
            connection.close()
            raise ConnectionError(f"{path}: {error}") from error
        return cls(connection)

    @property
    def readable(self) -> int:
        return self._connection.fileno()

    @property
    def has_more(self) -> bool:
        return False

    def send(self, data: bytes) -> None:
        try:
            if 0 < len(data) <= INLINE_BYTES:
                self._connection.send(data)
                return
            file = os.memfd_create("message", os.MFD_CLOEXEC)
            try:
                with open(file, "wb", closefd=False) as memory:
                    memory.write(data)
                socket.send_fds(self._connection, [_IN_FILE], [file])
            finally:
                os.close(file)
        except BlockingIOError:
            raise TimeoutError from None

    def receive(self) -> bytearray:
        count, extra, _, _ = self._connection.recvmsg_into([self._buffer], _EXTRA)
        if not count:
            raise ConnectionError("the other end is gone")
        if extra:
            return _content(extra)
        if count > INLINE_BYTES:
            raise WireError(f"more than the {INLINE_BYTES} bytes that a message has without a file")
        return self._buffer[:count]

    def close(self) -> None:
        self._connection.close()


def _near_socket() -> socket.socket:
    return socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)


def _content(extra: "list[tuple[int, int, bytes]]") -> bytearray:
    """What the file in memory holds that came with a message, which is closed. Raises WireError."""
    files = array.array("i")
    for _, _, data in extra:  # one, of the one kind that Unix sockets bring unasked
        files.frombytes(data)
    with contextlib.ExitStack() as undo:
        for file in files:
            undo.callback(os.close, file)
        length = os.fstat(files[0]).st_size
        if length > MAX_BYTES:
            raise WireError(f"a file of {length} bytes; {MAX_BYTES} are the most of a message")
        content = bytearray(length)
        if os.preadv(files[0], [content], 0) != length:
            raise WireError(f"a file of {length} bytes that cannot be read to its end")
        return content


class NearEntrance:
    """A Unix socket that is to be connected to, once."""

    def __init__(self, path: Path) -> None:
        """Raises OSError."""
        self._listener = _near_socket()
        with contextlib.ExitStack() as undo:
            undo.callback(self._listener.close)
            self._listener.bind(str(path))
            self._listener.listen(1)
            undo.pop_all()

    @property
    def readable(self) -> int:
        return self._listener.fileno()

    def admit(self) -> NearLink:
        connection, _ = self._listener.accept()
        self._listener.close()
        return NearLink(connection)

    def close(self) -> None:
        self._listener.close()
