"""Owns what is counted of requests that outlived an instance, and of instances that failed."""

from prometheus_client import CollectorRegistry, Counter, Histogram

from router.breaker import State
from service.metrics import QUEUE_BUCKETS_S

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


class SurvivalMetrics:
    """Retries, moves to other instances, second instances asked, and breakers."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.retries = 0
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
        self._pause_s = Histogram(
            "twinpool_router_move_pause_seconds",
            "Last token before a move to the first one after it.",
            ["way"],
            buckets=QUEUE_BUCKETS_S,
            registry=registry,
        )
        for way in WAYS:
            self._pause_s.labels(way)

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

    def paused(self, seconds: float, way: str) -> None:
        self._pause_s.labels(way).observe(seconds)
