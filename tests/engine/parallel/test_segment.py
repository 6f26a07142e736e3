"""Memory that ranks share: all of them see it, nobody else can, and nothing is left behind."""

import gc
import os
import stat
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Condition

import pytest
from torch import Tensor

from engine.parallel import segment
from engine.parallel.segment import share_segment

ROOT = Path(__file__).parents[3]


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


def share(store: Store, size: int, num_bytes: int = 5000) -> list[Tensor | None]:
    with ThreadPoolExecutor(size) as threads:
        return list(threads.map(lambda rank: share_segment(store, rank, size, num_bytes), range(size)))


def left() -> list[str]:
    """Segments that this process still has, and files that have their name."""
    gc.collect()
    mine = [Path(link).readlink() for link in Path("/proc/self/fd").iterdir() if link.is_symlink()]
    return [str(path) for path in (*mine, *Path("/dev/shm").iterdir()) if "manta-ranks" in str(path)]


def test_every_rank_sees_what_any_writes_and_it_goes_with_the_last_of_them() -> None:
    found = share(Store(), 3)
    for rank, memory in enumerate(found):
        assert memory is not None and len(memory) == 5000 and not memory[rank + 1 :].any()
        memory[rank] = rank + 1
    assert all(memory is not None and memory[:4].tolist() == [1, 2, 3, 0] for memory in found)
    assert all("memfd" in name for name in left())
    found.clear()
    del memory
    assert left() == []


RANK_0 = """
import sys, time
from engine.parallel.segment import share_segment

class Store:
    def set(self, key, value):
        print(key, value, flush=True)
    def get(self, key):
        time.sleep(60)

{before}
share_segment(Store(), 0, 2, 5000)
"""
STOPS_EARLY = """
import os
def stop(*arguments):
    print("allocating", flush=True)
    time.sleep(60)
os.posix_fallocate = stop
"""


@pytest.mark.parametrize("before", ["", STOPS_EARLY])
def test_a_rank_that_is_killed_before_all_have_mapped_it_leaves_nothing(before: str) -> None:
    command = [sys.executable, "-c", RANK_0.format(before=before)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        assert process.stdout is not None and process.stdout.readline().startswith(("token", "allocating"))
        process.kill()
    assert left() == []


def test_processes_share_it_while_the_one_that_made_it_waits(tmp_path: Path) -> None:
    store = Store()
    with ThreadPoolExecutor(1) as threads:
        first = threads.submit(share_segment, store, 0, 2, 5000)
        token = store.get("token").decode()
        code = "import sys; from engine.parallel.segment import _attach; _attach(sys.argv[1], 5000)[:3] = b'abc'"
        subprocess.run([sys.executable, "-c", code, token], check=True, cwd=ROOT)
        store.set("mapped/1", "mapped")
        memory = first.result(10)
    assert memory is not None and bytes(memory[:4].tolist()) == b"abc\0"


def test_it_is_this_users_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    modes: list[int] = []
    allocate = os.posix_fallocate

    def watching(descriptor: int, offset: int, length: int) -> None:
        modes.append(stat.S_IMODE(os.fstat(descriptor).st_mode))
        allocate(descriptor, offset, length)

    monkeypatch.setattr(os, "posix_fallocate", watching)
    share(Store(), 2)
    assert modes == [0o600]


@pytest.mark.parametrize("what", ["another segment", "another file", "nothing"])
def test_ranks_of_two_hosts_have_none_and_leave_none(
    what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There the number of the process is another one's, which has something else open, or nothing."""
    attach = segment._attach

    def elsewhere(token: str, num_bytes: int) -> object:
        process, _, proof = token.split("/")
        if what == "nothing":
            return attach(f"{process}/999999/{proof}", num_bytes)
        is_segment = what == "another segment"
        other = os.memfd_create("manta-ranks") if is_segment else os.open(tmp_path / "x", os.O_RDWR | os.O_CREAT)
        os.ftruncate(other, num_bytes + 32)
        try:
            return attach(f"{process}/{other}/{proof}", num_bytes)
        finally:
            os.close(other)

    monkeypatch.setattr(segment, "_attach", elsewhere)
    assert share(Store(), 2) == [None, None]
    assert left() == []


def test_no_room_for_it_is_told_to_all(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int, offset: int, length: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    assert share(Store(), 2) == [None, None]
    assert left() == []


@pytest.mark.parametrize("token", ["", "../../etc/passwd", f"1/../{'a' * 32}", f"1/2/{'A' * 32}", "a" * 32])
def test_tokens_that_nobody_made_name_no_file(token: str) -> None:
    assert segment._attach(token, 100) is None
