"""Memory that the ranks of one host share: a private file that has no name any more once all have mapped it.

Ranks find out whether they are on one host by trying: whoever can map the file of rank 0 is. Knows nothing of what the
memory is used for.
"""

import contextlib
import mmap
import os
import re
import secrets
import stat
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

FOLDER = Path("/dev/shm")
_TOKEN = re.compile(r"[0-9a-f]{32}")
_PROOF_BYTES = 16
_REFUSED, _MAPPED = "refused", "mapped"


class Store(Protocol):
    """Keys and values that all ranks see; `get` waits for a key. A torch store is one."""

    def set(self, key: str, value: str, /) -> None: ...

    def get(self, key: str, /) -> bytes: ...


def share_segment(store: Store, rank: int, size: int, num_bytes: int) -> Tensor | None:
    """[num_bytes] uint8 zeros that all `size` ranks see; None for all of them where they are not all on one host, or
    it has no such memory to give. All call it; the memory goes as the last tensor does.
    """
    made = _create(num_bytes) if rank == 0 else None
    try:
        if rank == 0:
            store.set("token", "" if made is None else made[0])
        memory = made[1] if made is not None else _attach(store.get("token").decode(), num_bytes)
        store.set(f"mapped/{rank}", _REFUSED if memory is None else _MAPPED)
        answers = [store.get(f"mapped/{other}") for other in range(size)]
    finally:
        if made is not None:
            _path(made[0]).unlink(missing_ok=True)
    if memory is None or _REFUSED.encode() in answers:
        return None
    return torch.frombuffer(memory, dtype=torch.uint8, count=num_bytes)


def _path(token: str) -> Path:
    """Half of a token names the file, the other half proves that it is that one."""
    return FOLDER / f"manta-ranks-{token[:16]}"


def _proof(token: str) -> bytes:
    return token[16:].encode()


def _create(num_bytes: int) -> tuple[str, mmap.mmap] | None:
    token = secrets.token_hex(16)
    path = _path(token)
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    except OSError:
        return None
    try:
        # Taken now: a file system that is full later would end the process at its first write.
        os.posix_fallocate(descriptor, 0, num_bytes + _PROOF_BYTES)
        memory = mmap.mmap(descriptor, num_bytes + _PROOF_BYTES)
    except OSError:
        path.unlink(missing_ok=True)
        return None
    finally:
        os.close(descriptor)
    memory[num_bytes:] = _proof(token)
    return token, memory


def _attach(token: str, num_bytes: int) -> mmap.mmap | None:
    """The memory of that token; None where there is no such file, or it is not this user's own."""
    if not _TOKEN.fullmatch(token):
        return None
    with contextlib.suppress(OSError):
        descriptor = os.open(_path(token), os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            status = os.fstat(descriptor)
            is_ours = stat.S_ISREG(status.st_mode) and status.st_uid == os.geteuid()
            if is_ours and status.st_size == num_bytes + _PROOF_BYTES:
                memory = mmap.mmap(descriptor, status.st_size)
                if secrets.compare_digest(memory[num_bytes:], _proof(token)):
                    return memory
        finally:
            os.close(descriptor)
    return None
