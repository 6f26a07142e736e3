"""The libraries of kernels that earlier starts have compiled. Owns the cache's folder; knows no compiler and no kernel.

They are code that this process runs, so the folder is one that only this user can write, and a file in it is used only
if it is whole and this user's own.
"""

import contextlib
import fcntl
import hashlib
import logging
import os
import re
import stat
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from engine.kernels.cpu.library import Library

log = logging.getLogger(__name__)

WAIT_S = 300.0
"""For another process that compiles, at most: one that is stopped must not keep all others from starting."""
_POLL_S = 0.05
NUM_KEPT = 32
"""Libraries that stay in the cache. Not one: machines with other CPUs may share it, each with a version or two."""
_DIGEST_BYTES = hashlib.sha256().digest_size
_KEPT_NAME = re.compile(r"[0-9a-f]{32}\.so")
_ASIDE_NAME = re.compile(r"\.[0-9a-f]{32}\.so\.\d+\.\d+")
_SETTLED_S = 3600.0
"""Age of a file that nobody is still writing, or has just written and is about to load."""


def folder() -> Path:
    if chosen := os.environ.get("MANTA_CACHE"):
        return Path(chosen) / "kernels"
    if chosen := os.environ.get("XDG_CACHE_HOME"):
        return Path(chosen) / "manta" / "kernels"
    try:
        return Path.home() / ".cache" / "manta" / "kernels"
    except RuntimeError:  # a container's user without a home
        return Path(tempfile.gettempdir()) / f"manta-kernels-{os.geteuid()}"


def _is_ours(status: os.stat_result) -> bool:
    """Whether nobody but this user can have written what is there."""
    return status.st_uid == os.geteuid() and not status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)


def _is_our_folder(path: Path) -> bool:
    """A link is none: where /tmp is shared, others may have put it there and change where it leads."""
    status = path.lstat()
    return stat.S_ISDIR(status.st_mode) and _is_ours(status)


@contextlib.contextmanager
def turn(folder: Path) -> Iterator[bool]:
    """All that share the cache compile one after the other; what the first has compiled the others load.

    The system ends a turn with its process. Without one goes who cannot have a turn here, or has waited for `WAIT_S`.
    Yields whether the cache looks like one that can be written.
    """
    lock = None
    with contextlib.suppress(OSError):
        _make_folder(folder)
        lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    if lock is None:
        yield False
        return
    try:
        _wait_for(lock)
        yield os.access(folder, os.W_OK)
    finally:
        os.close(lock)


def _wait_for(lock: int) -> None:
    until = time.monotonic() + WAIT_S
    is_said = False
    while time.monotonic() < until:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if not is_said:
                log.info("waiting for kernels that are being compiled already")
                is_said = True
            time.sleep(_POLL_S)
        except OSError:  # a file system without locks
            return
        else:
            return
    log.warning("kernels have been compiled elsewhere for %.0f s; this process compiles its own", WAIT_S)


def has(path: Path) -> bool:
    """Whether there is a library that is whole and ours."""
    file = _open(path)
    if file is not None:
        os.close(file)
    return file is not None


def load(path: Path, left_out: frozenset[str]) -> Library | None:
    """The library of an earlier compilation; None where it is missing, damaged or not ours, and to be made anew."""
    # It stays open: its number is a part of the name by which the loader tells libraries apart.
    file = _open(path)
    if file is None:
        return None
    try:
        library = Library(_opened(file, path), left_out)
    except (OSError, AttributeError):
        return None
    with contextlib.suppress(OSError):  # The time of the last use, which tells what to keep.
        os.utime(file)
    return library


def _open(path: Path) -> int | None:
    try:
        if not _is_our_folder(path.parent):
            return None
        file = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return None
    if _is_ours(os.fstat(file)) and _is_whole(file):
        return file
    os.close(file)
    return None


def _is_whole(file: int) -> bool:
    """A damaged file could be loaded and crash later, so its digest is kept behind the part that the loader reads."""
    with open(file, "rb", closefd=False) as reader:
        content = reader.read()
    return hashlib.sha256(content[:-_DIGEST_BYTES]).digest() == content[-_DIGEST_BYTES:]


def _opened(file: int, path: Path) -> Path:
    """A name of the very file that is open, whatever has been put in its place since."""
    name = Path(f"/proc/self/fd/{file}")
    return name if name.exists() else path


def _make_folder(folder: Path) -> None:
    """Raises PermissionError where it is not this user's alone."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if not _is_our_folder(folder):
        raise PermissionError(
            f"others than this user can write to {folder}, or it is a link; it should be a folder of this user's, with "
            "mode 700"
        )


def keep(made: Path, kept: Path) -> bool:
    """Puts the library into the cache in one step, if it can."""
    content = made.read_bytes()
    aside = kept.with_name(f".{kept.name}.{os.getpid()}.{time.monotonic_ns()}")
    try:
        _make_folder(kept.parent)
        aside.write_bytes(content + hashlib.sha256(content).digest())
        aside.chmod(0o600)
        aside.replace(kept)
    except OSError as error:
        with contextlib.suppress(OSError):
            aside.unlink()
        log.warning("the compiled kernels cannot be kept, so every start compiles them again: %s", error)
        return False
    return True


def remove_old(folder: Path) -> None:
    """Leaves the `NUM_KEPT` libraries that were used last, and nothing that an interrupted compilation has left.

    Harmless to other processes: what they have loaded stays until they end, and what they miss they compile again.
    """
    used: list[tuple[float, Path]] = []
    settled = time.time() - _SETTLED_S
    with contextlib.suppress(OSError):
        for path in folder.iterdir():
            last = _last_use(path)
            if _KEPT_NAME.fullmatch(path.name):
                used.append((last, path))
            elif _ASIDE_NAME.fullmatch(path.name) and last < settled:
                path.unlink(missing_ok=True)
        for last, path in sorted(used, reverse=True)[NUM_KEPT:]:
            if last < settled:
                path.unlink(missing_ok=True)


def _last_use(path: Path) -> float:
    """Seconds since the epoch; 0 for a file that another process has removed."""
    try:
        return path.lstat().st_mtime
    except FileNotFoundError:
        return 0.0
