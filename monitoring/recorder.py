"""Counts and observations of one process between two pushes, in plain dictionaries.

Knows neither Prometheus nor how a delta travels. Not thread-safe: one thread records and drains.
"""

from bisect import bisect_left
from dataclasses import dataclass, field

from engine.stats import EngineStats
from monitoring.catalogue import CATALOGUE, Kind

Key = tuple[str, tuple[str, ...]]
"""A metric's name and the values of its own labels."""


@dataclass(slots=True)
class Histogram:
    """Observations by bucket, the last bucket being +Inf, and their exact sum. Counts are not cumulative."""

    counts: list[int]
    total: float = 0.0

    def add(self, other: "Histogram") -> None:
        self.counts = [mine + theirs for mine, theirs in zip(self.counts, other.counts, strict=True)]
        self.total += other.total


@dataclass(frozen=True, slots=True)
class Delta:
    """What happened in one process since its previous delta. Picklable.

    Deltas of one recorder are numbered from 1, so that a store counts one that is sent twice only once.
    """

    number: int
    counters: dict[Key, float] = field(default_factory=dict)
    histograms: dict[Key, Histogram] = field(default_factory=dict)
    gauges: dict[Key, float] = field(default_factory=dict)
    """Latest values; unlike the others these are repeated in every delta."""

    @property
    def empty(self) -> bool:
        """Whether nothing was counted; gauges may still need refreshing."""
        return not self.counters and not self.histograms


class Recorder:
    """Accumulates what one process measures until it is drained."""

    def __init__(self) -> None:
        self._drained = 0
        self._counters: dict[Key, float] = {}
        self._histograms: dict[Key, Histogram] = {}
        self._gauges: dict[Key, float] = {}

    def increment(self, name: str, by: float = 1, labels: tuple[str, ...] = ()) -> None:
        """Adds to a counter. Raises KeyError for a name that is not in the catalogue."""
        assert CATALOGUE[name].kind is Kind.COUNTER and by >= 0, name
        key = (name, labels)
        self._counters[key] = self._counters.get(key, 0) + by

    def observe(self, name: str, value: float, times: int = 1) -> None:
        """Adds `times` observations of `value` to a histogram. Raises KeyError for a name not in the catalogue."""
        metric = CATALOGUE[name]
        assert metric.kind is Kind.HISTOGRAM, name
        key = (name, ())
        histogram = self._histograms.get(key)
        if histogram is None:
            histogram = self._histograms[key] = Histogram([0] * (len(metric.buckets) + 1))
        # A bucket's bound belongs to the bucket (Prometheus: le), hence the left bisection.
        histogram.counts[bisect_left(metric.buckets, value)] += times
        histogram.total += value * times

    def set(self, name: str, value: float, labels: tuple[str, ...] = ()) -> None:
        """Sets a gauge. Raises KeyError for a name that is not in the catalogue."""
        assert CATALOGUE[name].kind is Kind.GAUGE, name
        self._gauges[name, labels] = value

    def unset(self, name: str, labels: tuple[str, ...] = ()) -> None:
        """What the gauge showed is gone."""
        self._gauges.pop((name, labels), None)

    def drain(self) -> Delta:
        """Everything since the previous drain. A delta that could not be delivered is sent again, not drained again."""
        self._drained += 1
        delta = Delta(self._drained, self._counters, self._histograms, dict(self._gauges))
        self._counters, self._histograms = {}, {}
        return delta


_TOTALS = {
    "manta:num_preemptions_total": "preemptions_total",
    "manta:prompt_tokens_total": "prompt_tokens_total",
    "manta:prefix_cache_queries_total": "prefix_queries_total",
    "manta:prefix_cache_hits_total": "prefix_hits_total",
    "manta:generation_tokens_total": "generation_tokens_total",
    "manta:kv_tier_pages_saved_total": "tier_pages_saved_total",
    "manta:kv_tier_pages_refused_total": "tier_pages_refused_total",
    "manta:kv_tier_pages_loaded_total": "tier_pages_loaded_total",
    "manta:kv_tier_pages_corrupt_total": "tier_pages_corrupt_total",
    "manta:kv_tier_failures_total": "tier_failures_total",
    "manta:kv_tier_load_seconds_total": "tier_load_seconds_total",
    "manta:kv_tier_load_predicted_seconds_total": "tier_load_predicted_seconds_total",
    "manta:kv_tier_saved_seconds_total": "tier_saved_seconds_total",
    "manta:kv_tier_regretted_seconds_total": "tier_regretted_seconds_total",
}
"""Counters that grow with a field of `EngineStats`."""


class EngineMeter:
    """Turns the snapshots of one engine into gauges and increments."""

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder
        self._last = EngineStats(0, 0, 1, 1, 0, 0, 0, 0, 0)

    def update(self, stats: EngineStats) -> None:
        """Records what changed since the previous snapshot; called after every iteration, so that none is missed."""
        last, record = self._last, self._recorder
        if stats.steps_total != last.steps_total:
            record.observe("manta:iteration_tokens_total", stats.last_step_tokens)
        record.set("manta:num_requests_running", stats.num_running)
        record.set("manta:num_requests_waiting", stats.num_waiting)
        record.set("manta:kv_cache_usage_perc", stats.kv_usage)
        for name, total in _TOTALS.items():
            if grown := getattr(stats, total) - getattr(last, total):
                record.increment(name, grown)
        self._last = stats
