"""What a simulation comes to: times, limits kept, goodput. Pure; defined as `bench.goodput` has it.

Percentiles are over requests that were answered to their end, TPOT's over those of two tokens and
more. Attainment is over all that were submitted: a refused one has missed its limits.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from planner.pools import Slo
from planner.simulator.calls import Call

_PERCENTILES = (50, 90, 99)


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """Figures of one rate.

    Attributes:
        refused: How many were not served, by reason.
        moved: Those that went on elsewhere after a loss.
        duration_s: From the first arrival to the last end.
        goodput: Requests a second that kept both limits.
        ttft_s, tpot_s: By percentile; empty where there is none.
    """

    rate_per_s: float
    submitted: int
    finished: int
    refused: dict[str, int]
    moved: int
    duration_s: float
    attainment: float
    goodput: float
    output_tokens_per_s: float
    ttft_s: dict[int, float]
    tpot_s: dict[int, float]


def outcome(calls: Sequence[Call], slo: Slo, rate_per_s: float) -> Outcome:
    """Return the figures of requests that are all over; there must be one."""
    done = [call for call in calls if call.is_finished]
    began_s = calls[0].at_s
    duration_s = max([call.ended_at for call in done], default=began_s) - began_s
    met = sum(call.keeps(slo.ttft_s, slo.tpot_s) for call in calls)
    tokens = sum(call.output_tokens for call in done)
    return Outcome(
        rate_per_s=rate_per_s,
        submitted=len(calls),
        finished=len(done),
        refused=dict(Counter(call.refused for call in calls if call.refused)),
        moved=sum(call.moves > 0 for call in calls),
        duration_s=duration_s,
        attainment=met / len(calls),
        goodput=met / duration_s if duration_s else 0.0,
        output_tokens_per_s=tokens / duration_s if duration_s else 0.0,
        ttft_s=_percentiles([call.ttft_s for call in done]),
        tpot_s=_percentiles([call.tpot_s for call in done if call.output_tokens > 1]),
    )


def _percentiles(values_s: Sequence[float]) -> dict[int, float]:
    if not values_s:
        return {}
    return {each: float(np.percentile(values_s, each)) for each in _PERCENTILES}


def highest_rate(
    attains: Callable[[float], bool], *, start: float, precision: float = 0.03
) -> float | None:
    """Return the highest rate that attains enough, None where not even a tiny one does.

    It is looked for between a rate that does and one that does not, which are found by doubling or
    halving `start`, and is below the true one by `precision` of it at most.
    """
    low = start
    while not attains(low):
        low /= 2
        if low < start / 1024:
            return None
    high = 2 * low
    while low >= start and attains(high):
        low, high = high, 2 * high
    while high > low * (1 + precision):
        middle = (low * high) ** 0.5
        low, high = (middle, high) if attains(middle) else (low, middle)
    return low
