"""What of this machine the process may use: cores and memory. Reads the operating system; decides nothing."""

import os
from dataclasses import dataclass
from pathlib import Path

_CGROUP = Path("/sys/fs/cgroup")


@dataclass(frozen=True, slots=True)
class CoreShare:
    """One of several processes that know of each other and may use the same cores and memory."""

    index: int
    count: int


ALONE = CoreShare(0, 1)


def available_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def available_bytes() -> int:
    """Bytes that can be taken without swapping: what the machine has free, or the container's limit leaves."""
    return min(_machine_available(), _cgroup_available())


def _machine_available() -> int:
    try:
        meminfo = Path("/proc/meminfo").read_text()
    except OSError:  # not Linux
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    fields = dict(line.split(":", 1) for line in meminfo.splitlines())
    return int(fields["MemAvailable"].split()[0]) * 1024


def _cgroup_available() -> int:
    """What the memory limit of a container (cgroup v2) leaves; a limitless one leaves everything."""
    try:
        limit = (_CGROUP / "memory.max").read_text().strip()
        used = int((_CGROUP / "memory.current").read_text())
    except OSError:
        return 2**63
    return 2**63 if limit == "max" else max(0, int(limit) - used)
