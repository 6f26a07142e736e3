"""`manta bench` against a scripted endpoint: what it measures and how it fails."""

import asyncio
import json
import statistics
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deployments.cli.bench import parse_range
from deployments.cli.errors import CommandError
from deployments.cli.load import Call, Outcome, Plan, percentile, run, summarise
from tests.deployments.cli.command import manta
from tests.deployments.cli.endpoint import Endpoint

PLAN = Plan(model="tiny", num_prompts=400, input_tokens=(4, 8), output_tokens=(2, 6), vocab_size=256)


@pytest.fixture
def endpoint() -> Iterator[Endpoint]:
    with Endpoint() as endpoint:
        yield endpoint


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=50), st.floats(0, 100))
def test_percentiles_are_those_of_numpy(values: list[float], percent: float) -> None:
    assert percentile(sorted(values), percent) == pytest.approx(np.percentile(values, percent), rel=1e-9, abs=1e-6)


def test_a_summary_of_known_outcomes() -> None:
    good = Outcome(start=10.0, chunk_times=[10.5, 10.6, 10.8], end=11.0, prompt_tokens=7, output_tokens=4)
    other = Outcome(start=10.0, chunk_times=[11.5], end=11.5, prompt_tokens=3, output_tokens=1)
    bad = Outcome(start=10.0, end=10.1, error="HTTP 503: loading")
    summary = summarise([good, other, bad, bad], seconds=2.0)
    assert (summary.completed, summary.failed, summary.errors) == (2, 2, {"HTTP 503: loading": 2})
    assert summary.output_tokens_per_second == 2.5
    assert summary.total_tokens_per_second == 7.5
    assert summary.requests_per_second == 1.0
    assert summary.ttft is not None and summary.ttft.mean == pytest.approx(1.0)
    assert summary.itl is not None and summary.itl.mean == pytest.approx(0.15)
    assert summary.tpot is not None and summary.tpot.p50 == pytest.approx(0.1)
    assert summary.e2e is not None and summary.e2e.p50 == pytest.approx(1.25)


def test_a_plan_is_fixed_by_its_seed_and_keeps_to_its_ranges() -> None:
    calls = PLAN.calls()
    assert calls == PLAN.calls()
    assert {len(call.body["prompt"]) for call in calls} == {4, 5, 6, 7, 8}
    assert {call.body["max_tokens"] for call in calls} == {2, 3, 4, 5, 6}
    assert all(3 <= token < 256 for call in calls for token in call.body["prompt"])
    assert all(call.arrival is None for call in calls)


def test_arrivals_are_a_poisson_process_of_the_asked_rate() -> None:
    plan = Plan(model="tiny", num_prompts=4000, input_tokens=(1, 1), output_tokens=(1, 1), vocab_size=9, rate=5.0)
    arrivals = [call.arrival for call in plan.calls()]
    gaps = [b - a for a, b in pairwise(arrivals) if a is not None and b is not None]
    # Exponential: mean 1 / rate, and a standard deviation of the same size.
    assert statistics.fmean(gaps) == pytest.approx(0.2, rel=0.06)
    assert statistics.pstdev(gaps) == pytest.approx(0.2, rel=0.06)


def test_a_closed_loop_keeps_its_concurrency(endpoint: Endpoint) -> None:
    endpoint.piece_seconds = 0.005
    outcomes: list[Outcome] = []
    calls = [Call({"prompt": "go", "max_tokens": 6}) for _ in range(12)]
    seconds = asyncio.run(run(endpoint.url, calls, concurrency=3, on_done=outcomes.append))
    assert endpoint.most_at_once == 3
    assert [outcome.output_tokens for outcome in outcomes] == [6] * 12
    # Twelve requests of 30 ms each, three at a time.
    assert seconds >= 0.12
    assert all(outcome.latency >= 0.03 and len(outcome.gaps) == 5 for outcome in outcomes)
    assert all(0 < outcome.time_to_first < outcome.latency for outcome in outcomes)


def test_waiting_for_a_place_counts_as_latency_in_an_open_loop(endpoint: Endpoint) -> None:
    endpoint.piece_seconds = 0.02
    outcomes: list[Outcome] = []
    calls = [Call({"prompt": "go", "max_tokens": 5}, arrival=0.0) for _ in range(4)]
    asyncio.run(run(endpoint.url, calls, concurrency=1, on_done=outcomes.append))
    latencies = sorted(outcome.latency for outcome in outcomes)
    assert latencies[3] >= 0.4
    assert latencies[0] < latencies[1] < latencies[2] < latencies[3]


def test_failures_are_outcomes(endpoint: Endpoint) -> None:
    outcomes: list[Outcome] = []
    calls = [Call({"prompt": prompt, "max_tokens": 2}) for prompt in ("refuse", "break", "cut", "fine")]
    asyncio.run(run(endpoint.url, calls, concurrency=4, on_done=outcomes.append))
    errors = {outcome.error for outcome in outcomes}
    assert errors == {
        "HTTP 400: no such luck",
        "the replica is gone",
        "the stream ended before the completion did",
        None,
    }


def test_the_command_prints_a_table_and_writes_json(endpoint: Endpoint, tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    result = manta(
        *("bench", "--url", endpoint.url, "--num-prompts", 6, "--concurrency", 2, "--output-len", "3:5", "--text"),
        *("--json", path),
    )
    assert result.returncode == 0, result.stderr
    for word in ("TTFT", "ITL", "TPOT", "E2E", "p99", "output tokens/s", "6 requests"):
        assert word in result.stdout
    written = json.loads(path.read_text())
    # The warm-up request is sent, and not counted.
    assert len(endpoint.bodies) == 7
    assert written["output_tokens"] == sum(body["max_tokens"] for body in endpoint.bodies[1:])
    assert written["output_tokens_per_second"] == pytest.approx(written["output_tokens"] / written["seconds"])
    assert written["plan"]["output_tokens"] == [3, 5]


def test_bad_ranges_are_refused() -> None:
    assert parse_range("--input-len", "7") == (7, 7)
    assert parse_range("--input-len", "7:9") == (7, 9)
    for bad in ("", "a", "9:7", "0", "1:2:3", ":3"):
        with pytest.raises(CommandError, match="--input-len"):
            parse_range("--input-len", bad)
