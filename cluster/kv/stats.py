"""What one KV host reports about itself. Plain numbers."""

from dataclasses import dataclass


@dataclass
class HostCounters:
    """What has happened at one host since it started. Written by the host alone."""

    evictions_total: int = 0
    """Pages that left memory for nowhere."""
    demotions_total: int = 0
    """Pages that left memory and are on disk."""
    promotions_total: int = 0
    """Pages that were read from disk into memory."""
    received_total: int = 0
    """Pages that came from other nodes."""
    served_total: int = 0
    """Pages that went to other nodes."""
    corrupt_total: int = 0
    """Pages that were not as they had been written, in memory, on disk or on the way, and were dropped."""
    disk_errors_total: int = 0
    """Reads and writes that the disk failed."""


@dataclass(frozen=True, slots=True)
class HostStats:
    """A host at one moment. Picklable."""

    memory_bytes: int
    """Of the pages in memory."""
    memory_pages: int
    disk_bytes: int
    disk_pages: int
    clients: int
    evictions_total: int
    demotions_total: int
    promotions_total: int
    received_total: int
    served_total: int
    corrupt_total: int
    disk_errors_total: int
