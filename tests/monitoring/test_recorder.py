"""Counting in one process between two pushes."""

import pickle

import pytest

from engine.stats import EngineStats
from monitoring.catalogue import CATALOGUE
from monitoring.recorder import EngineMeter, Recorder

TTFT = "manta:time_to_first_token_seconds"
SUCCESS = "manta:request_success_total"


def stats(**changes: int) -> EngineStats:
    fields = {"num_running": 0, "num_waiting": 0, "num_pages": 10, "num_free_pages": 10, "num_outstanding_tokens": 0}
    totals = {"preemptions_total": 0, "prompt_tokens_total": 0, "generation_tokens_total": 0, "steps_total": 0}
    return EngineStats(**{**fields, **totals, **changes})


def test_drain_returns_what_happened_since_the_last_drain():
    recorder = Recorder()
    recorder.increment(SUCCESS, labels=("stop",))
    recorder.increment(SUCCESS, 2, labels=("stop",))
    first = recorder.drain()
    recorder.increment(SUCCESS, labels=("length",))
    second = recorder.drain()
    assert first.counters == {(SUCCESS, ("stop",)): 3}
    assert second.counters == {(SUCCESS, ("length",)): 1}
    assert (first.number, second.number) == (1, 2)
    assert recorder.drain().empty


def test_an_observation_on_a_bound_belongs_to_the_bucket_of_that_bound():
    recorder = Recorder()
    for seconds in (0.001, 0.0011, 1e9):
        recorder.observe(TTFT, seconds)
    histogram = recorder.drain().histograms[TTFT, ()]
    assert histogram.counts[0] == 1
    assert histogram.counts[1] == 1
    assert histogram.counts[-1] == 1
    assert histogram.total == pytest.approx(0.0021 + 1e9)


def test_repeated_observations_count_and_sum_each_time():
    recorder = Recorder()
    recorder.observe(TTFT, 0.5, times=4)
    histogram = recorder.drain().histograms[TTFT, ()]
    assert (sum(histogram.counts), histogram.total) == (4, 2.0)


def test_a_metric_that_is_not_in_the_catalogue_is_an_error():
    with pytest.raises(KeyError):
        Recorder().increment("manta:no_such_total")


def test_gauges_are_repeated_in_every_delta_and_do_not_make_it_worth_sending():
    recorder = Recorder()
    recorder.set("manta:num_requests_running", 3)
    recorder.drain()
    again = recorder.drain()
    assert again.gauges == {("manta:num_requests_running", ()): 3}
    assert again.empty


def test_a_delta_survives_pickling():
    recorder = Recorder()
    recorder.observe(TTFT, 0.5)
    delta = recorder.drain()
    assert pickle.loads(pickle.dumps(delta)) == delta


def test_the_engine_meter_counts_growth_once():
    recorder = Recorder()
    meter = EngineMeter(recorder)
    meter.update(stats(num_running=2, num_free_pages=5, prompt_tokens_total=7, generation_tokens_total=3))
    meter.update(stats(num_running=1, num_free_pages=8, prompt_tokens_total=7, generation_tokens_total=5))
    delta = recorder.drain()
    assert delta.counters == {("manta:prompt_tokens_total", ()): 7, ("manta:generation_tokens_total", ()): 5}
    assert delta.gauges["manta:num_requests_running", ()] == 1
    assert delta.gauges["manta:kv_cache_usage_perc", ()] == pytest.approx(0.2)


def test_buckets_ascend_and_only_histograms_have_them():
    for metric in CATALOGUE.values():
        assert list(metric.buckets) == sorted(set(metric.buckets)), metric.name
        assert bool(metric.buckets) == (metric.kind.value == "histogram"), metric.name


def test_the_engine_meter_observes_each_iteration_once():
    recorder = Recorder()
    meter = EngineMeter(recorder)
    for steps, tokens in ((1, 100), (2, 3), (2, 3), (3, 3)):  # a delivery without an iteration repeats the numbers
        meter.update(stats(steps_total=steps, last_step_tokens=tokens))
    histogram = recorder.drain().histograms["manta:iteration_tokens_total", ()]
    assert (sum(histogram.counts), histogram.total) == (3, 106)
