"""The engine's thread: results, refusals, aborts, sleep and failure, over an engine without a model."""

import threading
import time
from collections.abc import Callable, Iterator, Sequence

import pytest

from deployments import liveness
from deployments.engine_thread import EngineStopped, EngineThread
from engine.errors import InvalidRequest, ModelError
from engine.sampling_params import SamplingParams
from engine.sequence import Emission, FinishReason, Request
from engine.stats import EngineStats
from tests.deployments.fakes import CRASH_PROMPT, FakeEngine, token_at

WAIT_S = 10.0


class Harness:
    """An engine thread and what it delivered."""

    def __init__(self, engine: FakeEngine) -> None:
        self.engine = engine
        self.emissions: list[Emission] = []
        self.stats: EngineStats | None = None
        self.deliveries = 0
        self._news = threading.Condition()
        self.thread = EngineThread(lambda: engine, self._deliver)
        self.thread.start().result(WAIT_S)

    def _deliver(self, emissions: Sequence[Emission], stats: EngineStats) -> None:
        with self._news:
            self.emissions.extend(emissions)
            self.stats = stats
            self.deliveries += 1
            self._news.notify_all()

    def wait_for_finish(self, request_id: str, samples: int = 1) -> list[Emission]:
        """All emissions of a request, once every sample has ended."""

        def mine() -> list[Emission]:
            return [emission for emission in self.emissions if emission.request_id == request_id]

        with self._news:
            done = self._news.wait_for(
                lambda: sum(emission.finish_reason is not None for emission in mine()) == samples, WAIT_S
            )
            assert done, f"{request_id} did not finish: {mine()}"
            return mine()

    def wait_until(self, condition: Callable[[], bool]) -> None:
        with self._news:
            assert self._news.wait_for(condition, WAIT_S)


@pytest.fixture
def harness() -> Iterator[Harness]:
    harness = Harness(FakeEngine(step_s=0.001))
    yield harness
    harness.thread.close()


def request(request_id: str, *tokens: int, max_tokens: int = 5, n: int = 1) -> Request:
    return Request(request_id, tokens or (1, 2), SamplingParams(max_tokens=max_tokens, n=n))


def test_tokens_of_every_request_arrive_in_order(harness: Harness) -> None:
    requests = [request(f"r{i}", i, max_tokens=10) for i in range(8)]
    for each in requests:
        harness.thread.add(each).result(WAIT_S)
    for each in requests:
        tokens = [token for emission in harness.wait_for_finish(each.request_id) for token in emission.token_ids]
        assert tokens == [token_at(each, 0, index) for index in range(10)]


def test_requests_share_iterations(harness: Harness) -> None:
    for i in range(8):
        harness.thread.add(request(f"r{i}", max_tokens=100))
    for i in range(8):
        harness.wait_for_finish(f"r{i}")
    assert harness.stats is not None and harness.stats.steps_total < 200


def test_invalid_request_is_refused_and_its_neighbours_are_not_disturbed(harness: Harness) -> None:
    good = harness.thread.add(request("good", max_tokens=20))
    bad = harness.thread.add(Request("bad", (), SamplingParams(max_tokens=1)))
    good.result(WAIT_S)
    with pytest.raises(InvalidRequest, match="empty prompt"):
        bad.result(WAIT_S)
    assert len(harness.wait_for_finish("good")) == 20


def test_aborted_request_brings_nothing_more_and_the_engine_forgets_it(harness: Harness) -> None:
    harness.thread.add(request("r", max_tokens=100_000)).result(WAIT_S)
    harness.wait_until(lambda: bool(harness.emissions))
    harness.thread.abort(["r", "unknown"])
    harness.wait_until(lambda: harness.stats is not None and harness.stats.num_running == 0)
    seen = len(harness.emissions)
    time.sleep(0.05)
    assert len(harness.emissions) == seen
    assert not harness.engine.has_work()


def test_idle_engine_is_neither_stepped_nor_polled(harness: Harness) -> None:
    harness.thread.add(request("r")).result(WAIT_S)
    harness.wait_for_finish("r")
    steps, deliveries, began = harness.engine.stats().steps_total, harness.deliveries, time.process_time()
    time.sleep(0.5)
    assert harness.engine.stats().steps_total == steps
    assert harness.deliveries == deliveries
    assert time.process_time() - began < 0.1


def test_cancelled_before_it_was_added_is_never_added() -> None:
    harness = Harness(FakeEngine(step_s=0.2))
    harness.thread.add(request("first", max_tokens=2)).result(WAIT_S)
    assert harness.thread.add(request("second")).cancel()
    harness.wait_for_finish("first")
    harness.thread.close()
    assert not [emission for emission in harness.emissions if emission.request_id == "second"]


