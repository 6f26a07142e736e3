"""The shared memory of a node's KV host: pages of one layout in a file that host and replicas map.

Owns the format of the file and who may open it. Does not know what is in a slot, nor who may write to it: that is
agreed over the socket (`cluster.kv.wire`).

The file begins with a header of 4096 bytes: the magic, then as little-endian 64-bit integers the number of slots, the
bytes of a page, the distance between two slots and the number of pages on disk that can be shown. Then the tags of the
pages in slots, those of the pages on disk (`cluster.kv.tags`), and from the next multiple of 4096 on the slots.
"""

import contextlib
import errno
import fcntl
import mmap
import os
import stat
import struct
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cluster.kv.tags import BUCKET, Tags, is_shown, new_table, table_bytes

MAGIC = b"MANTAKV2"
BLOCK = 4096
"""Slots begin at multiples of this: a page of memory belongs to one of them."""
FILE_PREFIX = "manta-kv-"
"""How the names of the hosts' files begin."""
_HEADER = struct.Struct("<8s4Q")
_MAX_COUNT = 2**31


class SegmentError(Exception):
    """A file that is no segment of ours, or a segment that cannot be made: says which file and what is wrong."""


def round_up(num_bytes: int) -> int:
    """The next multiple of BLOCK."""
    return -(-num_bytes // BLOCK) * BLOCK


def segment_bytes(num_slots: int, page_bytes: int, num_disk: int) -> int:
    """The size of a segment's file."""
    return _pages_begin(num_slots, num_disk) + num_slots * round_up(page_bytes)


def _pages_begin(num_slots: int, num_disk: int) -> int:
    return round_up(BLOCK + table_bytes(num_slots) + table_bytes(num_disk))


class Segment:
    """A mapped segment."""

    def __init__(self, path: Path, descriptor: int, num_slots: int, page_bytes: int, num_disk: int) -> None:
        """Use `create` or `attach`. Takes the descriptor over."""
        self.path = path
        self.num_slots = num_slots
        self.page_bytes = page_bytes
        self.num_disk = num_disk
        self.stride = round_up(page_bytes)
        self._descriptor = descriptor
        self._map = mmap.mmap(descriptor, segment_bytes(num_slots, page_bytes, num_disk))
        self._bytes: NDArray[np.uint8] = np.frombuffer(self._map, dtype=np.uint8)
        self._begin = _pages_begin(num_slots, num_disk)
        split = BLOCK + table_bytes(num_slots)
        self.tags = self._table(BLOCK, num_slots)
        """Of the pages in slots. Written by the host."""
        self.disk_tags = self._table(split, num_disk)
        """Of the pages on disk."""

    @classmethod
    def create(cls, path: Path, num_slots: int, page_bytes: int, num_disk: int) -> "Segment":
        """The host's side: makes the file and holds a lock on it for as long as it is open.

        Memory is committed as it is written, or by `commit`. Raises SegmentError.
        """
        _check_counts(path, num_slots, page_bytes, num_disk)
        try:
            descriptor = _create_locked(path)
        except OSError as error:
            raise SegmentError(f"{path}: cannot be created: {error.strerror}") from None
        try:
            os.ftruncate(descriptor, segment_bytes(num_slots, page_bytes, num_disk))
            header = _HEADER.pack(MAGIC, num_slots, page_bytes, round_up(page_bytes), num_disk)
            os.pwrite(descriptor, header, 0)
            # The tags are written without a thought of failure: a full file system would end the process there.
            os.posix_fallocate(descriptor, 0, _pages_begin(num_slots, num_disk))
            return cls(path, descriptor, num_slots, page_bytes, num_disk)
        except (OSError, ValueError) as error:
            path.unlink(missing_ok=True)
            os.close(descriptor)
            raise SegmentError(f"{path}: cannot be made {num_slots} slots long: {error}") from None

    @classmethod
    def attach(cls, path: Path) -> "Segment":
        """A replica's side: maps a host's file, having checked that it is one, whole, and ours alone.

        Raises SegmentError.
        """
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError as error:
            raise SegmentError(f"{path}: cannot be opened: {error.strerror}") from None
        try:
            return cls(path, descriptor, *_read_header(path, descriptor))
        except (SegmentError, OSError, ValueError) as error:
            os.close(descriptor)
            raise error if isinstance(error, SegmentError) else SegmentError(f"{path}: {error}") from None

    def slot(self, index: int) -> NDArray[np.uint8]:
        """The bytes of one slot, in place. Whoever keeps the view keeps the mapping. Raises IndexError."""
        begin = self._slot_begin(index)
        return self._bytes[begin : begin + self.page_bytes]

    def read(self, index: int, target: NDArray[np.uint8]) -> None:
        """Copies one slot to `target` ([page_bytes]), and maps nothing. Raises IndexError, OSError or SegmentError.

        When a process dies, all that it has mapped is taken apart, at 50 to 90 ms a gigabyte of small pages, before its
        connections are closed: so much later others notice that it is dead.
        """
        self._check_whole(index, os.preadv(self._descriptor, [target.data], self._slot_begin(index)))

    def write(self, index: int, source: NDArray[np.uint8]) -> None:
        """Copies `source` ([page_bytes]) to one slot; see `read`."""
        self._check_whole(index, os.pwrite(self._descriptor, source.data, self._slot_begin(index)))

    def commit(self, index: int) -> bool:
        """Takes the memory of a slot from the system now; False if there is no more.

        To write to a slot whose memory the system then cannot give would end the writer with a bus error.
        """
        try:
            os.posix_fallocate(self._descriptor, self._begin + index * self.stride, self.stride)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.ENOMEM):
                return False
            raise
        return True

    def may_have(self, key: bytes) -> bool:
        """Whether the page may be on this node, in memory or on disk. A hint: the host may be about to change it."""
        return is_shown(self.tags, key) or is_shown(self.disk_tags, key)

    def close(self) -> None:
        """Lets go of the file and, unless someone keeps a view of a slot, of the mapping. Twice is once."""
        if self._descriptor < 0:
            return
        os.close(self._descriptor)
        self._descriptor = -1
        self._bytes = np.empty(0, dtype=np.uint8)
        self.tags = self.disk_tags = new_table(0)
        self.num_slots = self.num_disk = 0
        # The last view ends the mapping then.
        with contextlib.suppress(BufferError):
            self._map.close()

    def _slot_begin(self, index: int) -> int:
        if not 0 <= index < self.num_slots:
            raise IndexError(f"{self.path} has {self.num_slots} slots, there is no slot {index}")
        return self._begin + index * self.stride

    def _check_whole(self, index: int, num_bytes: int) -> None:
        if num_bytes != self.page_bytes:
            raise SegmentError(f"{self.path}: {num_bytes} of {self.page_bytes} bytes of slot {index} were copied")

    def _table(self, begin: int, num_pages: int) -> Tags:
        content = self._bytes[begin : begin + table_bytes(num_pages)]
        return content.view(np.dtype("<u8")).reshape(-1, BUCKET)

    def unlink(self) -> None:
        """Removes the file; mappings of it go on. For the host."""
        self.path.unlink(missing_ok=True)


