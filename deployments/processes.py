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
from typing import NamedTuple

_PR_SET_CHILD_SUBREAPER = 36
_ENDED = "ZX"
"""States of a process that is a zombie or gone."""
_NUM_THREADS = 17
"""Place of num_threads in /proc/PID/stat, counted from the state (proc(5))."""


def adopt_orphans() -> None:
    """Makes this process the parent of every descendant whose own parent ends, so that none can be lost.

    Linux only; elsewhere orphans go to init as usual.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def descendants() -> set[int]:
    """Process ids of all living processes below this one; zombies are reaped and left out."""
    _reap()
    children: dict[int, list[_Process]] = {}
    for process in _processes():
        children.setdefault(process.parent, []).append(process)
    found: set[int] = set()
    below = [os.getpid()]
    while below:
        for process in children.get(below.pop(), ()):
            # Through a zombie, too: until all its threads have ended it keeps its children.
            below.append(process.pid)
            if process.is_alive:
                found.add(process.pid)
    return found


def end_descendants(grace_s: float) -> None:
    """Terminates every process below this one, kills what is left after `grace_s` seconds, returns when none is.

    With `adopt_orphans` in effect no zombies are left either.
    """
    _signal(descendants(), signal.SIGTERM)
    deadline = time.monotonic() + grace_s
    while descendants() and time.monotonic() < deadline:
        time.sleep(0.05)
    while left := descendants():
        _signal(left, signal.SIGKILL)
        time.sleep(0.02)
    # What ended since the last look. Its parent has ended too, so that it is a child of this process by now.
    _reap()


def _reap() -> None:
    """Takes note of every child that has ended, which then is no zombie any more."""
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def _signal(pids: Iterable[int], number: signal.Signals) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


class _Process(NamedTuple):
    pid: int
    parent: int
    is_alive: bool


def _processes() -> list[_Process]:
    """Every process of this machine."""
    if sys.platform == "linux":
        return [each for entry in Path("/proc").iterdir() if entry.name.isdigit() and (each := _read_stat(entry))]
    command = ["ps", "-A", "-o", "pid=,ppid=,stat="]
    listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    rows = map(str.split, listing.splitlines())
    return [_Process(int(pid), int(parent), state[0] not in _ENDED) for pid, parent, state in rows]


def _read_stat(entry: Path) -> _Process | None:
    try:
        # The name, in parentheses, may hold anything; what follows the last one starts with the state and the parent.
        fields = (entry / "stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    # A process whose main thread has ended looks like a zombie while its other threads go on.
    is_alive = fields[0] not in _ENDED or int(fields[_NUM_THREADS]) > 1
    return _Process(int(entry.name), int(fields[1]), is_alive)
