"""From `manta serve` to the first token, and from Ctrl-C to the last process gone.

python -m benchmarks.start
"""

import argparse
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import httpx

from benchmarks import processes
from cluster.ports import free_ports

TIMEOUT_SECONDS = 180.0
_POLL_SECONDS = 0.05


@dataclass(frozen=True, slots=True)
class Start:
    """Seconds after the command was given, and for the last one after Ctrl-C."""

    port_open: float
    ready: float
    first_token: float
    stopped: float
    num_left: int
    """Processes of the application that were still there."""


def measure(arguments: list[str], log: Path) -> Start:
    """Starts, asks, stops. Raises RuntimeError with the end of the log if the server does not come up."""
    (port,) = free_ports(1)
    command = [sys.executable, "-m", "deployments.cli.main", "serve", *arguments, "--port", str(port)]
    begin = time.perf_counter()
    with log.open("wb") as output:
        server = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        url = f"http://127.0.0.1:{port}"
        with httpx.Client(base_url=url, timeout=TIMEOUT_SECONDS) as http:
            wait(lambda: reachable(port), server, log)
            port_open = time.perf_counter() - begin
            wait(lambda: is_ready(http), server, log)
            ready = time.perf_counter() - begin
            first_token(http)
            answered = time.perf_counter() - begin
        family = [entry.pid for entry in processes.tree(server.pid)]
        asked = time.perf_counter()
        server.send_signal(signal.SIGINT)
        server.wait(TIMEOUT_SECONDS)
        stopped = time.perf_counter() - asked
        num_left = sum(Path(f"/proc/{pid}").exists() for pid in family)
    finally:
        if server.poll() is None:
            os.killpg(server.pid, signal.SIGKILL)
    return Start(port_open, ready, answered, stopped, num_left)


def wait(condition: Callable[[], bool], server: "subprocess.Popen[bytes]", log: Path) -> None:
    """Polls until the condition holds. Raises RuntimeError if the server ends first or time runs out."""
    deadline = time.monotonic() + TIMEOUT_SECONDS
    while not condition():
        if server.poll() is not None or time.monotonic() > deadline:
            reason = "not up in time" if server.poll() is None else f"ended with exit code {server.returncode}"
            raise RuntimeError(f"manta serve: {reason}; its last lines:\n{log.read_text(errors='replace')[-2000:]}")
        time.sleep(_POLL_SECONDS)


def reachable(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def is_ready(http: httpx.Client) -> bool:
    try:
        return http.get("/ready").status_code == 200
    except httpx.TransportError:
        return False


def first_token(http: httpx.Client) -> None:
    """Returns when the first text of a chat answer has come."""
    model = http.get("/v1/models").json()["data"][0]["id"]
    body = {"model": model, "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 8, "stream": True}
    with http.stream("POST", "/v1/chat/completions", json=body) as response:
        if response.status_code != 200:
            raise RuntimeError(f"HTTP {response.status_code}: {response.read().decode(errors='replace')[:500]}")
        for line in response.iter_lines():
            if line.startswith("data: {") and json.loads(line[6:])["choices"][0]["delta"].get("content"):
                return
    raise RuntimeError("the answer held no text")


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.start",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="Everything else is handed to `manta serve`, such as a model.",
    )
    parser.add_argument("--rounds", type=int, default=3)
    known, rest = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as directory:
        for number in range(1, known.rounds + 1):
            try:
                start = measure(rest, Path(directory) / "serve.log")
            except RuntimeError as error:
                raise SystemExit(str(error)) from None
            print(
                f"round {number}  port {start.port_open:.1f} s  ready {start.ready:.1f} s  "
                f"first token {start.first_token:.1f} s  stop {start.stopped:.1f} s  {start.num_left} processes left",
                flush=True,
            )


if __name__ == "__main__":
    main()
