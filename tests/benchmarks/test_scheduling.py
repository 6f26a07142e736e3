"""The two ways of feeding an engine, on the real scheduler with a device that costs nothing."""

import statistics

import pytest

from benchmarks import scheduling, workloads
from benchmarks.iteration_level import Saturation, number_of_requests
from benchmarks.scheduling import IdleSkippingClock, Trace, iteration_level, request_level
from engine.config import SchedulerConfig
from engine.engine import Engine
from engine.executor import LocalExecutor
from engine.kv.pages import PagePool
from engine.limits import Limits
from engine.scheduler import Scheduler
from tests.engine.fakes import VOCAB, LedgerRunner

PAGES, PAGE_TOKENS = 512, 16
SHORT = workloads.Lengths(prompt=workloads.Range(1, 4), output=workloads.Range(1, 32))


def engine_of(batch_limit: int) -> Engine:
    config = SchedulerConfig(max_sequences=batch_limit, max_batch_tokens=256)
    executor = LocalExecutor(LedgerRunner(PAGES, PAGE_TOKENS))
    return Engine(Scheduler(config, PagePool(PAGES), PAGE_TOKENS), executor, Limits(200, VOCAB))


@pytest.mark.parametrize("batch_limit", [1, 2, 8])
def test_a_request_level_batch_runs_to_its_longest_output(batch_limit: int) -> None:
    items = workloads.make(8 * batch_limit, SHORT, vocab_size=VOCAB)
    trace = request_level(engine_of(batch_limit), items, batch_limit)
    batches = [items[i : i + batch_limit] for i in range(0, len(items), batch_limit)]
    assert trace.steps == trace.saturated_steps == sum(max(i.output_tokens for i in batch) for batch in batches)
    assert trace.tokens == sum(item.output_tokens for item in items)


@pytest.mark.parametrize("batch_limit", [1, 2, 8])
def test_iteration_level_keeps_every_place_busy(batch_limit: int) -> None:
    items = workloads.make(8 * batch_limit, SHORT, vocab_size=VOCAB)
    trace = iteration_level(engine_of(batch_limit), items)
    assert trace.tokens == sum(item.output_tokens for item in items)
    assert trace.tokens_per_step == pytest.approx(batch_limit)
    assert trace.saturated_steps < trace.steps or batch_limit == 1
    assert len(trace.normalised_latencies) == len(items)


def test_the_ratio_of_steps_is_the_closed_form() -> None:
    for batch_limit in (2, 8):
        items = workloads.make(200 * batch_limit, SHORT, vocab_size=VOCAB)
        engine = engine_of(batch_limit)
        ours, theirs = iteration_level(engine, items), request_level(engine, items, batch_limit)
        ratio = ours.tokens_per_step / theirs.tokens_per_step
        assert ratio == pytest.approx(workloads.request_level_penalty(SHORT.output, batch_limit), rel=0.05)


class StepClock:
    """Tells the iterations that have run: who waits for whom must not depend on the load of the machine."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._zero = engine.stats().steps_total

    def now(self) -> float:
        return float(self._engine.stats().steps_total - self._zero)

    def skip_to(self, moment: float) -> None:
        """Everything has arrived from the start."""


def test_a_request_is_answered_with_its_batch_or_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, items = engine_of(2), [workloads.Item((1, 2), 1), workloads.Item((3, 4), 60)]
    monkeypatch.setattr(scheduling, "IdleSkippingClock", lambda: StepClock(engine))
    ours, theirs = iteration_level(engine, items), request_level(engine, items, 2)
    assert ours.normalised_latencies == [1, 1]
    # Both of a request-level batch end together: per token, the short one waits sixty times as long.
    assert theirs.normalised_latencies == [60, 1]


def test_nobody_runs_before_arriving_and_idle_time_costs_nothing() -> None:
    items = workloads.poisson(workloads.make(20, SHORT, vocab_size=VOCAB), rate=0.01)
    for trace in (iteration_level(engine_of(4), items), request_level(engine_of(4), items, 4)):
        # Arrivals lie about 100 s apart, and an answer takes milliseconds.
        assert trace.seconds >= items[-1].arrival
        assert 0 < statistics.median(trace.normalised_latencies) < 1


def test_the_clock_skips_forward_only() -> None:
    clock = IdleSkippingClock()
    clock.skip_to(1000.0)
    assert 1000.0 <= clock.now() < 1001.0
    clock.skip_to(500.0)
    assert clock.now() >= 1000.0


def test_ratios_come_from_the_traces() -> None:
    ours = Trace(saturated_steps=100, saturated_tokens=800, saturated_seconds=2.0)
    theirs = Trace(saturated_steps=100, saturated_tokens=500, saturated_seconds=1.0)
    saturation = Saturation(8, ours, theirs)
    assert saturation.ratio_of_steps == pytest.approx(1.6)
    assert saturation.ratio_of_seconds == pytest.approx(0.8)
    assert saturation.closed_form == pytest.approx(1.772, abs=1e-3)


def test_requests_come_in_whole_batches() -> None:
    assert number_of_requests(32, batches=16, least=100) == 512
    assert number_of_requests(32, batches=1, least=100) == 128
    assert number_of_requests(1, batches=16, least=100) == 100