def remove_dead(folder: Path) -> list[Path]:
    """Removes the segments in a folder whose host is gone, and returns their paths. Those of other users stay."""
    removed = []
    for path in sorted(folder.glob(f"{FILE_PREFIX}*")):
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError:
            continue
        try:
            if os.fstat(descriptor).st_uid == os.geteuid():
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.unlink(missing_ok=True)
                removed.append(path)
        except OSError:  # its host lives
            continue
        finally:
            os.close(descriptor)
    return removed


def _create_locked(path: Path) -> int:
    """A new file with a lock on it. Another host may take one that has no lock yet for dead, and remove it."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        if os.fstat(descriptor).st_nlink > 0:
            return descriptor
        os.close(descriptor)


def _read_header(path: Path, descriptor: int) -> tuple[int, int, int]:
    """Slots, bytes of a page and pages on disk. Raises SegmentError unless file and header are as a host makes them."""
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        raise SegmentError(f"{path}: not a regular file")
    if status.st_uid != os.geteuid() or stat.S_IMODE(status.st_mode) & 0o077:
        raise SegmentError(
            f"{path}: expected a file of user {os.geteuid()} with mode 0600, "
            f"found user {status.st_uid} and mode {stat.S_IMODE(status.st_mode):04o}"
        )
    header = os.pread(descriptor, _HEADER.size, 0)
    if len(header) < _HEADER.size or not header.startswith(MAGIC):
        raise SegmentError(f"{path}: not a segment: it does not begin with {MAGIC!r}")
    _, num_slots, page_bytes, stride, num_disk = _HEADER.unpack(header)
    _check_counts(path, num_slots, page_bytes, num_disk)
    expected = segment_bytes(num_slots, page_bytes, num_disk)
    if stride != round_up(page_bytes) or status.st_size != expected:
        raise SegmentError(
            f"{path}: {num_slots} slots of {page_bytes} bytes, {stride} apart, do not make a file of "
            f"{status.st_size} bytes; expected {expected}"
        )
    return num_slots, page_bytes, num_disk


def _check_counts(path: Path, num_slots: int, page_bytes: int, num_disk: int) -> None:
    if not (1 <= num_slots < _MAX_COUNT and 1 <= page_bytes < _MAX_COUNT and 0 <= num_disk < _MAX_COUNT):
        raise SegmentError(f"{path}: impossible: {num_slots} slots of {page_bytes} bytes, {num_disk} pages on disk")
