"""Where a decode instance's steps spend their time, on all of its ranks, and what they exchange.

Owns these metrics and the times of sequences' latest tokens. The parts of a rank's steps are
engine.step_watch's; the first rank has two more: "gap", between steps while there are sequences,
and "others", in which it stands still for other ranks.
"""

import bisect
import itertools
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Histogram
from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from decode.worker import Step
from engine.tally import Count
from service.metrics import TPOT_BUCKETS_S

_FILL_BUCKETS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)


@dataclass(frozen=True, kw_only=True)
class RankSteps:
    """What a rank has counted since its start: seconds by part, collectives by kind."""

    seconds: Mapping[str, float]
    collectives: Mapping[str, Count]


class StepMetrics(Collector):
    """Fed with each step by the step loop; the rest is asked for at each scrape.

    Args:
        ranks: Gives each rank's counts.
        most_rows: Sequences of a step at most.
    """

    def __init__(
        self,
        registry: CollectorRegistry,
        *,
        ranks: Callable[[], Mapping[int, RankSteps]],
        most_rows: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._ranks = ranks
        self._most_rows = most_rows
        self._latencies = Latencies(clock)
        self._gap_s = self._wait_s = 0.0
        self._fill = Histogram(
            "twinpool_decode_batch_fill",
            "Sequences of a step, as a part of those that it may have.",
            buckets=_FILL_BUCKETS,
            registry=registry,
        )
        registry.register(self)

    def observe(self, step: Step) -> None:
        """Take note of one step; the step loop's thread."""
        self._gap_s += step.gap_s
        self._wait_s += step.wait_s
        if step.tokens:  # else it had pieces of prompts alone
            self._fill.observe(sum(map(len, step.tokens.values())) / self._most_rows)
        self._latencies.observe(step)

    def ended(self, request_id: int) -> None:
        """A sequence is over; from any thread."""
        self._latencies.ended(request_id)

    def collect(self) -> Iterable[Metric]:
        """The families of this instance."""
        parts = CounterMetricFamily(
            "twinpool_decode_step_part_seconds",
            "Seconds of steps by part.",
            labels=["rank", "part"],
        )
        calls = CounterMetricFamily(
            "twinpool_decode_collective_calls", "Collectives of steps.", labels=["rank", "kind"]
        )
        sent = CounterMetricFamily(
            "twinpool_decode_collective_bytes",
            "Bytes handed over to other ranks in collectives of steps.",
            labels=["rank", "kind"],
        )
        for rank, steps in self._ranks().items():
            own = {"gap": self._gap_s, "others": self._wait_s} if rank == 0 else {}
            for part, seconds in {**steps.seconds, **own}.items():
                parts.add_metric([str(rank), part], seconds)
            for kind, count in steps.collectives.items():
                calls.add_metric([str(rank), kind], count.calls)
                sent.add_metric([str(rank), kind], count.bytes)
        yield from (parts, calls, sent, self._latencies.family())


class Latencies:
    """Times between tokens of a sequence, of which decode has made both.

    All sequences of a step mostly have the same one: they are counted together, as a client of
    prometheus could not.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._latest_s: dict[int, float] = {}
        # Ends are heard of before the last token is seen: they are heeded after it.
        self._ended: deque[int] = deque()
        self._counts = [0] * (len(TPOT_BUCKETS_S) + 1)
        self._sum_s = 0.0

    def observe(self, step: Step) -> None:
        """Take note of one step's tokens; the step loop's thread."""
        now = self._clock()
        before: Counter[float] = Counter()
        for of_router in step.tokens.values():
            for token in of_router:
                latest_s = self._latest_s.get(token.request_id)
                if latest_s is not None:
                    before[latest_s] += 1
                if token.finish is None:
                    self._latest_s[token.request_id] = now
        for latest_s, tokens in before.items():
            self._counts[bisect.bisect_left(TPOT_BUCKETS_S, now - latest_s)] += tokens
            self._sum_s += tokens * (now - latest_s)
        while self._ended:
            self._latest_s.pop(self._ended.popleft(), None)

    def ended(self, request_id: int) -> None:
        """A sequence is over; from any thread."""
        if request_id in self._latest_s:
            self._ended.append(request_id)

    @property
    def held(self) -> int:
        """Sequences that are remembered."""
        return len(self._latest_s)

    def family(self) -> Metric:
        """The histogram of all times so far."""
        bounds = (*map(str, TPOT_BUCKETS_S), "+Inf")
        buckets = list(zip(bounds, itertools.accumulate(map(float, self._counts)), strict=True))
        return HistogramMetricFamily(
            "twinpool_decode_inter_token_seconds",
            "From one token of a sequence to the next, at the step loop.",
            buckets=buckets,
            sum_value=self._sum_s,
        )
