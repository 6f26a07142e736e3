"""Runs `manta` as a user does: a process with its own arguments, streams and exit code."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[3]
MANTA = [sys.executable, "-m", "deployments.cli.main"]


def environment(**variables: str) -> dict[str, str]:
    """This process's environment with a wide terminal, one arithmetic thread, no GPU and no stray API key."""
    clean = {name: value for name, value in os.environ.items() if name != "MANTA_API_KEY"}
    return {
        **clean,
        "COLUMNS": "160",
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONPATH": str(ROOT),
        **variables,
    }


def manta(
    *arguments: object, text: str = "", timeout: float = 120, **variables: str
) -> subprocess.CompletedProcess[str]:
    """`manta ARGUMENTS` with `text` on standard input."""
    return subprocess.run(
        [*MANTA, *map(str, arguments)],
        input=text,
        capture_output=True,
        text=True,
        timeout=timeout,
        env=environment(**variables),
        cwd=ROOT,
    )
