"""Owns what is counted of waits for room, and of the room that requests were given."""

from prometheus_client import CollectorRegistry, Counter, Histogram

from service.metrics import QUEUE_BUCKETS_S

# Classes of priority, which itself is any number: below 0, 0, above.
CLASSES = ("low", "normal", "high")
# Seconds that a wait was longer than foretold; below 0 it was shorter.
# fmt: off
_ERROR_BUCKETS_S = (
    -60.0, -30.0, -10.0, -5.0, -2.0, -1.0, -0.5, -0.1, 0.0, 0.1, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0,
    60.0,
)
# fmt: on


class AdmissionMetrics:
    """How long requests waited, what became of it, and where too little room was booked."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.overcommitted_count = 0
        self.outgrown_count = 0
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
        self._expected_cached = Counter(
            "twinpool_router_expected_cached_tokens",
            "Prompt tokens that prefill was thought to have cached when the request was placed.",
            registry=registry,
        )

    def waited(self, seconds: float, priority: int) -> None:
        name = CLASSES[1 + (priority > 0) - (priority < 0)]
        self._queue_s.labels(name).observe(seconds)

    def ended(self, outcome: str, reason: str = "") -> None:
        """Counts a wait for room that has ended; `reason` is one of the gate's constants."""
        self._admissions.labels(outcome, reason).inc()

    def foretold(self, predicted_s: float, waited_s: float) -> None:
        """Takes the wait of an admitted request as it was foretold, and as it was."""
        self._foretold_s.observe(predicted_s)
        self._foretold_error_s.observe(waited_s - predicted_s)

    def placed(self, cached_tokens: int) -> None:
        self._expected_cached.inc(cached_tokens)

    def overcommitted(self) -> None:
        """Counts a reservation of less than its request may come to."""
        self.overcommitted_count += 1
        self._overcommitted.inc()

    def outgrown(self) -> None:
        """Counts such a reservation that turned out to be too small."""
        self.outgrown_count += 1
        self._outgrown.inc()
