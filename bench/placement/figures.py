"""What a replay comes to: limits kept, times, cached tokens, and how alike tenants fared."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, median, quantiles

from bench.placement.pools import Call


@dataclass(frozen=True, kw_only=True)
class Figures:
    """One policy on one trace. Times are in seconds, shares in parts of 1."""

    attainment: float
    ttft_p50_s: float
    ttft_p99_s: float
    tpot_mean_s: float
    hits: float
    fairness: float


def figures(calls: Sequence[Call]) -> Figures:
    """Return what became of requests that have all ended."""
    ttfts = [call.ttft_s for call in calls]
    of_tenants = defaultdict(list)
    for call in calls:
        of_tenants[call.tenant].append(float(call.attains))
    return Figures(
        attainment=fmean(call.attains for call in calls),
        ttft_p50_s=median(ttfts),
        ttft_p99_s=quantiles(ttfts, n=100)[98],
        tpot_mean_s=fmean(c.tpot_s for c in calls if c.arrival.output_tokens > 1),
        hits=sum(c.cached_tokens for c in calls) / sum(c.need.prompt_tokens for c in calls),
        fairness=jain([fmean(each) for each in of_tenants.values()]),
    )


def jain(shares: Sequence[float]) -> float:
    """Return Jain's index: 1 where all have as much, and 1 / n where one has everything."""
    squares = sum(share * share for share in shares)
    return sum(shares) ** 2 / (len(shares) * squares) if squares else 1.0
