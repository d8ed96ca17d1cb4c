"""Owns a prefill instance's own metrics; knows the registry and what the worker reports."""

from prometheus_client import CollectorRegistry, Counter, Histogram

from prefill.worker import FirstToken, Outcome, RequestFailed, Transferred
from service.metrics import HANDOFF_BUCKETS_S, QUEUE_BUCKETS_S, TTFT_BUCKETS_S


class Metrics:
    """Counts and times of one instance, fed with what its worker reports."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._queue_s = Histogram(
            "twinpool_prefill_queue_seconds",
            "Wait for room in the cache.",
            buckets=QUEUE_BUCKETS_S,
            registry=registry,
        )
        self._prefill_s = Histogram(
            "twinpool_prefill_seconds",
            "A prompt's computation, from its first chunk to its first token.",
            buckets=TTFT_BUCKETS_S,
            registry=registry,
        )
        self._handoff_s = Histogram(
            "twinpool_prefill_handoff_seconds",
            "End of computation to decode's acknowledgement of the KV.",
            buckets=HANDOFF_BUCKETS_S,
            registry=registry,
        )
        self._prompt_tokens = Counter(
            "twinpool_prefill_prompt_tokens", "Prompt tokens taken.", registry=registry
        )
        self._cached_tokens = Counter(
            "twinpool_prefill_cached_tokens",
            "Prompt tokens that were in the cache and not computed.",
            registry=registry,
        )
        self._failed = Counter(
            "twinpool_prefill_failed_requests",
            "Requests that ended early, by reason.",
            ["reason"],
            registry=registry,
        )

    def observe(self, outcome: Outcome) -> None:
        """Take note of one outcome."""
        match outcome:
            case FirstToken():
                self._queue_s.observe(outcome.queue_s)
                self._prefill_s.observe(outcome.prefill_s)
                self._prompt_tokens.inc(outcome.prompt_tokens)
                self._cached_tokens.inc(outcome.cached_tokens)
            case Transferred():
                self._handoff_s.observe(outcome.handoff_s)
            case RequestFailed():
                self._failed.labels(outcome.reason).inc()
