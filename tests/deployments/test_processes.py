"""Ending every process below this one; run in a child, which then has no processes but its own."""

import subprocess
import sys
from pathlib import Path

import pytest

TIMEOUT_S = 120.0
"""Far less than what the processes that are to be ended would take by themselves."""
SCRIPT = """
import signal, subprocess, sys, time
from deployments.processes import adopt_orphans, descendants, end_descendants

adopt_orphans()
stubborn = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(1, flush=True); time.sleep(600)"
subprocess.Popen(["sleep", "600"])
subprocess.Popen([sys.executable, "-c", stubborn], stdout=subprocess.PIPE).stdout.readline()
# A process whose parent has ended, in a session of its own: what a daemon does.
subprocess.run(["sh", "-c", "setsid sleep 600 & true"], check=True)
found = descendants()
end_descendants(grace_s=0.5)
print(len(found), len(descendants()), *found)
"""


def test_orphans_and_processes_that_ignore_sigterm_end_too() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=TIMEOUT_S, check=True)
    found, left, *pids = map(int, done.stdout.split())
    assert (found, left) == (3, 0)
    assert not any((Path("/proc") / str(pid)).exists() for pid in pids)


# The main thread ends, which makes the process a zombie to the eye, but another one keeps it, and with it its child.
HALF_DEAD = """
import ctypes, subprocess, threading, time
print(subprocess.Popen(["sleep", "600"]).pid, flush=True)
threading.Thread(target=time.sleep, args=(600,)).start()
ctypes.CDLL(None).pthread_exit(None)
"""
END_HALF_DEAD = """
import subprocess, sys, time
from pathlib import Path
from deployments.processes import adopt_orphans, descendants, end_descendants

adopt_orphans()
parent = subprocess.Popen([sys.executable, "-c", sys.argv[1]], stdout=subprocess.PIPE)
child = int(parent.stdout.readline())
while Path(f"/proc/{parent.pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
    time.sleep(0.01)
found = descendants()
end_descendants(grace_s=0.0)
print(child in found, Path(f"/proc/{child}").exists())
parent.kill()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the states are Linux's")
def test_child_of_a_process_that_is_half_dead_is_found_and_ended() -> None:
    command = [sys.executable, "-c", END_HALF_DEAD, HALF_DEAD]
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=True)
    assert done.stdout.split() == ["True", "False"]
