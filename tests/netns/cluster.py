"""A real Ray on several hosts, and Manta on it: one head, which holds no rank, and workers with room for one rank each.

Owns how they are started, by `ray start` in the environment that the launcher gives its own, and finding out what runs
where. Knows nothing of what is done to them.
"""

import contextlib
import json
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import httpx

from deployments.private_ray import environment, has_haproxy
from tests.netns.hosts import FILES, Host, address_of, is_alive, make_switch

LOG = FILES / "manta.log"
"""On each host: what Manta's own processes say."""
WORKERS = ("ant", "bee", "cat")
HTTP_PORT = 8000
START_S = 120.0
RANK, REPLICA, GATEWAY, STORE = "ShardActor", ":LLMReplica", ":Gateway", ":StreamStore"
"""What the command line of such a process has."""
_GCS_PORT = 6379
_OBJECT_STORE_BYTES = 80 * 2**20
POLL_S = 0.02


class ClusterFailed(Exception):
    """It did not come up, or did not do what it was told: says what."""


class Cluster:
    """From `start` on; it ends with this process."""

    def __init__(self) -> None:
        make_switch()
        numbers = {name: number for number, name in enumerate(("head", *WORKERS), 1)}
        known = [f"{name}={address_of(number)}" for name, number in numbers.items()]
        self.head, *workers = (Host(name, number, known) for name, number in numbers.items())
        self.workers = workers
        self.url = f"http://{self.head.address}:{HTTP_PORT}"
        self._http = httpx.Client(base_url=self.url, timeout=5)
        self._environment = environment(FILES, LOG, haproxy=has_haproxy()) | {
            # Below it are the folders of Ray and of its sockets.
            "RAY_TMPDIR": str(FILES),
            "TMPDIR": str(FILES),
        }
        self._driver: subprocess.Popen[str] | None = None
        self._rays: dict[Host, subprocess.Popen[str]] = {}
        """What `ray start` has become, which ends when its raylet does."""

    @property
    def hosts(self) -> list[Host]:
        return [self.head, *self.workers]

    def start(self) -> None:
        """Raises ClusterFailed, HostFailed."""
        for host in self.hosts:
            host.start()
        self._ray_start(self.head, "--head", f"--port={_GCS_PORT}", "--num-cpus=0", "--include-dashboard=false")
        until(lambda: _listens(self.head.address, _GCS_PORT), "Ray's head does not listen")
        for host in self.workers:
            self._ray_start_worker(host)
        command = [sys.executable, "-m", "tests.netns.driver", f"{self.head.address}:{_GCS_PORT}", str(HTTP_PORT)]
        with _said("driver").open("w") as errors:
            self._driver = self.head.run(
                command, self._environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors
            )
        assert self._driver.stdout is not None
        if self._driver.stdout.readline() != "ready\n":
            raise ClusterFailed(f"Serve did not start: {_said('driver').read_text()[-2000:]}")
        self.wait_for_nodes(self.hosts)

    def restore(self) -> None:
        """Every host as new that is not what it was; what still runs on such a one ends before."""
        known = self.nodes()
        lost = [host for host in self.workers if host.address not in known or not is_alive(host.pid)]
        for host in lost:
            host.kill()
        until(lambda: not {host.address for host in lost} & set(self.nodes()), "Ray takes a dead host for alive")
        for host in lost:
            host.start()
            self._ray_start_worker(host)
        self.wait_for_nodes(lost)
        until(self.answers, "nobody answers requests any more")

    def deploy(self, args: dict[str, Any]) -> None:
        """Raises ClusterFailed."""
        self._ask(do="deploy", args=args)

    def nodes(self) -> list[str]:
        """Addresses of the nodes that Ray takes for alive."""
        found: list[str] = self._ask(do="nodes")
        return found

    def wait_for_nodes(self, hosts: Sequence[Host]) -> None:
        until(lambda: self._have_joined(hosts), f"not all of {[host.name for host in hosts]} have joined")

    def _have_joined(self, hosts: Sequence[Host]) -> bool:
        joined = self.nodes()
        missing = [host for host in hosts if host.address not in joined]
        for host in missing:
            # On a busy machine its parts may not find each other in the time that they have.
            if self._rays[host].poll() is not None:
                self._ray_start_worker(host)
        return not missing

    def answers(self) -> bool:
        """Whether a request would be served."""
        try:
            return self._http.get("/ready").status_code == 200
        except httpx.HTTPError:
            return False

    def where(self, kind: str) -> dict[int, Host]:
        """Processes of a kind, and the host of each."""
        return {pid: host for host in self.hosts for pid, command in host.processes().items() if kind in command}

    def keep_logs(self, folder: Path) -> None:
        """What everybody said, for whoever looks for a reason."""
        folder.mkdir(parents=True, exist_ok=True)
        for host in filter(lambda host: host.pid, self.hosts):
            (folder / f"{host.name}.manta.log").write_text(host.read(LOG))
            copy = ["cp", "-r", f"{FILES}/ray/session_latest/logs", str((folder / f"{host.name}.ray").absolute())]
            subprocess.run(host.inside(copy), check=False)
            with contextlib.suppress(OSError):
                (folder / f"{host.name}.start.log").write_text(_said(host.name).read_text())

    def _ray_start(self, host: Host, *options: str) -> None:
        command = [sys.executable, "-m", "ray.scripts.scripts", "start", f"--node-ip-address={host.address}"]
        command += [f"--object-store-memory={_OBJECT_STORE_BYTES}", "--block", "--disable-usage-stats", *options]
        with _said(host.name).open("w") as output:
            self._rays[host] = host.run(
                command, self._environment, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT
            )

    def _ray_start_worker(self, host: Host) -> None:
        self._ray_start(host, f"--address={self.head.address}:{_GCS_PORT}", "--num-cpus=1")

    def _ask(self, **asked: Any) -> Any:
        driver = self._driver
        assert driver is not None and driver.stdin is not None and driver.stdout is not None
        print(json.dumps(asked), file=driver.stdin, flush=True)
        line = driver.stdout.readline()
        answer = json.loads(line) if line else {"error": _said("driver").read_text()[-2000:]}
        if "error" in answer:
            raise ClusterFailed(answer["error"])
        return answer["result"]


def until(condition: Callable[[], bool], otherwise: str, seconds: float = START_S) -> None:
    """Returns once it is so. Raises ClusterFailed."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise ClusterFailed(f"after {seconds:g} s: {otherwise}")
        time.sleep(POLL_S)


def _listens(address: str, port: int) -> bool:
    try:
        with socket.create_connection((address, port), timeout=1):
            return True
    except OSError:
        return False


def _said(name: str) -> Path:
    """A file of this process's own, for the output of another."""
    return FILES / f"{name}.out"
