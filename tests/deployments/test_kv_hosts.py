"""What the keeper of KV hosts makes of their snapshots."""

from dataclasses import replace

from cluster.kv.stats import HostStats
from deployments.kv_hosts import MOST_MISSED, MOST_MISSED_AT_START, HostMeter, Silences
from monitoring.recorder import Recorder
from monitoring.store import MetricsStore

NONE = HostStats(*[0] * 12)
EVICTIONS = "manta:kv_host_evictions_total"
PAGES = "manta:kv_host_memory_pages"


def test_counters_grow_by_what_happened_since_the_last_look_and_survive_restarts() -> None:
    recorder = Recorder()
    meter = HostMeter(recorder)
    meter.update("a", replace(NONE, evictions_total=100))
    assert not recorder.drain().counters, "what happened before this keeper was counted by the one before"
    meter.update("a", replace(NONE, evictions_total=107))
    assert recorder.drain().counters == {(EVICTIONS, ("a",)): 7}
    meter.update("a", replace(NONE, evictions_total=2))
    assert recorder.drain().counters == {(EVICTIONS, ("a",)): 2}, "the host was started again"


def test_nodes_are_told_apart_and_gone_ones_show_nothing() -> None:
    recorder, store = Recorder(), MetricsStore("tiny")
    meter = HostMeter(recorder)
    for node, pages in (("a", 3), ("b", 5)):
        meter.update(node, replace(NONE, memory_pages=pages))
    store.push("keeper", recorder.drain())
    exposition = store.render().decode()
    assert f'{PAGES}{{model_name="tiny",node="a"}} 3.0' in exposition
    assert f'{PAGES}{{model_name="tiny",node="b"}} 5.0' in exposition
    meter.forget("a")
    store.push("keeper", recorder.drain())
    exposition = store.render().decode()
    assert 'node="a"' not in exposition and 'node="b"' in exposition


def misses_until_given_up(silences: Silences, node: str) -> int:
    return next(count for count in range(1, 100) if silences.timed_out(node))


def test_a_host_that_hangs_is_given_up_and_one_that_starts_has_more_time() -> None:
    silences = Silences()
    assert misses_until_given_up(silences, "a") == MOST_MISSED_AT_START
    silences.answered("a")
    silences.answered("b")
    assert misses_until_given_up(silences, "a") == MOST_MISSED
    assert misses_until_given_up(silences, "a") == MOST_MISSED_AT_START, "it is being started again"
    assert misses_until_given_up(silences, "b") == MOST_MISSED, "hosts are told apart"


def test_a_host_that_was_late_or_was_started_again_has_all_the_time_again() -> None:
    silences = Silences()
    for again, most in ((silences.answered, MOST_MISSED), (silences.gone, MOST_MISSED_AT_START)):
        silences.answered("a")
        assert not any(silences.timed_out("a") for _ in range(MOST_MISSED - 1))
        again("a")
        assert misses_until_given_up(silences, "a") == most


def test_silence_is_news_once_until_it_is_over() -> None:
    silences = Silences()
    assert [silences.is_news("a") for _ in range(3)] == [True, False, False]
    assert silences.is_news("b")
    silences.answered("a")
    assert silences.is_news("a")
