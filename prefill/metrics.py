"""Owns a prefill instance's own metrics; knows the registry and what the worker reports."""

from collections.abc import Callable, Iterable, Mapping

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, Metric
from prometheus_client.registry import Collector

from engine.ring.comm import Traffic
from prefill.records import FirstToken, Outcome, RequestFailed, StepReport, Transferred
from service.metrics import HANDOFF_BUCKETS_S, QUEUE_BUCKETS_S, TTFT_BUCKETS_S

_FILL_BUCKETS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
_PROMPT_BUCKETS = (1, 2, 4, 8, 16, 32, 64)


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
        self._computed_tokens = Counter(
            "twinpool_prefill_computed_tokens", "Prompt tokens computed.", registry=registry
        )
        self._step_s = Histogram(
            "twinpool_prefill_step_seconds",
            "One step: scheduling, the forward pass on all ranks, sampling.",
            buckets=TTFT_BUCKETS_S,
            registry=registry,
        )
        self._phase_s = Counter(
            "twinpool_prefill_step_phase_seconds",
            "Seconds of steps by phase: schedule, compute, finish.",
            ["phase"],
            registry=registry,
        )
        self._fill = Histogram(
            "twinpool_prefill_batch_fill",
            "Tokens of a step, as a part of those that it may have.",
            buckets=_FILL_BUCKETS,
            registry=registry,
        )
        self._prompts = Histogram(
            "twinpool_prefill_batch_prompts",
            "Prompts that a step works on.",
            buckets=_PROMPT_BUCKETS,
            registry=registry,
        )

    def observe_step(self, step: StepReport) -> None:
        """Take note of one step; from any thread."""
        phases = {
            "schedule": step.schedule_s,
            "compute": step.compute_s,
            "finish": step.finish_s,
        }
        for phase, seconds in phases.items():
            self._phase_s.labels(phase).inc(seconds)
        self._step_s.observe(sum(phases.values()))
        self._computed_tokens.inc(step.tokens)
        self._fill.observe(step.tokens / step.max_tokens)
        self._prompts.observe(step.prompts)

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


class LinkMetrics(Collector):
    """What the ranks of an instance exchange in steps, read at each scrape.

    That is "ring", for attention between those of cp, and "stage", between those of pp.
    """

    def __init__(
        self,
        registry: CollectorRegistry,
        links: Callable[[], Mapping[int, Mapping[str, Traffic]]],
    ) -> None:
        """`links` gives each rank's traffic, by the sort of link."""
        self._links = links
        registry.register(self)

    def collect(self) -> Iterable[Metric]:
        """The families of this instance."""
        links = self._links()
        for name in ("ring", "stage"):
            sent = CounterMetricFamily(
                f"twinpool_prefill_{name}_bytes", "Bytes sent to other ranks.", labels=["rank"]
            )
            wait = CounterMetricFamily(
                f"twinpool_prefill_{name}_wait_seconds",
                "Seconds of steps in which a rank stood still for another one.",
                labels=["rank"],
            )
            for rank, of_rank in links.items():
                if name in of_rank:
                    sent.add_metric([str(rank)], of_rank[name].bytes_sent)
                    wait.add_metric([str(rank)], of_rank[name].wait_s)
            yield sent
            yield wait
