"""The KV host inside the real application: it outlives what is killed around it, and ends with the application."""

import asyncio
import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from os import kill
from pathlib import Path
from typing import Any

import httpx
import pytest

from cluster.ports import free_ports
from tests.cluster.kv.talk import connected
from tests.deployments.app.processes import below
from tests.deployments.fakes import write_fake_model

ROOT = Path(__file__).parents[3]


class Application:
    """The running application."""

    def __init__(self, process: subprocess.Popen[str], url: str, socket: Path, log: Path) -> None:
        self.process = process
        self.log = log
        self.url = url
        self.socket = socket

    def tell(self, command: str) -> None:
        """A line for `tests.deployments.app.host_server`."""
        assert self.process.stdin is not None
        print(command, file=self.process.stdin, flush=True)

    def deploy(self, change: dict[str, Any]) -> None:
        """A new version of everything, with other settings of the hosts."""
        self.tell(f"deploy {json.dumps(change)}")
        assert self.process.stdout is not None
        assert "done\n" in iter(self.process.stdout.readline, ""), "the application has ended"

    def pids(self, name: str) -> list[int]:
        """Processes of an actor class."""
        return [pid for pid, command in below(self.process.pid).items() if name in command]

    def metric(self, name: str) -> float:
        """The sum over the nodes."""
        lines = httpx.get(f"{self.url}/metrics", timeout=20).text.splitlines()
        return sum(float(line.rpartition(" ")[2]) for line in lines if re.match(rf"{name}\{{", line))


def until(condition: Callable[[], bool], seconds: float = 40.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come true in time"
        time.sleep(0.1)


@pytest.fixture(scope="module")
def application(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Application]:
    model = tmp_path_factory.mktemp("model")
    write_fake_model(model)
    (port,) = free_ports(1)
    command = [sys.executable, "-m", "tests.deployments.app.host_server", str(model), str(port)]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None and process.stdout is not None
        try:
            line = next((line for line in process.stdout if "kv.sock " in line), "")
            assert line, "the application did not start"
            running = Application(process, f"http://127.0.0.1:{port}", *map(Path, line.split()))
            until(running.socket.exists)
            yield running
        finally:
            process.stdin.close()
            process.wait(60)


async def write(socket: Path, *names: str) -> None:
    async with connected(socket) as client:
        await client.put(*names)


async def count_found(socket: Path, *names: str) -> int:
    async with connected(socket) as client:
        return len((await client.find(*names)).slots)


def serves(socket: Path) -> bool:
    """Whether a client is welcome now."""
    try:
        asyncio.run(count_found(socket, "unknown"))
    except (OSError, EOFError):
        return False
    return True


def test_it_serves_and_is_seen_in_the_metrics(application: Application) -> None:
    assert application.socket.parent.stat().st_mode & 0o777 == 0o700
    asyncio.run(write(application.socket, "a", "a+", "a++"))
    assert asyncio.run(count_found(application.socket, "a", "a+", "a++")) == 3
    until(lambda: application.metric("manta:kv_host_memory_pages") == 3)
    assert application.metric("manta:kv_host_memory_bytes") == 30_000
    until(lambda: application.metric("manta:kv_host_clients") == 0)


def test_pages_outlive_the_replicas_and_the_keeper(application: Application) -> None:
    killed = application.pids(":LLMReplica") + application.pids(":KVHosts")
    assert len(killed) == 2
    for pid in killed:
        kill(pid, signal.SIGKILL)
    until(lambda: len(set(application.pids(":LLMReplica") + application.pids(":KVHosts")) - set(killed)) == 2)
    asyncio.run(write(application.socket, "b"))
    assert asyncio.run(count_found(application.socket, "a", "a+", "a++")) == 3
    until(lambda: application.metric("manta:kv_host_memory_pages") == 4)


def test_pages_outlive_a_new_version_of_everything(application: Application) -> None:
    asyncio.run(write(application.socket, "c"))
    old = {name: set(application.pids(name)) for name in (":LLMReplica", ":KVHosts")}
    (host,) = application.pids(":KVHostActor")
    application.deploy({})
    until(lambda: not any(pids & set(application.pids(name)) for name, pids in old.items()))
    assert application.pids(":KVHostActor") == [host]
    assert asyncio.run(count_found(application.socket, "c")) == 1
    until(lambda: application.metric("manta:kv_host_memory_pages") == 5)


def test_a_killed_host_is_back_on_the_same_path(application: Application) -> None:
    (host,) = application.pids(":KVHostActor")

    async def scenario() -> Path:
        async with connected(application.socket) as client:
            segment = client.segment.path
            kill(host, signal.SIGKILL)
            assert await client.is_ended()
            return segment

    segment = asyncio.run(scenario())
    until(lambda: serves(application.socket))
    assert not segment.exists(), "the memory of the dead one is given back"
    assert application.pids(":KVHostActor") != [host]
    assert asyncio.run(count_found(application.socket, "a")) == 0
    asyncio.run(write(application.socket, "a"))
    assert asyncio.run(count_found(application.socket, "a")) == 1


def test_a_folder_that_is_not_to_be_had_turns_the_disk_tier_off_and_nothing_else(
    application: Application, tmp_path: Path
) -> None:
    """It is below a file, which stops whoever runs this; where a folder cannot be written to, that is said likewise."""
    (tmp_path / "file").touch()
    (host,) = application.pids(":KVHostActor")
    application.deploy({"disk": str(tmp_path / "file" / "kv")})
    until(lambda: f"The disk tier {tmp_path}/file/kv cannot be written to" in application.log.read_text())
    until(lambda: serves(application.socket))
    asyncio.run(write(application.socket, "d"))
    assert asyncio.run(count_found(application.socket, "d")) == 1
    assert application.pids(":KVHostActor") == [host]
    assert httpx.get(f"{application.url}/ready", timeout=20).status_code == 200


def test_it_ends_with_the_application_and_leaves_nothing(application: Application) -> None:
    async def scenario() -> Path:
        async with connected(application.socket) as client:
            segment = client.segment.path
            assert segment.exists()
            application.tell("delete")
            async with asyncio.timeout(60):
                while await client.reader.read(1 << 20):
                    pass
            return segment

    segment = asyncio.run(scenario())
    until(lambda: not application.pids(":KVHostActor"))
    assert not segment.exists() and not application.socket.exists()
