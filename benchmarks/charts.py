"""Draws result files, by scripts that run in the environment with matplotlib (`benchmarks.peers.install chart`)."""

import argparse
import subprocess
from pathlib import Path

from benchmarks.peers.install import python_of


def check(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    """Exits with a usage message where there is a chart and no file to draw."""
    if arguments.png is not None and arguments.json is None:
        parser.error("--png draws the file of --json: give both")


def draw(script: Path, source: Path, target: Path) -> str:
    """Runs `script source target`, which draws a result file; says where the chart is, or why there is none."""
    python = python_of("chart")
    if python is None:
        return "no chart: matplotlib is not installed, run python -m benchmarks.peers.install chart"
    done = subprocess.run([str(python), str(script), str(source), str(target)], capture_output=True, text=True)
    return f"chart in {target}" if done.returncode == 0 else f"no chart:\n{done.stderr[-1000:]}"
