"""Owns the metrics of one model's requests; knows the registry and nothing of what is measured.

That there are several models, `model_metrics` knows.
"""

from collections import Counter as Tally
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from router.breaker import State
from service.histogram import LoopHistogram
from service.metrics import (
    HANDOFF_BUCKETS_S,
    QUEUE_BUCKETS_S,
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
# Why an answer that had begun goes on at other instances, and how: its KV is computed anew, or
# carried over from the decode instance that has it.
MOVES = ("lost", "drained", "failed", "preempted")
WAYS = ("prefill", "kv")
# How carrying a sequence over can end; "stayed": it went on where it was, or was lost there.
CARRIES = ("carried", "stayed")
# How the search for another prefill instance can end; "not needed": decode had all of the KV.
RESUMES = ("resumed", "not needed", "failed")
# How asking a second prefill instance can end: its first token came first, the other's did, or
# none took the prompt; "spent": enough others had been asked twice.
HEDGES = ("won", "lost", "no room", "spent")
# Classes of priority, which itself is any number: below 0, 0, above.
CLASSES = ("low", "normal", "high")
# Seconds that a wait was longer than foretold; below 0 it was shorter.
# fmt: off
_ERROR_BUCKETS_S = (
    -60.0, -30.0, -10.0, -5.0, -2.0, -1.0, -0.5, -0.1, 0.0, 0.1, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0,
    60.0,
)
# fmt: on


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


class Metrics:
    """Counts, times and levels of one model's requests, kept for the router's status as well."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.open_requests = 0
        self.retries = 0
        self.overcommitted_count = 0
        self.outgrown_count = 0
        self._outcomes = Outcomes(registry)
        self._retries = Counter(
            "twinpool_router_retries", "Requests started over.", registry=registry
        )
        self._resumes = Counter(
            "twinpool_router_resumes",
            "Requests that lost their prefill instance and kept their room at decode.",
            ["outcome"],
            registry=registry,
        )
        for outcome in RESUMES:
            self._resumes.labels(outcome)
        self._taken_over = Counter(
            "twinpool_router_taken_over_requests",
            "Answers that another router began and that went on here.",
            registry=registry,
        )
        self._moves = Counter(
            "twinpool_router_moved_requests",
            "Moves of answers that had begun to other instances.",
            ["reason", "way"],
            registry=registry,
        )
        for reason in MOVES:
            self._moves.labels(reason, "prefill")
        self._moves.labels("drained", "kv")
        self._carries = Counter(
            "twinpool_router_carries",
            "Sequences that were paused for their KV to go to another decode instance.",
            ["outcome"],
            registry=registry,
        )
        for outcome in CARRIES:
            self._carries.labels(outcome)
        self._carried_bytes = Counter(
            "twinpool_router_carried_bytes",
            "KV that went from one decode instance to another.",
            registry=registry,
        )
        self._hedges = Counter(
            "twinpool_router_hedges",
            "Prompts that were late at prefill, and what asking a second instance came to.",
            ["outcome"],
            registry=registry,
        )
        for outcome in HEDGES:
            self._hedges.labels(outcome)
        self._breakers = Counter(
            "twinpool_router_breaker_transitions",
            "Instances that were suspended for failures, given one request, used again.",
            ["to"],
            registry=registry,
        )
        for state in State:
            self._breakers.labels(state.value)
        self._overcommitted = Counter(
            "twinpool_router_overcommitted_reservations",
            "Reservations of less than a request may come to.",
            registry=registry,
        )
        self._outgrown = Counter(
            "twinpool_router_outgrown_reservations",
            "Of those, the ones whose sequence came to more than was reserved.",
            registry=registry,
        )
        self._pause_s = Histogram(
            "twinpool_router_move_pause_seconds",
            "Last token before a move to the first one after it.",
            ["way"],
            buckets=QUEUE_BUCKETS_S,
            registry=registry,
        )
        for way in WAYS:
            self._pause_s.labels(way)
        self._queue_s = Histogram(
            "twinpool_router_queue_seconds",
            "Wait for room in the pools, by class of priority.",
            ["priority"],
            buckets=QUEUE_BUCKETS_S,
            registry=registry,
        )
        for name in CLASSES:
            self._queue_s.labels(name)
        self._admissions = Counter(
            "twinpool_router_admissions",
            "Waits for room by how they ended, and why requests were refused.",
            ["outcome", "reason"],
            registry=registry,
        )
        # "left": the client or its deadline ended the wait.
        for outcome in ("admitted", "left"):
            self._admissions.labels(outcome, "")
        self._foretold_s = Histogram(
            "twinpool_router_foretold_queue_seconds",
            "Wait that was foretold for requests that were admitted.",
            buckets=QUEUE_BUCKETS_S,
            registry=registry,
        )
        self._foretold_error_s = Histogram(
            "twinpool_router_foretold_error_seconds",
            "Wait for room less the wait that was foretold, of requests that were admitted.",
            buckets=_ERROR_BUCKETS_S,
            registry=registry,
        )
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
        self._expected_cached = Counter(
            "twinpool_router_expected_cached_tokens",
            "Prompt tokens that prefill was thought to have cached when the request was placed.",
            registry=registry,
        )
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

    def retried(self) -> None:
        self.retries += 1
        self._retries.inc()

    def resumed(self, outcome: str) -> None:
        self._resumes.labels(outcome).inc()

    def taken_over(self) -> None:
        """Counts an answer that another router began and that goes on here."""
        self._taken_over.inc()

    def moved(self, reason: str, way: str = "prefill") -> None:
        self._moves.labels(reason, way).inc()

    def carried(self, outcome: str, kv_bytes: int = 0) -> None:
        self._carries.labels(outcome).inc()
        self._carried_bytes.inc(kv_bytes)

    def hedged(self, outcome: str) -> None:
        self._hedges.labels(outcome).inc()

    def breaker(self, state: State) -> None:
        self._breakers.labels(state.value).inc()

    def overcommitted(self) -> None:
        """Counts a reservation of less than its request may come to."""
        self.overcommitted_count += 1
        self._overcommitted.inc()

    def outgrown(self) -> None:
        """Counts such a reservation that turned out to be too small."""
        self.outgrown_count += 1
        self._outgrown.inc()

    def paused(self, seconds: float, way: str) -> None:
        self._pause_s.labels(way).observe(seconds)

    def waited(self, seconds: float, priority: int) -> None:
        name = CLASSES[1 + (priority > 0) - (priority < 0)]
        self._queue_s.labels(name).observe(seconds)

    def admission(self, outcome: str, reason: str = "") -> None:
        """Counts a wait for room that has ended; `reason` is one of the gate's constants."""
        self._admissions.labels(outcome, reason).inc()

    def foretold(self, predicted_s: float, waited_s: float) -> None:
        """Takes the wait of an admitted request as it was foretold, and as it was."""
        self._foretold_s.observe(predicted_s)
        self._foretold_error_s.observe(waited_s - predicted_s)

    def placed(self, cached_tokens: int) -> None:
        self._expected_cached.inc(cached_tokens)

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
