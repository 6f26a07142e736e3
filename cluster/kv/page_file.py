"""A page of the KV cache as a file: one page a file, which says itself what it holds and whether it is whole.

Owns the format and its checks. Which files there are to be is `cluster.kv.disk`'s. All calls block.

A file begins with a header of 128 bytes: magic, version, layout, key, length of the parent's key, parent's key, bytes
of the page, CRC32C of the page, CRC32C of the header so far; all little-endian. The page follows.
"""

import os
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from cluster.kv.checksum import crc32c
from engine.kv.keys import KEY_BYTES

MAGIC = b"MANTAPG1"
VERSION = 1
HEADER_BYTES = 128
SUFFIX = ".page"
UNFINISHED = ".tmp"
_FIELDS = struct.Struct(f"<8sI{KEY_BYTES}s{KEY_BYTES}sB{KEY_BYTES}sQI")
_CRC = struct.Struct("<I")

Opener = Callable[[Path], BinaryIO]
"""Opens a new file for writing."""


class PageFileError(Exception):
    """A file that is not the page that its name says, or not all of it: says which and what is wrong."""


@dataclass(frozen=True, slots=True)
class PageHeader:
    """What a file says of its page."""

    layout: bytes
    key: bytes
    parent: bytes
    page_bytes: int
    crc: int

    def pack(self) -> bytes:
        fields = _FIELDS.pack(
            MAGIC, VERSION, self.layout, self.key, len(self.parent), self.parent, self.page_bytes, self.crc
        )
        return (fields + _CRC.pack(crc32c(fields))).ljust(HEADER_BYTES, b"\0")


def open_new(path: Path) -> BinaryIO:
    """A file that only we may read, empty."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
    return os.fdopen(os.open(path, flags, 0o600), "wb", buffering=0)


def file_name(key: bytes) -> str:
    return key.hex() + SUFFIX


def write_page(folder: Path, header: PageHeader, content: NDArray[np.uint8], opener: Opener = open_new) -> None:
    """Writes a page so that its file is there either whole or not at all. Raises OSError.

    Nothing waits for the disk itself: what a power failure leaves is told by its checksums.
    """
    path = folder / file_name(header.key)
    unfinished = path.with_suffix(UNFINISHED)
    try:
        with opener(unfinished) as file:
            for part in (memoryview(header.pack()), memoryview(content.data)):
                rest = part
                while rest:
                    rest = rest[file.write(rest) :]
        unfinished.replace(path)
    except OSError:
        unfinished.unlink(missing_ok=True)
        raise


def read_header(path: Path, layout: bytes, page_bytes: int) -> PageHeader:
    """What a file says of its page, checked against its name, its size and its place. Raises PageFileError, OSError."""
    with path.open("rb", buffering=0) as file:
        header = _parse(path, file.read(HEADER_BYTES), layout, page_bytes)
        size = os.fstat(file.fileno()).st_size
    if size != HEADER_BYTES + page_bytes:
        raise PageFileError(f"{path}: expected {HEADER_BYTES + page_bytes} bytes, found {size}")
    return header


def read_page(folder: Path, layout: bytes, key: bytes, view: NDArray[np.uint8]) -> PageHeader:
    """Reads a page into `view`, which is as long as a page, and checks all of it. Raises PageFileError, OSError."""
    path = folder / file_name(key)
    with path.open("rb", buffering=0) as file:
        header = _parse(path, file.read(HEADER_BYTES), layout, len(view))
        rest = memoryview(view.data)
        while rest and (count := file.readinto(rest)):
            rest = rest[count:]
        if rest or file.read(1):
            raise PageFileError(f"{path}: expected a page of {len(view)} bytes, found {'fewer' if rest else 'more'}")
    if crc32c(view) != header.crc:
        raise PageFileError(f"{path}: the page's CRC32C is not the one in the header")
    return header


def _parse(path: Path, content: bytes, layout: bytes, page_bytes: int) -> PageHeader:
    if len(content) < HEADER_BYTES or not content.startswith(MAGIC):
        raise PageFileError(f"{path}: not a page: it does not begin with {MAGIC!r}")
    _, version, its_layout, key, parent_length, parent, its_bytes, crc = _FIELDS.unpack_from(content)
    if version != VERSION:
        raise PageFileError(f"{path}: version {version}, expected {VERSION}")
    if _CRC.unpack_from(content, _FIELDS.size)[0] != crc32c(content[: _FIELDS.size]):
        raise PageFileError(f"{path}: the header is damaged")
    header = PageHeader(its_layout, key, parent[:parent_length], its_bytes, crc)
    if path.name != file_name(key):
        raise PageFileError(f"{path}: holds another page, {key.hex()}")
    if parent_length not in (0, KEY_BYTES) or header.parent == key:
        raise PageFileError(f"{path}: impossible key of the page before it")
    if (its_layout, its_bytes) != (layout, page_bytes):
        raise PageFileError(f"{path}: a page of {its_bytes} bytes of layout {its_layout.hex()}")
    return header
