"""Which model a directory holds, told by what is in it: wherever the same files lie, they have the same name.

Pages of keys and values outlive processes, so two models must never be taken for one: every byte of the weights counts,
as a revision may differ from another one in a few rows of one tensor. Their checksum takes half a second of a core for
2.4 GB, of a start that is to take six; so it is kept, by what the file system says of the file, and the next start does
not read them again.
"""

import hashlib
import os
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import google_crc32c
import numpy as np

from engine.errors import ModelError

PIECE_BYTES = 4 * 2**20
READERS = 4
"""Threads that read; all of them wait for one another only while a piece is summed up, for 0.2 ms."""
SETTLED_S = 2.0
"""How long a file must not have changed for its checksum to be kept: within a tick of the file system's clock, another
change would not show."""
_DIGEST_BYTES = 32


def model_identity(folder: Path, cache: Path | None = None) -> bytes:
    """A digest (32 bytes) of the configuration and the weights; `cache` is where checksums of weights are kept, by
    default in the user's own cache. Raises ModelError."""
    cache = cache or _cache_folder()
    digest = hashlib.blake2b(digest_size=_DIGEST_BYTES)
    try:
        for path in sorted(folder.iterdir()):
            if path.suffix not in (".json", ".safetensors"):
                continue
            digest.update(len(path.name.encode()).to_bytes(8, "little") + path.name.encode())
            content = path.read_bytes() if path.suffix == ".json" else _kept_checksum(path, cache)
            digest.update(hashlib.blake2b(content, digest_size=_DIGEST_BYTES).digest())
    except OSError as error:
        raise ModelError(f"{folder}: {error.strerror or error}") from error
    return digest.digest()


def checksum(path: Path) -> bytes:
    """A digest (32 bytes) of all of a file: of its length and of the CRC32C of each piece.

    A CRC tells revisions of a model apart, not forgeries: a change within 32 bits always shows, any other in all but
    one of four billion cases for each piece that it touches. It is ten times as fast as a cryptographic digest.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        length = os.fstat(descriptor).st_size
        digest = hashlib.blake2b(length.to_bytes(8, "little"), digest_size=_DIGEST_BYTES)
        with ThreadPoolExecutor(READERS, thread_name_prefix="checksum") as readers:
            for crc in readers.map(lambda place: _piece_crc(descriptor, place), range(0, length, PIECE_BYTES)):
                digest.update(crc.to_bytes(4, "little"))
    finally:
        os.close(descriptor)
    return digest.digest()


def _piece_crc(descriptor: int, place: int) -> int:
    content = np.frombuffer(os.pread(descriptor, PIECE_BYTES, place), dtype=np.uint8)
    return int(google_crc32c.value(content))


def _kept_checksum(path: Path, cache: Path) -> bytes:
    """The checksum of a file, read from the cache if the file is still the one that it was made of."""
    name = hashlib.blake2b(os.fsencode(path.resolve()), digest_size=16).hexdigest()
    kept, facts = cache / name, _facts(path)
    with suppress(OSError):
        content = kept.read_bytes()
        if content[_DIGEST_BYTES:] == _seal(facts, content[:_DIGEST_BYTES]):
            return content[:_DIGEST_BYTES]
    found = checksum(path)
    if _facts(path) == facts and time.time() - path.stat().st_ctime > SETTLED_S:
        with suppress(OSError):
            _write(kept, found + _seal(facts, found))
    return found


def _facts(path: Path) -> bytes:
    """What differs whenever a file was replaced or written to. The time of the last change cannot be set by anybody."""
    status = path.stat()
    facts = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
    return repr(facts).encode()


def _seal(facts: bytes, found: bytes) -> bytes:
    """What tells that these belong together and are whole."""
    return hashlib.blake2b(facts + found, digest_size=_DIGEST_BYTES).digest()


def _write(path: Path, content: bytes) -> None:
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    unfinished = path.with_suffix(f".{os.getpid()}")
    try:
        unfinished.write_bytes(content)
        unfinished.replace(path)
    except OSError:
        unfinished.unlink(missing_ok=True)
        raise


def _cache_folder() -> Path:
    """As `engine.kernels.cpu.kept_libraries` has them; without a home there is none, and nothing is kept."""
    for variable, inside in (("MANTA_CACHE", "checksums"), ("XDG_CACHE_HOME", "manta/checksums")):
        if chosen := os.environ.get(variable):
            return Path(chosen) / inside
    try:
        return Path.home() / ".cache" / "manta" / "checksums"
    except RuntimeError:  # a container's user without a home
        return Path(os.devnull)
