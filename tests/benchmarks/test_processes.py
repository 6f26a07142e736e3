"""What the benchmarks read about processes: CPU shares and memory."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks import processes
from benchmarks.idle import cpu_shares


def test_a_tree_holds_children_of_children_and_nothing_else() -> None:
    grandparent = subprocess.Popen(["sh", "-c", "sh -c 'sleep 30; true' & wait"])
    try:
        deadline = time.monotonic() + 10
        while len(found := processes.tree(grandparent.pid)) < 3 and time.monotonic() < deadline:
            time.sleep(0.02)
        assert sorted(entry.name for entry in found) == ["sh", "sh", "sleep"]
        assert os.getpid() not in {entry.pid for entry in found}
    finally:
        for entry in processes.tree(grandparent.pid):
            os.kill(entry.pid, 9)
        grandparent.wait()
    with pytest.raises(ProcessLookupError):
        processes.tree(grandparent.pid)


def test_a_process_that_gets_the_id_of_one_that_has_ended_is_another_one() -> None:
    def started() -> subprocess.Popen[bytes]:
        return subprocess.Popen(["sleep", "30"])

    def ended(process: subprocess.Popen[bytes]) -> tuple[int, int]:
        (entry,) = processes.tree(process.pid)
        process.kill()
        process.wait()
        return entry.identity

    first = ended(started())
    for _ in range(100):
        time.sleep(0.02)
        try:
            Path("/proc/sys/kernel/ns_last_pid").write_text(str(first[0] - 1))
        except OSError as error:
            pytest.skip(f"ids cannot be chosen here: {error}")
        second = ended(started())
        if second[0] == first[0]:
            break
    else:
        pytest.skip("others took the id")
    assert second != first


def test_cpu_shares_tell_the_busy_from_the_idle() -> None:
    busy = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    idle = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        time.sleep(0.5)
        [(entry, busy_share)] = cpu_shares(busy.pid, 0.6)
        [(_, idle_share)] = cpu_shares(idle.pid, 0.3)
        # The machine may be busy with other things, so only the order is certain.
        assert entry.pid == busy.pid
        assert busy_share > 2 * idle_share
    finally:
        for process in (busy, idle):
            process.kill()
            process.wait()


def test_peak_memory_starts_again() -> None:
    """In a process of its own: what earlier tests left may be given back at any time."""
    script = """
from benchmarks import processes
ballast = bytearray(64 * 2**20)
ballast[:] = b"x" * len(ballast)
del ballast
processes.reset_peak_memory()
now, peak = processes.memory()
more = b"x" * (64 * 2**20)
print(peak - now, processes.memory()[1] - peak)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    above, risen = map(int, done.stdout.split())
    assert above < 32 * 2**20
    assert risen > 48 * 2**20
