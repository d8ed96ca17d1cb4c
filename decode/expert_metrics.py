"""How evenly an instance's tokens go to its ranks' experts, and what moving these has changed."""

from collections.abc import Callable, Iterable

from prometheus_client import CollectorRegistry, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from decode.balancer import Figures

# Beyond as many, experts have no series of their own: a scrape would be mostly theirs.
_MOST_SERIES = 1024
# fmt: off
_PAUSE_BUCKETS_S = (
    0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0,
)
# fmt: on


class ExpertMetrics(Collector):
    """What `figures` says at each scrape, and the pauses that `switched` is told of."""

    def __init__(self, registry: CollectorRegistry, figures: Callable[[], Figures]) -> None:
        self._figures = figures
        self._pause_s = Histogram(
            "twinpool_decode_rebalance_pause_seconds",
            "What a change of places of some experts adds to a step, on the first rank.",
            buckets=_PAUSE_BUCKETS_S,
            registry=registry,
        )
        registry.register(self)

    def switched(self, seconds: float) -> None:
        """Take note of experts that changed places, in so many seconds between two steps."""
        self._pause_s.observe(seconds)

    def collect(self) -> Iterable[Metric]:
        """The families of this instance."""
        figures = self._figures()
        yield CounterMetricFamily(
            "twinpool_decode_rebalances", "Rounds in which experts changed places.", figures.rounds
        )
        yield CounterMetricFamily(
            "twinpool_decode_rebalance_switches",
            "Changes of places, each of some experts of one layer between two steps.",
            figures.switches,
        )
        gauge = GaugeMetricFamily(
            "twinpool_decode_rebalance_imbalance",
            "The hottest rank's tokens to the mean over the layers that were placed anew last:"
            " before, and as the same tokens would have been after.",
            labels=["when"],
        )
        gauge.add_metric(["before"], figures.before)
        gauge.add_metric(["after"], figures.after)
        yield gauge
        layers = GaugeMetricFamily(
            "twinpool_decode_expert_imbalance",
            "The hottest rank's tokens to the mean, in the last round.",
            labels=["layer"],
        )
        for layer, ratio in figures.imbalance.items():
            layers.add_metric([str(layer)], ratio)
        yield layers
        if sum(map(len, figures.tokens.values())) <= _MOST_SERIES:
            yield self._tokens(figures)

    def _tokens(self, figures: Figures) -> Metric:
        family = CounterMetricFamily(
            "twinpool_decode_expert_tokens",
            "Tokens that chose an expert.",
            labels=["layer", "expert"],
        )
        for layer, tokens_E in figures.tokens.items():
            for expert, tokens in enumerate(tokens_E):
                family.add_metric([str(layer), str(expert)], tokens)
        return family
