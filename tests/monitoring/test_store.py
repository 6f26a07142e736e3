"""Merging deltas of many processes, some of them dead, into one exposition."""

import random

import pytest
from prometheus_client.parser import text_string_to_metric_families

from monitoring.catalogue import CATALOGUE
from monitoring.recorder import Delta, Recorder
from monitoring.store import MetricsStore

TTFT = "manta:time_to_first_token_seconds"
TOKENS = "manta:generation_tokens_total"
RUNNING = "manta:num_requests_running"


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def samples(store: MetricsStore) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    """Every sample of the exposition, as Prometheus would parse it."""
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(store.render().decode())
        for sample in family.samples
    }


def value(store: MetricsStore, name: str, **labels: str) -> float | None:
    return samples(store).get((name, frozenset({"model_name": "tiny", **labels}.items())))


def replica_delta(number: int, tokens: int, running: int = 1) -> Delta:
    return Delta(number, {(TOKENS, ()): tokens}, {}, {(RUNNING, ()): running})


def test_every_counter_and_histogram_is_there_from_the_start_at_zero():
    store = MetricsStore("tiny")
    assert value(store, TOKENS, engine="0") == 0
    assert value(store, "manta:request_success_total", finished_reason="abort") == 0
    assert value(store, TTFT + "_count") == 0
    assert value(store, TTFT + "_bucket", le="+Inf") == 0
    families = {line.split()[2] for line in store.render().decode().splitlines() if line.startswith("# TYPE")}
    assert families == set(CATALOGUE)


def test_histograms_render_cumulative_buckets_and_the_true_sum():
    recorder, store = Recorder(), MetricsStore("tiny")
    values = [random.Random(1).expovariate(2.0) for _ in range(500)]
    for seconds in values:
        recorder.observe(TTFT, seconds)
    store.push("gateway-a", recorder.drain())
    for bound in ("0.001", "0.25", "1.0", "2560.0"):
        assert value(store, TTFT + "_bucket", le=bound) == sum(seconds <= float(bound) for seconds in values)
    assert value(store, TTFT + "_count") == 500
    assert value(store, TTFT + "_sum") == pytest.approx(sum(values), rel=1e-12)


def test_counters_of_several_gateways_add_up():
    store = MetricsStore("tiny")
    for source in ("gateway-a", "gateway-b"):
        recorder = Recorder()
        recorder.increment("manta:request_success_total", 2, labels=("stop",))
        store.push(source, recorder.drain())
    assert value(store, "manta:request_success_total", finished_reason="stop") == 4


def test_a_delta_that_is_sent_twice_counts_once():
    store = MetricsStore("tiny")
    for _ in range(2):
        store.push("replica-a", replica_delta(1, tokens=5))
    assert value(store, TOKENS, engine="0") == 5


def test_replicas_are_engines_of_their_own():
    store = MetricsStore("tiny")
    store.push("replica-a", replica_delta(1, tokens=5, running=2))
    store.push("replica-b", replica_delta(1, tokens=7, running=3))
    assert value(store, TOKENS, engine="0") == 5
    assert value(store, TOKENS, engine="1") == 7
    assert value(store, RUNNING, engine="1") == 3


def test_gauges_of_a_silent_replica_go_and_its_counters_stay():
    clock = Clock()
    store = MetricsStore("tiny", silence=10, clock=clock)
    store.push("replica-a", replica_delta(1, tokens=5))
    clock.now = 9
    assert value(store, RUNNING, engine="0") == 1
    clock.now = 11
    assert value(store, RUNNING, engine="0") is None
    assert value(store, TOKENS, engine="0") == 5


def test_a_replacement_continues_the_series_of_the_replica_that_died():
    clock = Clock()
    store = MetricsStore("tiny", silence=10, clock=clock)
    store.push("replica-a", replica_delta(1, tokens=5))
    clock.now = 11
    store.push("replica-b", replica_delta(1, tokens=7))
    assert value(store, TOKENS, engine="0") == 12
    assert value(store, TOKENS, engine="1") is None


def test_a_replica_that_speaks_again_after_its_engine_number_was_taken_gets_another():
    clock = Clock()
    store = MetricsStore("tiny", silence=10, clock=clock)
    store.push("replica-a", replica_delta(1, tokens=5))
    clock.now = 11
    store.push("replica-b", replica_delta(1, tokens=7))
    store.push("replica-a", replica_delta(2, tokens=1))
    assert value(store, TOKENS, engine="0") == 12
    assert value(store, TOKENS, engine="1") == 1
