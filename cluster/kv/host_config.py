"""What a KV host is given: resolved numbers and paths."""

from dataclasses import dataclass
from pathlib import Path

SHARED_MEMORY = Path("/dev/shm")


@dataclass(frozen=True, slots=True)
class HostConfig:
    """The budgets of one node."""

    memory_bytes: int
    """Of all segments together."""
    disk: Path | None = None
    """The folder of the disk tier; None for no such tier."""
    disk_bytes: int = 0
    """Of all files of pages together."""
    segments: Path = SHARED_MEMORY
    """The folder of the segments: a file system in memory."""
