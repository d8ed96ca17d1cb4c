"""A histogram for what happens thousands of times a second in one thread.

Owns counts without a lock or labels: one thread observes, any other reads when somebody scrapes,
and may then miss what is being added.
"""

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from math import isinf

from prometheus_client import CollectorRegistry
from prometheus_client.core import HistogramMetricFamily, Metric
from prometheus_client.registry import Collector


class LoopHistogram(Collector):
    """Counts values by `buckets`, their upper bounds in order; shown as any histogram."""

    def __init__(
        self, name: str, what: str, *, buckets: Sequence[float], registry: CollectorRegistry
    ) -> None:
        self._name = name
        self._what = what
        self._bounds = [*buckets, float("inf")]
        self._counts = [0] * len(self._bounds)
        self._sum = 0.0
        registry.register(self)

    def observe(self, value: float, times: int = 1) -> None:
        """Takes a value, so many times."""
        self._counts[bisect_left(self._bounds, value)] += times
        self._sum += value * times

    def collect(self) -> Iterable[Metric]:
        """Gives the counts of now."""
        total, buckets = 0, []
        for bound, count in zip(self._bounds, self._counts, strict=True):
            total += count
            buckets.append(("+Inf" if isinf(bound) else str(bound), float(total)))
        family = HistogramMetricFamily(self._name, self._what)
        family.add_metric([], buckets, self._sum)
        yield family
