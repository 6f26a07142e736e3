"""The application's metrics, gathered from many processes and rendered for Prometheus.

Owns a registry of its own, so nothing else of the process leaks into the exposition, and exact values: bucket counts
and sums are added up as they were observed. Does not know how deltas arrive.
"""

import itertools
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from monitoring import catalogue
from monitoring.catalogue import CATALOGUE, Kind, Owner
from monitoring.recorder import Delta, Histogram

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


@dataclass(slots=True)
class _Source:
    """One process that pushes, living or not."""

    heard: float
    last_number: int = 0
    slot: int | None = None
    """The engine number of a replica, given with its first replica metric; None for a gateway."""
    gauges: dict[tuple[str, tuple[str, ...]], float] = field(default_factory=dict)


class MetricsStore(Collector):
    """Merges deltas. Counters of a process outlive it; its gauges are dropped when it falls silent.

    A replica is labelled `engine="<slot>"`. The slot of a replica that fell silent is given to the next newcomer,
    whose counters continue the same series: series stay few however often replicas are replaced, and never decrease.
    """

    def __init__(self, model_name: str, *, silence: float = 15.0, clock: Callable[[], float] = time.monotonic) -> None:
        """`silence`: seconds without a push after which a process counts as gone."""
        self._model_name = model_name
        self._silence = silence
        self._clock = clock
        self._sources: dict[str, _Source] = {}
        self._counters: dict[tuple[str, tuple[str, ...]], float] = {}
        self._histograms: dict[tuple[str, tuple[str, ...]], Histogram] = {}
        self._registry = CollectorRegistry(auto_describe=False)
        self._start_series(Owner.GATEWAY, None)
        self._start_series(Owner.REPLICA, 0)
        self._registry.register(self)

    def push(self, source: str, delta: Delta) -> None:
        """Adds what one process counted. `source` names the process, for ever: a restarted one has another name."""
        now = self._clock()
        known = self._sources.setdefault(source, _Source(heard=now))
        if known.slot is None and _from_replica(delta):
            known.slot = self._free_slot(now)
            self._start_series(Owner.REPLICA, known.slot)
        known.heard = now
        known.gauges = delta.gauges
        if delta.number <= known.last_number:
            return
        known.last_number = delta.number
        for (name, labels), value in delta.counters.items():
            key = (name, self._label_values(name, known.slot, labels))
            self._counters[key] = self._counters.get(key, 0.0) + value
        for (name, labels), histogram in delta.histograms.items():
            self._histogram(name, self._label_values(name, known.slot, labels)).add(histogram)

    def render(self) -> bytes:
        """The exposition in Prometheus' text format; serve it as `CONTENT_TYPE`."""
        return generate_latest(self._registry)

    def collect(self) -> Iterable[Metric]:
        """The collector's side of `render`, called by the registry."""
        gauges = self._living_gauges()
        for metric in CATALOGUE.values():
            yield self._family(metric, gauges)

    def _family(self, metric: catalogue.Metric, gauges: dict[tuple[str, tuple[str, ...]], float]) -> Metric:
        labels = [*_owner_labels(metric.owner), *metric.labels]
        if metric.kind is Kind.HISTOGRAM:
            family = HistogramMetricFamily(metric.name, metric.help, labels=labels)
            for (name, values), histogram in self._histograms.items():
                if name == metric.name:
                    family.add_metric(values, _cumulative(metric.buckets, histogram.counts), sum_value=histogram.total)
            return family
        kind = CounterMetricFamily if metric.kind is Kind.COUNTER else GaugeMetricFamily
        simple = kind(metric.name, metric.help, labels=labels)
        for (name, values), value in (self._counters if metric.kind is Kind.COUNTER else gauges).items():
            if name == metric.name:
                simple.add_metric(values, value)
        return simple

    def _living_gauges(self) -> dict[tuple[str, tuple[str, ...]], float]:
        horizon = self._clock() - self._silence
        return {
            (name, self._label_values(name, source.slot, labels)): value
            for source in self._sources.values()
            if source.heard >= horizon
            for (name, labels), value in source.gauges.items()
        }

    def _free_slot(self, now: float) -> int:
        """The lowest engine number that no living replica has. Forgets the processes that fell silent."""
        for name, source in list(self._sources.items()):
            if now - source.heard > self._silence:
                del self._sources[name]
        taken = {source.slot for source in self._sources.values()}
        return next(slot for slot in itertools.count() if slot not in taken)

    def _start_series(self, owner: Owner, slot: int | None) -> None:
        """Exports every series of an owner from 0, so that the first increment is visible to rate()."""
        for metric in CATALOGUE.values():
            if metric.owner is not owner:
                continue
            for labels in metric.series_at_start:
                values = self._label_values(metric.name, slot, labels)
                if metric.kind is Kind.COUNTER:
                    self._counters.setdefault((metric.name, values), 0.0)
                elif metric.kind is Kind.HISTOGRAM:
                    self._histogram(metric.name, values)

    def _histogram(self, name: str, values: tuple[str, ...]) -> Histogram:
        histogram = self._histograms.get((name, values))
        if histogram is None:
            empty = Histogram([0] * (len(CATALOGUE[name].buckets) + 1))
            histogram = self._histograms[name, values] = empty
        return histogram

    def _label_values(self, name: str, slot: int | None, labels: tuple[str, ...]) -> tuple[str, ...]:
        if CATALOGUE[name].owner is Owner.REPLICA:
            return (self._model_name, str(slot), *labels)
        return (self._model_name, *labels)


def _from_replica(delta: Delta) -> bool:
    names = itertools.chain(delta.counters, delta.histograms, delta.gauges)
    return any(CATALOGUE[name].owner is Owner.REPLICA for name, _ in names)


def _owner_labels(owner: Owner) -> tuple[str, ...]:
    return ("model_name", "engine") if owner is Owner.REPLICA else ("model_name",)


def _cumulative(bounds: tuple[float, ...], counts: list[int]) -> list[tuple[str, float]]:
    names: Iterator[str] = itertools.chain(map(floatToGoString, bounds), ("+Inf",))
    return list(zip(names, map(float, itertools.accumulate(counts)), strict=True))
