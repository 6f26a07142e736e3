"""What lies in a cache, and what has been compiled for it."""

from pathlib import Path


def only_file(folder: Path) -> Path:
    (path,) = folder.iterdir()
    return path


def compilations(calls: Path) -> int:
    return sum("-c " in line for line in calls.read_text().splitlines())
