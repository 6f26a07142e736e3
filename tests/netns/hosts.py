"""Hosts on one machine, and the switch between them: started, cut off, connected again, killed.

For a process inside a world of its own (`tests.netns.isolation`), which is also who sits at the switch with an address
of its own. Each host has its name, its network, its processes, and its /dev/shm: nobody takes two of them for one
machine. Knows nothing of what runs there.
"""

import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from tests.netns.isolation import ROOT

FILES = Path("/dev/shm")
"""Where a host has files of its own, also of its shared memory; gone with it."""
_NETWORK = "10.77.0"
_OUTSIDE = f"{_NETWORK}.254"
_START_TIMEOUT_S = 60.0


class HostFailed(Exception):
    """A host did not start."""


def make_switch() -> None:
    """The network of the hosts, and an address of this process there. Once, and first."""
    subprocess.run(["mount", "-t", "tmpfs", "-o", "mode=1777", "tmpfs", str(FILES)], check=True)
    for command in (
        "link set lo up",
        "link add switch type bridge",
        f"address add {_OUTSIDE}/24 dev switch",
        "link set switch up",
    ):
        _ip(command)


def address_of(number: int) -> str:
    """Of the host with this number at the switch."""
    return f"{_NETWORK}.{number}"


class Host:
    """One of them, from `start` to `kill`; then it can be started again."""

    def __init__(self, name: str, number: int, known: Sequence[str] = ()) -> None:
        """`number`: at the switch, from 1 on. `known`: NAME=ADDRESS of all that it is to know by name."""
        self.name = name
        self._known = known
        self.address = address_of(number)
        self._port = f"port{number}"
        """Its port of the switch."""
        self._first: subprocess.Popen[str] | None = None
        self.pid = 0
        """Of its first process; 0 of a host that does not run."""

    def start(self) -> None:
        """Returns once it has its network. Raises HostFailed."""
        spaces = ["--net", "--uts", "--ipc", "--pid", "--mount-proc", "--fork", "--kill-child"]
        errors = FILES / f"{self.name}.errors"
        with errors.open("w") as said:
            first = subprocess.Popen(
                ["unshare", *spaces, "--", sys.executable, "-m", "tests.netns.host", self.name, *self._known],
                cwd=ROOT,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=said,
                text=True,
            )
        assert first.stdout is not None
        if first.stdout.readline() != "ready\n":
            raise HostFailed(f"{self.name}: exit code {first.wait(_START_TIMEOUT_S)}: {errors.read_text()[-1000:]}")
        self._first = first
        self.pid = int(Path(f"/proc/{first.pid}/task/{first.pid}/children").read_text())
        _ip(f"link add {self._port} type veth peer name eth0 netns {self.pid}")
        _ip(f"link set {self._port} master switch up")
        for command in (
            f"address add {self.address}/24 dev eth0",
            "link set eth0 up",
            f"route add default via {_OUTSIDE}",
        ):
            subprocess.run(self.inside(["ip", *command.split()]), check=True)

    def kill(self) -> None:
        """Ends all of its processes at once, without a word to anybody; its cable is gone, too."""
        if self._first is not None:
            os.kill(self.pid, signal.SIGKILL)
            self._first.wait()
            self._first, self.pid = None, 0
            # The kernel takes it away, too, but in its own time.
            subprocess.run(["ip", "link", "delete", self._port], stderr=subprocess.DEVNULL, check=False)

    def cut(self) -> None:
        """Pulls its cable: it goes on, and nobody hears of it."""
        _ip(f"link set {self._port} down")

    def mend(self) -> None:
        _ip(f"link set {self._port} up")

    def inside(self, command: Sequence[str]) -> list[str]:
        """What runs a command on it, in the same folder."""
        spaces = ["--net", "--uts", "--ipc", "--pid", "--mount", "--wd"]
        return ["nsenter", "--target", str(self.pid), *spaces, "--", *command]

    def run(
        self, command: Sequence[str], environment: Mapping[str, str], **files: IO[Any] | int
    ) -> "subprocess.Popen[str]":
        """Starts a command on it, with more in its environment."""
        return subprocess.Popen(self.inside(command), env=os.environ | environment, text=True, **files)

    def read(self, path: Path) -> str:
        """What a file of its own holds; nothing if there is none."""
        try:
            return Path(f"/proc/{self.pid}/root{path}").read_text(errors="replace")
        except OSError:
            return ""

    def processes(self) -> dict[int, str]:
        """Command lines by process id, as it is outside; zombies left out."""
        own = _namespace(self.pid)
        found = {}
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit() and own and _namespace(int(entry.name)) == own and (said := _command(entry)):
                found[int(entry.name)] = said
        return found


def is_alive(pid: int) -> bool:
    return bool(_command(Path(f"/proc/{pid}")))


def _namespace(pid: int) -> str:
    try:
        return str(Path(f"/proc/{pid}/ns/pid").readlink())
    except OSError:
        return ""


def _command(entry: Path) -> str:
    """A zombie has none."""
    try:
        return (entry / "cmdline").read_text(errors="replace").replace("\0", " ").strip()
    except OSError:
        return ""


def _ip(command: str) -> None:
    subprocess.run(["ip", *command.split()], check=True)
