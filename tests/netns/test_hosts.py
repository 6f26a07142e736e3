"""Hosts are apart from each other and from this machine, and nothing is left of them however their world ends."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.deployments.app.processes import below
from tests.netns.hosts import is_alive
from tests.netns.isolation import ROOT

RUN = "from tests.netns.isolation import run_isolated; raise SystemExit(run_isolated('tests.netns.two_hosts', []))"


@pytest.fixture
def world() -> Iterator[tuple[subprocess.Popen[str], dict[str, Any]]]:
    """A process that has two hosts, once they have said all that they have to say."""
    with subprocess.Popen([sys.executable, "-c", RUN], cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        try:
            said: dict[str, Any] = {}
            assert process.stdout is not None
            for line in process.stdout:
                said.update([json.loads(line)])
                if "done" in said:
                    break
            yield process, said
        finally:
            process.kill()


def machine() -> dict[str, Any]:
    """What of this machine a test might leave changed."""
    return {
        "interfaces": sorted(entry.name for entry in Path("/sys/class/net").iterdir()),
        "mounts": Path("/proc/self/mountinfo").read_text(),
        "name": os.uname().nodename,
        "files": [name for name in ("of-one", "of-the-switch") if (Path("/dev/shm") / name).exists()],
    }


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_hosts_are_apart_and_leave_nothing(how: signal.Signals, request: pytest.FixtureRequest) -> None:
    before = machine()
    process, said = request.getfixturevalue("world")
    assert said == {
        "names": ["one", "one"],
        "files": [["of-one"], []],
        "while cut off": "",
        "goes on": True,
        "connected again": "one",
        "running": 2,
        "left of a killed host": [],
        "started again": 1,
        "done": True,
    }
    assert machine() == before
    running = below(process.pid)
    assert sum("tests.netns.host " in command for command in running.values()) >= 2
    process.send_signal(how)
    process.wait(10)
    deadline = time.monotonic() + 5
    while left := {pid: command for pid, command in running.items() if is_alive(pid)}:
        assert time.monotonic() < deadline, left
        time.sleep(0.02)
    assert machine() == before
