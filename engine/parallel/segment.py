"""Memory that the ranks of one host share: a file without a name, which ends with the last of those that have it.

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
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

PROCESSES = Path("/proc")
"""Where those of this host show what they have open."""
_NAME = "manta-ranks"
"""For whoever looks at the memory of this process."""
_TOKEN = re.compile(r"([0-9]{1,10})/([0-9]{1,10})/([0-9a-f]{32})")
"""The process that made it, what that has it open as, and what proves that it is that one."""
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
            store.set("token", "" if made is None else made.token)
        memory = made.memory if made is not None else _attach(store.get("token").decode(), num_bytes)
        store.set(f"mapped/{rank}", _REFUSED if memory is None else _MAPPED)
        answers = [store.get(f"mapped/{other}") for other in range(size)]
    finally:
        if made is not None:
            os.close(made.descriptor)
    if memory is None or _REFUSED.encode() in answers:
        return None
    return torch.frombuffer(memory, dtype=torch.uint8, count=num_bytes)


class _Made(NamedTuple):
    token: str
    memory: mmap.mmap
    descriptor: int
    """By which others find it, in /proc."""


def _create(num_bytes: int) -> _Made | None:
    proof = secrets.token_hex(16)
    try:
        descriptor = os.memfd_create(_NAME)
    except OSError:
        return None
    try:
        os.fchmod(descriptor, 0o600)
        # Taken now: a machine whose memory is full later would end the process at its first write.
        os.posix_fallocate(descriptor, 0, num_bytes + len(proof))
        memory = mmap.mmap(descriptor, num_bytes + len(proof))
    except OSError:
        os.close(descriptor)
        return None
    memory[num_bytes:] = proof.encode()
    return _Made(f"{os.getpid()}/{descriptor}/{proof}", memory, descriptor)


def _attach(token: str, num_bytes: int) -> mmap.mmap | None:
    """The memory of that token; None where there is none, or it is not this user's own."""
    parts = _TOKEN.fullmatch(token)
    if parts is None:
        return None
    process, number, proof = parts.groups()
    path = PROCESSES / process / "fd" / number
    with contextlib.suppress(OSError):
        # Another host's process of this number may have anything open as that.
        if not str(path.readlink()).startswith(f"/memfd:{_NAME} "):
            return None
        descriptor = os.open(path, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            status = os.fstat(descriptor)
            is_ours = stat.S_ISREG(status.st_mode) and status.st_uid == os.geteuid()
            if is_ours and status.st_size == num_bytes + len(proof):
                memory = mmap.mmap(descriptor, status.st_size)
                if secrets.compare_digest(memory[num_bytes:], proof.encode()):
                    return memory
        finally:
            os.close(descriptor)
    return None
