"""The benchmark of dispatch measures what it says."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.dispatch import measure, one_host
from tests.netns.isolation import ROOT, obstacle


def test_every_batch_reaches_every_rank_after_it_was_sent_and_before_it_is_answered() -> None:
    times = measure(one_host(2), sequences=4, context=64, steps=20, pause_s=0.001)
    assert len(times) == 20
    for each in times:
        assert 0 < each.first <= each.last
        assert each.first < each.answer


def test_ranks_of_several_hosts_are_measured_too(tmp_path: Path) -> None:
    if reason := obstacle():
        pytest.skip(reason)
    found = tmp_path / "found.json"
    command = [sys.executable, "-m", "benchmarks.dispatch", "--ranks", "3", "--hosts", "2", "--steps", "20"]
    done = subprocess.run([*command, "--json", str(found)], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    (line,) = json.loads(found.read_text())
    assert line["ranks"] == 3 and 0 < line["first"] <= line["last"]


def test_more_hosts_than_ranks_are_refused() -> None:
    command = [sys.executable, "-m", "benchmarks.dispatch", "--ranks", "2", "--hosts", "4"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and "--hosts 4: each has a rank or more" in done.stderr
