"""A world of its own for several hosts: networks, processes and mounts that are gone with its first process.

Owns how such a world is made, and what stands in the way. The kernel takes all of it down when that process ends,
however it ends, and that one ends with whoever started it. So nothing has to be named, found again or removed; no two
worlds meet, and any address is free in a new one. Knows no hosts.
"""

import shutil
import subprocess
import sys
from collections.abc import Sequence
from os import geteuid
from pathlib import Path

ROOT = Path(__file__).parents[2]
_TOOLS = ("ip", "mount", "nsenter", "setpriv", "unshare")
_TRIAL = (
    "mount -t tmpfs tmpfs /dev/shm && ip link add switch type bridge && ip link add one type veth peer name other"
    " && unshare --net --uts --ipc --pid --mount-proc --fork true"
)
"""All that hosts need."""
_TRIAL_TIMEOUT_S = 20.0


def isolated(command: Sequence[str]) -> list[str]:
    """`command` as the first process of a new world, which ends when the thread that starts this does."""
    own_user = [] if geteuid() == 0 else ["--user", "--map-root-user"]
    world = ["unshare", *own_user, "--net", "--uts", "--ipc", "--pid", "--mount-proc", "--fork", "--kill-child"]
    return ["setpriv", "--pdeathsig", "KILL", *world, "--", *command]


def run_isolated(module: str, arguments: Sequence[str]) -> int:
    """Runs a module of Python in a new world; its exit code, or 130 after Ctrl-C."""
    command = isolated([sys.executable, "-m", module, *arguments])
    # Of a session of its own: Ctrl-C is for this process, and ends the world as any other end of it does.
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.DEVNULL, start_new_session=True) as world:
        try:
            return world.wait()
        except KeyboardInterrupt:
            return 130
        finally:
            world.kill()


def obstacle() -> str:
    """Why there can be no such world here, in one line; empty if there can."""
    if sys.platform != "linux":
        return "network namespaces are Linux's"
    missing = [tool for tool in _TOOLS if shutil.which(tool) is None]
    if missing:
        return f"{', '.join(missing)} not found: util-linux and iproute2 have them"
    try:
        trial = subprocess.run(
            isolated(["sh", "-c", _TRIAL]), capture_output=True, text=True, timeout=_TRIAL_TIMEOUT_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"namespaces cannot be made here: {error}"
    if trial.returncode:
        said = trial.stderr.strip().splitlines() or [f"exit code {trial.returncode}"]
        return f"namespaces cannot be made here: {said[-1]}"
    return ""
