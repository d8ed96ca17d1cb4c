"""The figures of a run, defined as `vllm bench serve` has them. Pure.

Means, deviations (of the population) and percentiles (between neighbours) are over the requests
that were answered to their end; TPOT leaves out answers of one token. Attainment is not among
vLLM's figures: of all requests that were submitted, how many kept their limits.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from bench.goodputs.records import Outcome, Record
from bench.goodputs.slo import Slo

PERCENTILES = (50.0, 90.0, 95.0, 99.0)


@dataclass(frozen=True, kw_only=True)
class Times:
    """How a time is spread over requests, in seconds; all 0 where there are none."""

    mean_s: float
    std_s: float
    median_s: float
    percentiles_s: dict[float, float]


@dataclass(frozen=True, kw_only=True)
class Metrics:
    """What became of the requests that came in a run's window.

    Attributes:
        duration_s: From the window's beginning to its end, or that of its last answer.
        met: Requests that kept all limits.
        met_alone: Those that kept one limit, by its name.
        outcomes: How many requests ended in which way.
        prompt_tokens, output_tokens: Of finished requests.
        late_s: The most that one was sent later than scheduled.
        short: Finished requests with fewer tokens than were asked for.
        errors: What was said most often of requests that failed.
    """

    submitted: int
    duration_s: float
    met: int
    met_alone: dict[str, int]
    outcomes: dict[Outcome, int]
    prompt_tokens: int
    output_tokens: int
    ttft: Times
    tpot: Times
    itl: Times
    e2el: Times
    late_s: float
    short: int
    errors: tuple[tuple[str, int], ...]

    @property
    def completed(self) -> int:
        """Requests that were answered to their end."""
        return self.outcomes.get("finished", 0)

    @property
    def attainment(self) -> float:
        """The part of all submitted requests that kept their limits; refusals are misses."""
        return self.met / self.submitted

    @property
    def request_throughput(self) -> float:
        """Finished requests a second."""
        return self.completed / self.duration_s

    @property
    def request_goodput(self) -> float:
        """Requests a second that kept their limits."""
        return self.met / self.duration_s

    @property
    def output_throughput(self) -> float:
        """Tokens a second of finished answers."""
        return self.output_tokens / self.duration_s

    @property
    def total_token_throughput(self) -> float:
        """The same with the tokens of prompts."""
        return (self.prompt_tokens + self.output_tokens) / self.duration_s


def metrics(
    records: Sequence[Record], slo: Slo, *, began_s: float, until_s: float = 0.0
) -> Metrics:
    """Return the figures of the requests of a window; there must be one.

    It went on until `until_s`, though no request may have come at its end.
    """
    done = [record for record in records if record.is_finished]
    errors = Counter(record.error for record in records if record.error)
    return Metrics(
        submitted=len(records),
        duration_s=max(until_s, *(record.ended_s for record in records)) - began_s,
        met=sum(slo.met_by(record) for record in records),
        met_alone={
            name: sum(one.met_by(record) for record in records) for name, one in slo.each().items()
        },
        outcomes=dict(Counter(record.outcome for record in records)),
        prompt_tokens=sum(record.prompt_tokens for record in done),
        output_tokens=sum(record.output_tokens for record in done),
        ttft=_times([record.ttft_s for record in done]),
        tpot=_times([record.tpot_s for record in done if record.output_tokens > 1]),
        itl=_times([gap_s for record in done for gap_s in record.itl_s]),
        e2el=_times([record.e2el_s for record in done]),
        late_s=max(record.late_s for record in records),
        short=sum(record.output_tokens < record.asked_tokens for record in done),
        errors=tuple(errors.most_common(3)),
    )


def _times(values_s: Sequence[float]) -> Times:
    found = np.array(values_s or [0.0])
    return Times(
        mean_s=float(np.mean(found)),
        std_s=float(np.std(found)),
        median_s=float(np.median(found)),
        percentiles_s={each: float(np.percentile(found, each)) for each in PERCENTILES},
    )


def attainment_at_scales(
    records: Sequence[Record], slo: Slo, scales: Sequence[float]
) -> list[float]:
    """Return which part of the requests would have kept limits so many times as long.

    Where limits went along with requests, the server may have done other things for other ones.
    """
    return [
        sum(slo.scaled(scale).met_by(record) for record in records) / len(records)
        for scale in scales
    ]
