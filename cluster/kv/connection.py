"""One connection to a KV host: frames of messages over a Unix socket, the slots that the host lends, and its segment.

Used by one thread.
"""

import os
import selectors
import socket
import struct
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cluster.kv.segment import Segment
from cluster.kv.wire import MAX_FRAME, Hello, Message, Refused, Welcome, WireError, decode, encode

TIMEOUT_S = 5.0
"""For the host to take what is sent, and to answer a greeting."""
_LENGTH_BYTES = 4
_READ_BYTES = 1 << 18
_CREDENTIALS = struct.Struct("iII")
"""`struct ucred` of Linux (unix(7)): process, user and group."""


class HostRefused(Exception):
    """The host does not take this client, or is nobody that a client of ours should speak to; says why."""


class Connection:
    """An open connection, after the greeting."""

    def __init__(self, sock: socket.socket, hello: Hello) -> None:
        """Greets the host. Raises HostRefused, OSError, WireError or SegmentError."""
        self._socket = sock
        self._buffer = bytearray()
        self.credits: deque[int] = deque()
        """Slots that this client may write to."""
        sock.settimeout(TIMEOUT_S)
        self.send(hello)
        answer, *early = self._greeting()
        if isinstance(answer, Refused):
            raise HostRefused(answer.reason)
        if not isinstance(answer, Welcome):
            raise WireError(f"the host greeted with a {type(answer).__name__}")
        self.segment = Segment.attach(Path(answer.path))
        if self.segment.page_bytes != hello.page_bytes:
            raise WireError(f"pages of {self.segment.page_bytes} bytes are offered, {hello.page_bytes} were asked for")
        self._early = early

    def send(self, message: Message) -> None:
        """Raises OSError when the host does not take it in time."""
        self._socket.sendall(encode(message))

    def receive(self, woken: socket.socket, timeout_s: float) -> list[Message]:
        """What the host has sent; waits for it until `woken` has something to read, or time is up.

        Raises OSError at the connection's end, and WireError.
        """
        early, self._early = self._early, []
        with selectors.DefaultSelector() as selector:
            selector.register(self._socket, selectors.EVENT_READ)
            selector.register(woken, selectors.EVENT_READ)
            ready = {key.fileobj for key, _ in selector.select(0 if early else timeout_s)}
        if woken in ready:
            woken.recv(_READ_BYTES)
        if self._socket in ready:
            self._read()
        return [*early, *self._messages()]

    def _greeting(self) -> list[Message]:
        deadline = time.monotonic() + TIMEOUT_S
        while not (messages := self._messages()):
            if time.monotonic() > deadline:
                raise TimeoutError("the host does not answer a greeting")
            self._read()
        return messages

    def _read(self) -> None:
        received = self._socket.recv(_READ_BYTES)
        if not received:
            raise ConnectionError("the host closed the connection")
        self._buffer += received

    def _messages(self) -> list[Message]:
        messages = []
        while len(self._buffer) >= _LENGTH_BYTES:
            length = int.from_bytes(self._buffer[:_LENGTH_BYTES], "little")
            if length > MAX_FRAME:
                raise WireError(f"a frame of {length} bytes; {MAX_FRAME} are the most")
            end = _LENGTH_BYTES + length
            if len(self._buffer) < end:
                break
            messages.append(decode(bytes(self._buffer[_LENGTH_BYTES:end])))
            del self._buffer[:end]
        return messages


@contextmanager
def connect(path: Path, hello: Hello) -> Iterator[Connection]:
    """A connection to the host that listens at `path`. Raises what `Connection` raises, and HostRefused for one of
    another user: the path may lie in a directory where anyone can be first."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.settimeout(TIMEOUT_S)
        sock.connect(str(path))
        _check_user(path, sock)
        connection = Connection(sock, hello)
        try:
            yield connection
        finally:
            connection.segment.close()


def _check_user(path: Path, sock: socket.socket) -> None:
    """Raises HostRefused unless a process of our own user listens at the other end.

    Whoever does would learn what the replica computes, and could have it read anything in place of its own pages.
    """
    credentials = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    _, user, _ = _CREDENTIALS.unpack(credentials)
    if user != os.geteuid():
        raise HostRefused(f"{path}: a process of user {user} listens there, expected one of user {os.geteuid()}")
