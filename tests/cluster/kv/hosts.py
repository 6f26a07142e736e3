"""A KV host in a process of its own, which a test may stop, kill and start again at the same place."""

import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

PATIENCE_S = 20.0


class Host:
    def __init__(self, folder: Path, segments: Path) -> None:
        """`segments`: a private folder that is really in memory."""
        self.folder = folder
        self.segments = segments
        self.process: subprocess.Popen[str] | None = None

    @property
    def socket(self) -> Path:
        return self.folder / "kv.sock"

    def start(self, memory: str = "1MiB", *options: str) -> None:
        command = [sys.executable, "-m", "cluster.kv.server", "--directory", str(self.folder), "--memory", memory]
        command += ["--segments", str(self.segments)]
        self.process = subprocess.Popen([*command, *options], stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        assert self.process.stdout.readline()

    def send(self, how: signal.Signals) -> None:
        assert self.process is not None
        self.process.send_signal(how)

    def stop(self, how: signal.Signals = signal.SIGTERM) -> None:
        if self.process is not None:
            self.send(signal.SIGCONT)
            self.send(how)
            self.process.wait(PATIENCE_S)
            self.process = None


def eventually(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, "it did not come to pass"
        time.sleep(0.01)
