"""The metrics hub, as Serve runs it: the one process that outlives the replicas whose counters it keeps.

A thin shell: what is merged and how it is rendered is `monitoring.store`'s.
"""

from monitoring.recorder import Delta
from monitoring.store import MetricsStore


class MetricsHub:
    """Takes deltas from every gateway and replica and renders the exposition."""

    def __init__(self, model_name: str) -> None:
        self._store = MetricsStore(model_name)

    async def push(self, source: str, delta: Delta) -> None:
        """Adds what `source`, a name that no other process ever has, measured since its previous push."""
        self._store.push(source, delta)

    async def render(self) -> bytes:
        """All metrics of the application in Prometheus' text format."""
        return self._store.render()