def test_failed_iteration_ends_every_stream_with_an_error(harness: Harness, caplog: pytest.LogCaptureFixture) -> None:
    harness.thread.add(request("victim", max_tokens=100_000, n=3)).result(WAIT_S)
    harness.wait_until(lambda: bool(harness.emissions))
    harness.thread.add(request("culprit", *CRASH_PROMPT, max_tokens=10))
    ends = [emission for emission in harness.wait_for_finish("victim", samples=3) if emission.finish_reason]
    assert {emission.sample_index for emission in ends} == {0, 1, 2}
    assert all(emission.finish_reason is FinishReason.MOVED for emission in ends), "another engine may go on"
    assert all("a kernel failed" in (emission.error or "") for emission in ends)
    assert "a kernel failed" in str(harness.thread.failure)
    assert caplog.text.count("Traceback") == 1


def test_engine_that_failed_takes_nothing_more(harness: Harness) -> None:
    harness.thread.add(request("culprit", *CRASH_PROMPT, max_tokens=10))
    harness.wait_for_finish("culprit")
    with pytest.raises(EngineStopped):
        harness.thread.add(request("late")).result(WAIT_S)
    harness.thread.abort(["late"])


def test_request_that_the_engine_cannot_even_queue_is_not_sent_elsewhere(
    harness: Harness, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(request: Request) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(harness.engine, "add", fail)
    with pytest.raises(RuntimeError, match="failed on this request"):
        harness.thread.add(request("culprit")).result(WAIT_S)
    harness.wait_until(lambda: harness.thread.failure is not None)


def test_reason_why_an_engine_cannot_be_built_reaches_the_caller() -> None:
    def build() -> FakeEngine:
        raise ModelError("config.json: missing")

    thread = EngineThread(build, lambda emissions, stats: None)
    with pytest.raises(ModelError, match=r"config\.json: missing"):
        thread.start().result(WAIT_S)
    with pytest.raises(EngineStopped):
        thread.add(request("r")).result(WAIT_S)


def test_close_releases_the_engine_while_it_works(harness: Harness) -> None:
    harness.thread.add(request("r", max_tokens=100_000)).result(WAIT_S)
    harness.thread.close()
    assert harness.engine.closed
    with pytest.raises(EngineStopped):
        harness.thread.add(request("late")).result(WAIT_S)


def test_an_iteration_that_does_not_end_is_noticed_and_a_busy_engine_is_not(
    harness: Harness, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(liveness, "LEAST_S", 0.2)
    for number in range(20):
        harness.thread.add(request(f"r{number}", max_tokens=50)).result(WAIT_S)
    for number in range(20):
        assert harness.thread.stuck_for() is None
        harness.wait_for_finish(f"r{number}")
    go_on = threading.Event()
    step = harness.engine.step

    def stuck_step() -> list[Emission]:
        go_on.wait(WAIT_S)
        return step()

    harness.engine.step = stuck_step  # type: ignore[method-assign]
    harness.thread.add(request("stuck")).result(WAIT_S)
    deadline = time.monotonic() + WAIT_S
    while harness.thread.stuck_for() is None:
        assert time.monotonic() < deadline, "nobody noticed"
        time.sleep(0.01)
    go_on.set()
    harness.wait_for_finish("stuck")
    assert harness.thread.stuck_for() is None


def test_an_iteration_over_a_long_prompt_has_the_time_it_needs(
    harness: Harness, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(liveness, "LEAST_S", 0.05)
    harness.thread.add(request("short", max_tokens=20)).result(WAIT_S)
    harness.wait_for_finish("short")
    step, begun = harness.engine.step, threading.Event()

    def long_step() -> list[Emission]:
        harness.engine.step_tokens = 1024
        begun.set()
        time.sleep(0.6)
        return step()

    harness.engine.step = long_step  # type: ignore[method-assign]
    harness.thread.add(request("long", max_tokens=1)).result(WAIT_S)
    assert begun.wait(WAIT_S)
    until = time.monotonic() + 0.5
    while time.monotonic() < until:
        assert harness.thread.stuck_for() is None
        time.sleep(0.01)
    harness.wait_for_finish("long")


class Loaded(FakeEngine):
    """An iteration takes as long as it has requests."""

    def step(self) -> list[Emission]:
        self.step_tokens = len(self._requests)
        time.sleep(0.0005 * len(self._requests))
        return super().step()


def test_a_burst_of_a_thousand_requests_is_no_illness(monkeypatch: pytest.MonkeyPatch) -> None:
    """Iterations take a thousand times as long as those before, and longer than anything is called stuck for."""
    monkeypatch.setattr(liveness, "LEAST_S", 0.3)
    harness = Harness(Loaded(step_s=0.0))
    harness.thread.add(request("alone", max_tokens=100)).result(WAIT_S)
    harness.wait_for_finish("alone")
    added = [harness.thread.add(request(f"r{number}", max_tokens=3)) for number in range(1000)]
    deadline = time.monotonic() + 6 * WAIT_S
    while len(harness.emissions) < 100 + 3000:  # not the engine's own counts: it is another thread's
        assert harness.thread.stuck_for() is None
        assert time.monotonic() < deadline
        time.sleep(0.005)
    assert all(each.done() for each in added)
    assert len(harness.emissions) == 100 + 3000
    harness.thread.close()
