"""Owns a decode instance's own metrics; knows the registry and what the worker reports."""

from prometheus_client import CollectorRegistry, Counter, Histogram

from decode.worker import Step
from service.metrics import TPOT_BUCKETS_S

_BATCH_BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class Metrics:
    """Counts and times of one instance, fed with each step."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._step_s = Histogram(
            "twinpool_decode_step_seconds",
            "One step of the whole batch, sampling included.",
            buckets=TPOT_BUCKETS_S,
            registry=registry,
        )
        self._batch = Histogram(
            "twinpool_decode_batch_sequences",
            "Sequences in a step.",
            buckets=_BATCH_BUCKETS,
            registry=registry,
        )
        self._tokens = Counter(
            "twinpool_decode_generated_tokens", "Tokens generated.", registry=registry
        )
        self._resumed = Counter(
            "twinpool_decode_resumed_transfers",
            "Requests whose KV another prefill instance was let finish.",
            registry=registry,
        )

    def resumed(self) -> None:
        """Take note of a request that another prefill instance goes on with."""
        self._resumed.inc()

    def observe(self, step: Step) -> None:
        """Take note of one step."""
        tokens = sum(map(len, step.tokens.values()))
        self._step_s.observe(step.seconds)
        self._batch.observe(tokens)
        self._tokens.inc(tokens)
