"""Processes of this machine below this one: find them, end them. Knows nothing of Ray; Linux and other Unixes."""

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path

_PR_SET_CHILD_SUBREAPER = 36


def adopt_orphans() -> None:
    """Makes this process the parent of every descendant whose own parent ends, so that none can be lost.

    Linux only; elsewhere orphans go to init as usual.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def descendants() -> set[int]:
    """Process ids of all living processes below this one; zombies are reaped and left out."""
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    children: dict[int, list[int]] = {}
    for pid, parent in _parents():
        children.setdefault(parent, []).append(pid)
    found: set[int] = set()
    below = [os.getpid()]
    while below:
        for pid in children.get(below.pop(), ()):
            if pid not in found:
                found.add(pid)
                below.append(pid)
    return found


def end_descendants(grace_s: float) -> None:
    """Terminates every process below this one, kills what is left after `grace_s` seconds, returns when none is."""
    _signal(descendants(), signal.SIGTERM)
    deadline = time.monotonic() + grace_s
    while descendants() and time.monotonic() < deadline:
        time.sleep(0.05)
    while left := descendants():
        _signal(left, signal.SIGKILL)
        time.sleep(0.02)


def _signal(pids: Iterable[int], number: signal.Signals) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def _parents() -> list[tuple[int, int]]:
    """(process id, parent's process id) of every living process."""
    if sys.platform == "linux":
        return [pair for entry in Path("/proc").iterdir() if entry.name.isdigit() and (pair := _read_stat(entry))]
    listing = subprocess.run(["ps", "-A", "-o", "pid=,ppid="], capture_output=True, text=True, check=True).stdout
    return [(int(pid), int(parent)) for pid, parent in map(str.split, listing.splitlines())]


def _read_stat(entry: Path) -> tuple[int, int] | None:
    try:
        # The name, in parentheses, may hold anything; what follows the last one is the state and the parent.
        state, parent = (entry / "stat").read_text().rpartition(")")[2].split()[:2]
    except OSError:
        return None
    return None if state in "ZX" else (int(entry.name), int(parent))
