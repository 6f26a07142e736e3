"""The first process of a host: `python -m tests.netns.host NAME [OTHER=ADDRESS ...]`, with the addresses of all hosts.

Gives the host its name, names for the others, and a memory file system of its own, which is all that it writes to; says
"ready" then, and lives as long as its standard input is open. With it everything on the host ends at once, as when a
machine loses its power.
"""

import signal
import socket
import subprocess
import sys
from collections.abc import Sequence

from tests.netns.hosts import FILES


def main(name: str, others: Sequence[str]) -> None:
    socket.sethostname(name)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "mode=1777", "tmpfs", str(FILES)], check=True)
    known = [("localhost", "127.0.0.1"), *(other.split("=") for other in others)]
    _replace("/etc/hosts", "".join(f"{address} {other}\n" for other, address in known))
    # There is no server of names. Asked for one at this machine, it says so at once.
    _replace("/etc/resolv.conf", "nameserver 127.0.0.1\n")
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    # Orphans of a host end up below its first process; the kernel is to take note of their end by itself.
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    print("ready", flush=True)
    sys.stdin.read()


def _replace(path: str, content: str) -> None:
    """On this host alone."""
    own = FILES / path.rpartition("/")[2]
    own.write_text(content)
    own.chmod(0o644)
    subprocess.run(["mount", "--bind", str(own), path], check=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
