"""What is measured of a model over several ranks: at a load that is steady, and on ranks that are real."""

import json
import subprocess
import sys
from collections.abc import Iterator
from itertools import count
from pathlib import Path

import pytest

from benchmarks import workloads
from benchmarks.parallel import Line
from benchmarks.rank_groups import AtDepth, RankMemory, cut
from benchmarks.steady import steady
from cluster.config import ParallelConfig
from engine.batch import Batch, StepOutput
from engine.config import SchedulerConfig
from engine.engine import Engine
from engine.executor import LocalExecutor
from engine.kv.pages import PagePool
from engine.limits import Limits
from engine.scheduler import Scheduler
from tests.engine.fakes import VOCAB, LedgerRunner, run_to_end
from tests.engine.rig import request

ROOT = Path(__file__).parents[2]
PAGES, PAGE_TOKENS, SEQUENCES = 512, 16, 8
SHORT = workloads.Lengths(prompt=workloads.Range(1, 40), output=workloads.Range(1, 40))


class Watched:
    """Runs batches, and notes how many sequences each has."""

    def __init__(self) -> None:
        self.num_tokens = 0
        self.sequences: list[int] = []
        self._runner = LedgerRunner(PAGES, PAGE_TOKENS)

    def run(self, batch: Batch) -> StepOutput:
        self.num_tokens += batch.num_tokens
        self.sequences.append(batch.num_sequences)
        return self._runner.run(batch)


def test_all_places_are_taken_for_as_long_as_is_measured_and_nothing_is_left() -> None:
    runner = Watched()
    pool = PagePool(PAGES)
    scheduler = Scheduler(SchedulerConfig(max_sequences=SEQUENCES), pool, PAGE_TOKENS)
    engine = Engine(scheduler, LocalExecutor(runner), Limits(200, VOCAB))
    waits: Iterator[float] = (0.05 * number for number in count(1))
    marks: list[int] = []

    def num_tokens() -> int:
        marks.append(len(runner.sequences))
        return runner.num_tokens

    items = workloads.stream(SHORT, vocab_size=VOCAB)
    found = steady(engine, items, SEQUENCES, 0.2, num_tokens, lambda: (next(waits), 7.0))
    begin, end = marks
    assert end - begin > SEQUENCES
    assert set(runner.sequences[begin:end]) == {SEQUENCES}
    assert found.num_tokens >= SEQUENCES * (end - begin)
    assert found.seconds >= 0.2
    assert found.tokens_per_second == found.num_tokens / found.seconds
    assert found.bubbles == (pytest.approx(0.05 / found.seconds), 0.0)
    assert not engine.has_work()
    assert pool.num_free == PAGES


def test_requests_of_a_stream_are_those_of_a_list() -> None:
    stream = workloads.stream(workloads.EVEN, vocab_size=500, seed=3)
    assert [next(stream) for _ in range(20)] == workloads.make(20, workloads.EVEN, vocab_size=500, seed=3)


def test_stages_have_the_layers_that_were_asked_for() -> None:
    places = cut(ParallelConfig(tensor=2, pipeline=2), (5, 3))
    assert [(place.rank, place.layers) for place in places] == [
        (0, range(5)),
        (1, range(5)),
        (2, range(5, 8)),
        (3, range(5, 8)),
    ]
    with pytest.raises(ValueError, match="3 numbers of layers are given for 2 stages"):
        cut(ParallelConfig(pipeline=2), (1, 2, 3))


def test_memory_is_compared_with_what_a_rank_holds() -> None:
    memory = RankMemory(before=100, weights=1000, loading=1100, pages=500, peak=1750)
    assert memory.loading_overhead == pytest.approx(0.1)
    assert memory.overhead == pytest.approx(0.1)


@pytest.mark.parametrize(("value", "at_most", "met"), [(2.0, True, False), (1.5, True, True), (1.4, False, False)])
def test_an_aim_is_met_from_the_side_that_is_meant(value: float, at_most: bool, met: bool) -> None:
    assert Line("bubbles", value, "x", 1.5, at_most).is_met is met


def test_a_pipeline_of_real_ranks_is_measured(tmp_path: Path) -> None:
    """At both depths, with what the stages wait and need."""
    target = tmp_path / "result.json"
    command = [sys.executable, "-m", "benchmarks.parallel", "--model", "thin", "--only", "pipeline"]
    command += ["--rounds", "1", "--seconds", "1", "--split", "5,3", "--json", str(target)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "layers of the stages: 5, 3" in done.stdout
    details = json.loads(target.read_text())["details"]
    for runs in details["pipeline"].values():
        assert runs[0]["num_tokens"] > 0
        # Ranks tell with each beat how long they have waited: on a busy machine one may come after its second.
        assert len(runs[0]["bubbles"]) == 2 and all(share > 0 for share in runs[0]["bubbles"])
    for memory in details["pipeline memory"]:
        assert 0 < memory["weights"] < 2**20
        assert memory["before"] < memory["peak"]


def test_the_pages_that_sequences_were_given_are_counted() -> None:
    executor = AtDepth(LocalExecutor(LedgerRunner(PAGES, PAGE_TOKENS)), 1)  # type: ignore[arg-type]
    scheduler = Scheduler(SchedulerConfig(), PagePool(PAGES), PAGE_TOKENS)
    engine = Engine(scheduler, executor, Limits(200, VOCAB), prefix_caching=False)
    for name in "ab":
        engine.add(request(name, [1] * PAGE_TOKENS * 3, max_tokens=PAGE_TOKENS))
    run_to_end(engine)
    assert executor.num_pages == 2 * 4
    engine.add(request("c", [1], max_tokens=1))
    run_to_end(engine)
    assert executor.num_pages == 2 * 4, "one that was given before is free"
