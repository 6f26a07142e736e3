"""KV hosts on private sockets, with their segments in private folders."""

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.kv.hosts import Host


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
def place() -> Iterator[Path]:
    """A short path, as sockets need, with a folder in it for segments that is really in memory."""
    with tempfile.TemporaryDirectory(prefix="mk-", dir="/tmp") as folder:
        segments = Path(tempfile.mkdtemp(prefix="manta-test-", dir="/dev/shm"))
        (Path(folder) / "shm").symlink_to(segments)
        yield Path(folder)
        shutil.rmtree(segments)


@pytest.fixture
def host(place: Path) -> Iterator[Host]:
    """A host in a process of its own; not started yet."""
    made = Host(place / "host", place / "shm")
    yield made
    made.stop()
