"""Owns a decode instance's own metrics; knows the registry and what the worker reports."""

from prometheus_client import CollectorRegistry, Counter, Histogram

from decode.worker import Step
from service.metrics import TPOT_BUCKETS_S

# How sending a sequence can end; "ended": the sequence ended, or stayed after all.
SENDINGS = ("sent", "failed", "ended")
_BATCH_BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class Metrics:
    """Counts and times of one instance, fed with each step."""

    def __init__(self, registry: CollectorRegistry, *, token_bytes: int) -> None:
        """`token_bytes` is what one token's KV takes, over all layers and ranks."""
        self._token_bytes = token_bytes
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

        self._refused = Counter(
            "twinpool_decode_refused_reservations",
            "Reservations that found no room: a router thought that it had some.",
            registry=registry,
        )
        self._preempted = Counter(
            "twinpool_decode_preempted_sequences",
            "Sequences handed back because earlier ones needed their blocks.",
            registry=registry,
        )
        self._prompt_tokens = Counter(
            "twinpool_decode_prompt_tokens",
            "Prompt tokens that were computed here, not by a prefill instance.",
            registry=registry,
        )
        self._grown_blocks = Counter(
            "twinpool_decode_grown_blocks",
            "Blocks taken for sequences that had outgrown what was reserved for them.",
            registry=registry,
        )
        self._cached_tokens = Counter(
            "twinpool_decode_cached_tokens",
            "Prompt tokens not sent, nor computed here: their KV was here from earlier requests.",
            registry=registry,
        )
        self._cached_bytes = Counter(
            "twinpool_decode_cached_bytes", "The KV of these tokens.", registry=registry
        )
        self._sent = Counter(
            "twinpool_decode_sent_sequences",
            "Running sequences whose KV was to go to another decode instance.",
            ["outcome"],
            registry=registry,
        )
        for outcome in SENDINGS:
            self._sent.labels(outcome)
        self._sent_bytes = Counter(
            "twinpool_decode_sent_bytes", "The KV of those that arrived.", registry=registry
        )

    def sent(self, outcome: str, sent_bytes: int = 0) -> None:
        """Take note of how sending a sequence elsewhere has ended."""
        self._sent.labels(outcome).inc()
        self._sent_bytes.inc(sent_bytes)

    def cached(self, tokens: int) -> None:
        """Take note of a prompt and of how many of its tokens were here already."""
        self._cached_tokens.inc(tokens)
        self._cached_bytes.inc(tokens * self._token_bytes)

    def refused(self) -> None:
        """A reservation found no room."""
        self._refused.inc()

    def preempted(self) -> None:
        """Take note of a sequence that is handed back for want of blocks."""
        self._preempted.inc()

    def resumed(self) -> None:
        """Take note of a request that another prefill instance goes on with."""
        self._resumed.inc()

    def observe(self, step: Step) -> None:
        """Take note of one step."""
        tokens = sum(map(len, step.tokens.values()))
        self._step_s.observe(step.seconds)
        if tokens:  # else the step had pieces of prompts alone
            self._batch.observe(tokens)
        if step.prompt_tokens:
            self._prompt_tokens.inc(step.prompt_tokens)
            firsts = [token.first for of_router in step.tokens.values() for token in of_router]
            self.cached(sum(first.cached_tokens for first in firsts if first is not None))
        self._tokens.inc(tokens)
        self._grown_blocks.inc(step.grown_blocks)
