"""A link between nodes: sealed messages on a TCP stream, which the thread that waits for one reads by itself.

Each message is encrypted and authenticated (AES-256-GCM, NIST SP 800-38D) under a key of its direction that was made
for this one connection; its number is the nonce, so that none can be changed, left out, repeated or put elsewhere. Long
ones go by an encrypted ZeroMQ socket beside the stream, whose buffer holds less. Knows no message.
"""

import select
import socket
import struct
import time
from dataclasses import dataclass, field
from secrets import token_bytes

import zmq
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from cluster.kv.wire import WireError
from cluster.ports import family_of
from cluster.shards.link import INLINE_BYTES, limit_sending

LONG_TIMEOUT_S = 10.0
"""For a long message that has been announced."""
HELLO_TIMEOUT_S = 1.0
"""For whoever comes to say that it is the rank."""
_HELLO = b"hello"
_TAG_BYTES = 16
_LONGEST = INLINE_BYTES + _TAG_BYTES
"""Of the messages on the stream, sealed."""
_LENGTH = struct.Struct("<I")
"""What each of them follows."""
_POLL_MS = 50


@dataclass(frozen=True, slots=True)
class StreamKeys:
    """Of one connection. They are used for no other: numbers of messages begin anew with each."""

    to_rank: bytes = field(repr=False)
    to_group: bytes = field(repr=False)

    @classmethod
    def new(cls) -> "StreamKeys":
        return cls(token_bytes(32), token_bytes(32))


class Seal:
    """One direction, at one end."""

    def __init__(self, key: bytes) -> None:
        self._cipher = AESGCM(key)
        self._number = 0

    def close(self, data: bytes) -> bytes:
        """The next message, sealed."""
        return self._cipher.encrypt(self._nonce(), data, None)

    def open(self, sealed: bytes | bytearray) -> bytes:
        """The next message. Raises WireError where it is anything else."""
        try:
            return self._cipher.decrypt(self._nonce(), sealed, None)
        except InvalidTag:
            raise WireError("a message that was not sealed by the other end, or not as the next one") from None

    def _nonce(self) -> bytes:
        self._number += 1
        return self._number.to_bytes(12, "little")


class _Frames:
    """The messages of a stream, with no more calls to the system than it takes: a thread that waits for one is out of
    every cache when it comes, and each step to it counts."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._buffer = bytearray(_LENGTH.size + _LONGEST)
        self._view = memoryview(self._buffer)
        self._count = 0
        """Bytes that were read and not taken, from the buffer's beginning on."""

    @property
    def has_one(self) -> bool:
        """Whether `take` has nothing to wait for. Raises WireError."""
        return self._count >= _LENGTH.size and self._count >= self._end()

    def take(self) -> bytearray:
        """The next message. Raises ConnectionError where the stream ends before, and WireError."""
        while not self.has_one:
            try:
                read = self._connection.recv_into(self._view[self._count :])
            except OSError as error:  # also of a network that says that there is no way
                raise ConnectionError(f"the other end is gone: {error}") from error
            if not read:
                raise ConnectionError("the other end is gone")
            self._count += read
        end = self._end()
        message = self._buffer[_LENGTH.size : end]
        left = self._count - end
        if left:
            self._buffer[:left] = self._buffer[end : self._count]
        self._count = left
        return message

    def _end(self) -> int:
        """Of the message that has begun."""
        length: int = _LENGTH.unpack_from(self._buffer)[0]
        if length > _LONGEST:
            raise WireError(f"{length} bytes are announced; {INLINE_BYTES} are the most of a message here")
        return _LENGTH.size + length


class FarLink:
    """One end of the stream."""

    def __init__(self, connection: socket.socket, closing: Seal, opening: Seal, beside: "zmq.Socket[bytes]") -> None:
        """`beside`: for long messages."""
        self._connection = connection
        self._closing = closing
        self._opening = opening
        self._beside = beside
        self._frames = _Frames(connection)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        limit_sending(connection)

    @classmethod
    def to(cls, address: tuple[str, int], keys: StreamKeys, beside: "zmq.Socket[bytes]", timeout_s: float) -> "FarLink":
        """The rank's end. Raises ConnectionError."""
        try:
            connection = socket.create_connection(address, timeout_s)
        except OSError as error:
            raise ConnectionError(f"{address[0]}, port {address[1]}: {error}") from error
        connection.settimeout(None)
        link = cls(connection, Seal(keys.to_group), Seal(keys.to_rank), beside)
        link.send(_HELLO)
        return link

    @property
    def readable(self) -> int:
        return self._connection.fileno()

    @property
    def has_more(self) -> bool:
        return self._frames.has_one

    def send(self, data: bytes) -> None:
        """See `Link`."""
        try:
            if len(data) > INLINE_BYTES:
                self._beside.send(data, zmq.NOBLOCK)
                data = b""  # announces it: no message is empty
            sealed = self._closing.close(data)
            self._connection.sendall(_LENGTH.pack(len(sealed)) + sealed)
        except (BlockingIOError, zmq.Again):
            raise TimeoutError from None
        except OSError as error:  # also of a network that says that there is no way
            raise ConnectionError(f"the other end is gone: {error}") from error

    def receive(self) -> bytearray:
        """See `Link`."""
        data = self._opening.open(self._frames.take())
        # A copy that may be written to: torch warns of tensors that may not.
        return bytearray(data) if data else self._long()

    def close(self) -> None:
        self._connection.close()
        self._beside.close()

    def _long(self) -> bytearray:
        deadline = time.monotonic() + LONG_TIMEOUT_S
        ended = select.poll()
        ended.register(self._connection, select.POLLRDHUP)
        while not self._beside.poll(_POLL_MS):
            if ended.poll(0) or time.monotonic() > deadline:
                raise ConnectionError("the other end is gone")
        return bytearray(self._beside.recv())


class FarEntrance:
    """A TCP port that whoever has the keys may connect to, once."""

    def __init__(self, address: str, keys: StreamKeys, beside: "zmq.Socket[bytes]") -> None:
        """Raises OSError."""
        self._keys = keys
        self._beside = beside
        self._listener = socket.create_server((address, 0), family=family_of(address))

    @property
    def port(self) -> int:
        number: int = self._listener.getsockname()[1]
        return number

    @property
    def readable(self) -> int:
        return self._listener.fileno()

    def admit(self) -> FarLink | None:
        """The group's end; None where it was somebody else who came."""
        connection, _ = self._listener.accept()
        opening = Seal(self._keys.to_group)
        try:
            if opening.open(_first_bytes(connection)) != _HELLO:
                raise WireError("something else than a hello")
        except (OSError, WireError):
            connection.close()
            return None
        self._listener.close()
        return FarLink(connection, Seal(self._keys.to_rank), opening, self._beside)

    def close(self) -> None:
        """Lets nobody in any more; not while a link is in use."""
        self._listener.close()
        self._beside.close()


def _first_bytes(connection: socket.socket) -> bytes:
    """A sealed hello, or what comes in its place. Raises OSError, also where it takes too long."""
    count, data = _LENGTH.size + len(_HELLO) + _TAG_BYTES, b""
    deadline = time.monotonic() + HELLO_TIMEOUT_S
    while len(data) < count:
        connection.settimeout(max(0.001, deadline - time.monotonic()))
        if not (more := connection.recv(count - len(data))):
            raise ConnectionError("the other end is gone")
        data += more
    connection.settimeout(None)
    return data[_LENGTH.size :]
