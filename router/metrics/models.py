"""Owns how the metrics of several models stand in one registry: each with the model's name.

What is measured is for `metrics` to say. Each model has a registry of its own, to go with it.
"""

from collections.abc import Iterable

from prometheus_client import CollectorRegistry
from prometheus_client.core import Metric
from prometheus_client.registry import Collector

# As vLLM has it.
LABEL = "model_name"
# Of requests that came to no model; Prometheus takes an empty label for none.
NO_MODEL = ""


class ModelMetrics(Collector):
    """Shows the registries of all models as one, each sample with the label `model_name`."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._registries: dict[str, CollectorRegistry] = {}
        registry.register(self)

    def add(self, model: str, registry: CollectorRegistry) -> None:
        self._registries[model] = registry

    def remove(self, model: str) -> None:
        del self._registries[model]

    def collect(self) -> Iterable[Metric]:
        """Gives each metric once, with the samples of all models."""
        families: dict[str, Metric] = {}
        # Scrapes come in threads of their own, and models come and go meanwhile.
        for model, registry in list(self._registries.items()):
            for family in registry.collect():
                samples = [s._replace(labels={LABEL: model, **s.labels}) for s in family.samples]
                family.samples = families[family.name].samples if family.name in families else []
                family.samples += samples
                families[family.name] = family
        return families.values()
