"""Memory that ranks share: all of them see it, nobody else can, and nothing is left behind."""

import os
import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Condition

import pytest
from torch import Tensor

from engine.parallel import segment
from engine.parallel.segment import share_segment


class Store:
    def __init__(self) -> None:
        self.values: dict[str, bytes] = {}
        self._changed = Condition()

    def set(self, key: str, value: str) -> None:
        with self._changed:
            self.values[key] = value.encode()
            self._changed.notify_all()

    def get(self, key: str) -> bytes:
        with self._changed:
            assert self._changed.wait_for(lambda: key in self.values, 10), key
            return self.values[key]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(segment, "FOLDER", tmp_path)
    return tmp_path


def share(store: Store, size: int, num_bytes: int = 5000) -> list[Tensor | None]:
    with ThreadPoolExecutor(size) as threads:
        return list(threads.map(lambda rank: share_segment(store, rank, size, num_bytes), range(size)))


def test_every_rank_sees_what_any_writes_and_no_file_is_left(folder: Path) -> None:
    found = share(Store(), 3)
    assert list(folder.iterdir()) == []
    for rank, memory in enumerate(found):
        assert memory is not None and len(memory) == 5000 and not memory[rank + 1 :].any()
        memory[rank] = rank + 1
    assert all(memory is not None and memory[:4].tolist() == [1, 2, 3, 0] for memory in found)


def test_the_file_is_this_users_alone_while_it_has_a_name(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    modes: list[int] = []
    allocate = os.posix_fallocate

    def watching(descriptor: int, offset: int, length: int) -> None:
        modes.append(stat.S_IMODE(os.fstat(descriptor).st_mode))
        allocate(descriptor, offset, length)

    monkeypatch.setattr(os, "posix_fallocate", watching)
    share(Store(), 2)
    assert modes == [0o600]


def test_ranks_of_two_hosts_have_none_and_leave_none(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The others find no such file, or one that is not the same."""
    attach = segment._attach

    def elsewhere(token: str, num_bytes: int) -> object:
        (folder / f"manta-ranks-{token[:16]}").unlink(missing_ok=True)
        (folder / f"manta-ranks-{token[:16]}").write_bytes(bytes(num_bytes + 16))
        try:
            return attach(token, num_bytes)
        finally:
            (folder / f"manta-ranks-{token[:16]}").unlink(missing_ok=True)

    monkeypatch.setattr(segment, "_attach", elsewhere)
    assert share(Store(), 2) == [None, None]
    assert list(folder.iterdir()) == []


def test_no_room_for_it_is_told_to_all(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int, offset: int, length: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    assert share(Store(), 2) == [None, None]
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("token", ["", "../../etc/passwd", "a" * 31, "A" * 32])
def test_tokens_that_nobody_made_name_no_file(token: str, folder: Path) -> None:
    assert segment._attach(token, 100) is None
