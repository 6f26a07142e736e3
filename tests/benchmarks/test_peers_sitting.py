"""Workers behind their pipe, and a whole sitting: two real engines, one that is absent and one that breaks."""

import shutil
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from benchmarks import models
from benchmarks.models import Shape
from benchmarks.peers import engines, sitting
from benchmarks.peers.engines import Engine
from benchmarks.peers.measures import MEASURES, Measure, Timeline, throughput
from benchmarks.peers.process import Worker, WorkerError
from benchmarks.peers.sitting import Plan, run_group
from benchmarks.workloads import Item

LOAD = {"model": "", "format": "bf16", "threads": 1, "max_length": 64, "max_sequences": 4, "kv_bytes": 2**20}
FAKE = """
import os, subprocess, sys, time
from .wire import serve

class Fake:
    version, weight_bytes = "1.0", 7

    def __init__(self, load):
        print("a library that prints to standard output")
        self.child = subprocess.Popen(["sleep", "600"])
        if load.format == "broken":
            raise ValueError("no such format")

    def prepare(self, items):
        pass

    def run(self, items, timeline):
        order = items[0].prompt[0]
        if order == 100:
            os._exit(3)
        if order == 101:
            time.sleep(60)
        short = 1 if order == 102 else 0
        for index, item in enumerate(items):
            timeline.note([(index, [self.child.pid] * (item.output_tokens - short))])

if __name__ == "__main__":
    serve(Fake)
"""


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of workers that holds the real ones and `fake`; also where logs go."""
    workers = tmp_path / "workers"
    shutil.copytree(engines.WORKERS / "workers", workers)
    (workers / "fake.py").write_text(FAKE)
    monkeypatch.setattr(engines, "WORKERS", tmp_path)
    return tmp_path


def start(folder: Path, timeout: float = 60.0, **changes: Any) -> Worker:
    return Worker("fake", Path(sys.executable), LOAD | changes, log=folder / "fake.log", timeout=timeout)


def test_a_worker_and_its_children_take_no_time_while_others_run(fake: Path) -> None:
    with start(fake) as worker:
        child = worker.run([Item((5, 6), 3)]).outputs[0][0]
        deadline = time.monotonic() + 10
        while "State:\tT (stopped)" not in Path(f"/proc/{child}/status").read_text():
            assert time.monotonic() < deadline, "it goes on"
            time.sleep(0.01)
        assert worker.run([Item((5, 6), 3)]).outputs[0][0] == child


def test_a_worker_answers_with_times_and_tokens_whatever_else_is_printed(fake: Path) -> None:
    with start(fake) as worker:
        answer = worker.run([Item((5, 6), 3), Item((7,), 1)])
        assert (worker.version, worker.weight_bytes) == ("1.0", 7) and worker.start_seconds > 0
        assert isinstance(answer, Timeline)
        assert [len(output) for output in answer.outputs] == [3, 1]
        assert answer.seconds == max(answer.last) and sum(count for _, count in answer.steps) == 4
        child = answer.outputs[0][0]
    assert not _is_running(child)


def _is_running(pid: int) -> bool:
    """Whether a process is there and not merely waiting for somebody to collect it."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] not in "ZX"


@pytest.mark.parametrize(
    ("token", "reason"),
    [(100, "fake: ended"), (101, "no answer in 2 s"), (102, r"are \[1\], asked for were \[2\]")],
)
def test_a_worker_that_dies_hangs_or_brings_too_little_says_so(fake: Path, token: int, reason: str) -> None:
    with start(fake) as worker:
        worker._timeout = 2.0
        with pytest.raises(WorkerError, match=reason):
            worker.run([Item((token,), 2)])


def test_what_a_worker_says_on_failing_to_load_is_passed_on(fake: Path) -> None:
    with pytest.raises(WorkerError, match="ValueError: no such format"):
        start(fake, format="broken")


def test_a_sitting_interleaves_records_what_is_missing_and_finds_the_same_tokens(
    fake: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = fake / "mini"
    model.mkdir()
    models.write(model, Shape(64, 2, 2, 1, 96, 512), seed=0)
    catalogue = {name: engines.ENGINES[name] for name in ("manta", "transformers", "vllm")}
    catalogue["fake"] = Engine("fake", "Fake", {16: "broken"})
    monkeypatch.setattr(sitting, "ENGINES", catalogue)
    monkeypatch.setattr(sitting, "interpreter", lambda name: None if name == "vllm" else Path(sys.executable))
    small = Measure("batch", "batch", lambda large: [(20, 4), (9, 6), (14, 5), (3, 5)], throughput)
    monkeypatch.setattr(sitting, "MEASURES", {**MEASURES, "batch": small})
    lines: list[str] = []
    plan = Plan(tuple(catalogue), ("batch", "stream", "start"), threads=1, rounds=2, timeout=120.0)
    group = run_group(plan, model, 16, lines.append)
    assert group is not None
    assert run_group(plan, model, 3, lines.append) is None

    ours, theirs, absent, broken = group.entries
    for entry in (ours, theirs):
        assert entry.problem is None and entry.start_seconds is not None and entry.start_seconds > 0
        assert {name: len(values) for name, values in entry.values.items()} == {"batch": 2, "stream": 6}
        assert all(value > 0 for values in entry.values.values() for value in values)
        assert entry.weight_bytes == (model / "model.safetensors").stat().st_size
    assert theirs.agreement is not None and theirs.agreement >= 0.75
    assert absent.problem == "vllm is not installed: run python -m benchmarks.peers.install vllm"
    assert broken.problem is not None and "no such format" in broken.problem
    turns = [line.split()[-3] for line in lines if "batch run" in line]
    assert turns == ["manta", "transformers"] * 2
