"""Owns what is counted and timed of requests from their arrival to their end."""

from collections import Counter as Tally
from dataclasses import dataclass, fields

from prometheus_client import CollectorRegistry, Counter, Histogram

from service.histogram import LoopHistogram
from service.metrics import (
    HANDOFF_BUCKETS_S,
    REQUEST_BUCKETS_S,
    TPOT_BUCKETS_S,
    TTFT_BUCKETS_S,
)

# Tokens of a prompt or an answer.
_TOKEN_BUCKETS = tuple(m * 10**e for e in range(6) for m in (1, 2, 5))
# How requests end that began, in vLLM's words.
FINISHED_REASONS = ("stop", "length", "abort", "error")
# How a request can end.
OUTCOMES = ("finished", "refused", "invalid", "aborted", "failed")


@dataclass(frozen=True, kw_only=True)
class Hops:
    """Where one request spent its time, in seconds; None where it did not come by."""

    queue: float
    reserve: float | None
    prefill_queue: float
    prefill: float
    handoff: float | None
    decode_first_step: float | None


class Outcomes:
    """How requests ended: those of one model, or those that came to none."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.counts: Tally[str] = Tally()
        self._requests = Counter(
            "twinpool_router_requests", "Requests by outcome.", ["outcome"], registry=registry
        )
        for outcome in OUTCOMES:
            self._requests.labels(outcome)

    def ended(self, outcome: str) -> None:
        self.counts[outcome] += 1
        self._requests.labels(outcome).inc()


class RequestMetrics:
    """How requests of one model end, how many tokens they have, and how long they take."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.open_requests = 0
        self._outcomes = Outcomes(registry)
        self._ttft_s = Histogram(
            "twinpool_time_to_first_token_seconds",
            "Arrival to first token.",
            buckets=TTFT_BUCKETS_S,
            registry=registry,
        )
        self._tpot_s = Histogram(
            "twinpool_time_per_output_token_seconds",
            "Mean time per token after the first, of each finished request.",
            buckets=TPOT_BUCKETS_S,
            registry=registry,
        )
        self._e2e_s = Histogram(
            "twinpool_e2e_request_latency_seconds",
            "Arrival to last token.",
            buckets=REQUEST_BUCKETS_S,
            registry=registry,
        )
        self._handoff_s = Histogram(
            "twinpool_router_handoff_seconds",
            "End of prefill's compute to decode's acknowledgement of the KV.",
            buckets=HANDOFF_BUCKETS_S,
            registry=registry,
        )
        self._gap_s = LoopHistogram(
            "twinpool_inter_token_latency_seconds",
            "Time between two tokens of a request, as they went to its client.",
            buckets=TPOT_BUCKETS_S,
            registry=registry,
        )
        self._hop_s = Histogram(
            "twinpool_hop_seconds",
            "Where finished requests that neither moved nor began anew spent their time.",
            ["hop"],
            buckets=TTFT_BUCKETS_S,
            registry=registry,
        )
        self._hops = {hop.name: self._hop_s.labels(hop.name) for hop in fields(Hops)}
        self._prompt_tokens = Histogram(
            "twinpool_request_prompt_tokens",
            "Prompt tokens of finished requests.",
            buckets=_TOKEN_BUCKETS,
            registry=registry,
        )
        self._generation_tokens = Histogram(
            "twinpool_request_generation_tokens",
            "Generated tokens of finished requests.",
            buckets=_TOKEN_BUCKETS,
            registry=registry,
        )
        self._success = Counter(
            "twinpool_request_success",
            "Requests that began and ended, by how they ended.",
            ["finished_reason"],
            registry=registry,
        )
        for reason in FINISHED_REASONS:
            self._success.labels(reason)
        self._tokens = Counter(
            "twinpool_router_tokens", "Tokens of finished requests.", ["kind"], registry=registry
        )

    @property
    def outcomes(self) -> Tally[str]:
        """How many requests have ended in which way."""
        return self._outcomes.counts

    def began(self) -> None:
        """Counts a request that has come; `ended` is to follow."""
        self.open_requests += 1

    def ended(self, outcome: str, finished_reason: str | None = None) -> None:
        """Counts a request's end; `finished_reason` where it is one of vLLM's."""
        self.open_requests -= 1
        self._outcomes.ended(outcome)
        if finished_reason is not None:
            self._success.labels(finished_reason).inc()

    def first_token(self, ttft_s: float) -> None:
        self._ttft_s.observe(ttft_s)

    def gaps(self, seconds: float, times: int) -> None:
        """Takes the time between tokens of one request, which so many of them had."""
        self._gap_s.observe(seconds, times)

    def tokens(self, prompt: int, completion: int) -> None:
        """Takes a finished request's token counts."""
        self._tokens.labels("prompt").inc(prompt)
        self._tokens.labels("completion").inc(completion)
        self._prompt_tokens.observe(prompt)
        self._generation_tokens.observe(completion)

    def finished(self, *, e2e_s: float, tpot_s: float | None, handoff_s: float | None) -> None:
        """Takes a finished request's times, in seconds; None where decode had no part in it."""
        self._e2e_s.observe(e2e_s)
        if tpot_s is not None:
            self._tpot_s.observe(tpot_s)
        if handoff_s is not None:
            self._handoff_s.observe(handoff_s)

    def hops(self, hops: Hops) -> None:
        """Takes where a request spent its time."""
        for name, shown in self._hops.items():
            if (seconds := getattr(hops, name)) is not None:
                shown.observe(seconds)
