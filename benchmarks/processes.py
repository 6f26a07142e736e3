"""CPU time and memory of a process and its descendants, read from /proc (Linux). Knows nothing about what they run."""

import os
from dataclasses import dataclass
from pathlib import Path

_PROC = Path("/proc")
_TICKS_PER_SECOND = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True, slots=True)
class ProcessTime:
    """CPU time that one process has used, its reaped children not included."""

    pid: int
    parent: int
    name: str
    seconds: float
    started: int
    """Clock ticks after the machine did. A process id is used again some time after its process has ended."""

    @property
    def identity(self) -> tuple[int, int]:
        """That no other process ever has."""
        return self.pid, self.started


def tree(root: int) -> list[ProcessTime]:
    """A process and all its descendants as they are now. Raises ProcessLookupError if there is no such process."""
    everyone = {entry.pid: entry for entry in _everyone()}
    if root not in everyone:
        raise ProcessLookupError(f"no process {root}")
    children: dict[int, list[int]] = {}
    for entry in everyone.values():
        children.setdefault(entry.parent, []).append(entry.pid)
    found, ahead = [], [root]
    while ahead:
        pid = ahead.pop()
        found.append(everyone[pid])
        ahead += children.get(pid, [])
    return found


def reset_peak_memory() -> None:
    """Makes this process's VmHWM start again from its present size."""
    (_PROC / "self" / "clear_refs").write_text("5")


def memory(pid: int | str = "self") -> tuple[int, int]:
    """Bytes resident now, and at their highest (VmRSS and VmHWM)."""
    fields = dict(line.split(":", 1) for line in (_PROC / str(pid) / "status").read_text().splitlines() if ":" in line)
    return _kibibytes(fields["VmRSS"]), _kibibytes(fields["VmHWM"])


def _kibibytes(field: str) -> int:
    return int(field.split()[0]) * 1024


def _everyone() -> list[ProcessTime]:
    found = []
    for directory in _PROC.iterdir():
        if directory.name.isdigit():
            try:
                found.append(_read(directory))
            except OSError:  # It ended while we looked.
                continue
    return found


def _read(directory: Path) -> ProcessTime:
    stat = (directory / "stat").read_text()
    # The name stands in parentheses and may hold spaces and parentheses itself.
    name = stat[stat.index("(") + 1 : stat.rindex(")")]
    fields = stat[stat.rindex(")") + 2 :].split()
    return ProcessTime(
        pid=int(directory.name),
        parent=int(fields[1]),
        name=name,
        seconds=(int(fields[11]) + int(fields[12])) / _TICKS_PER_SECOND,
        started=int(fields[19]),
    )
