"""Owns the metrics of one model's requests; knows the registry and nothing of what is measured.

That there are several models, `models` knows.
"""

from collections.abc import Callable, Mapping

from prometheus_client import CollectorRegistry, Gauge

from router.metrics.admission import AdmissionMetrics
from router.metrics.requests import RequestMetrics
from router.metrics.survival import SurvivalMetrics


class Metrics:
    """Counts, times and levels, kept for the router's status as well."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.admission = AdmissionMetrics(registry)
        self.survival = SurvivalMetrics(registry)
        self.requests = RequestMetrics(registry)
        self._registry = registry

    def watch(
        self, name: str, what: str, read: Callable[[], float], *, prefix: str = "twinpool_router"
    ) -> None:
        """Shows a level that is read when it is asked for."""
        Gauge(f"{prefix}_{name}", what, registry=self._registry).set_function(read)

    def watch_states(self, name: str, what: str, states: Mapping[str, Callable[[], float]]) -> None:
        """Shows levels that are read when they are asked for, one for each state."""
        gauge = Gauge(f"twinpool_router_{name}", what, ["state"], registry=self._registry)
        for state, read in states.items():
            gauge.labels(state).set_function(read)
