"""What is asked of the pools: how often, how evenly, how long. Pure.

A trace of any length becomes so many equally frequent requests of mean sizes, ordered by prompt.
"""

import itertools
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from planner.errors import TraceError
from planner.traces import Request

_STRATA = 128


@dataclass(frozen=True, kw_only=True)
class Workload:
    """Requests that stand for all.

    Attributes:
        prompts: Tokens of prompts, shortest first, each as frequent as any other.
        gap_scv: Squared coefficient of variation of the time between arrivals; 1 is Poisson.
        output_tokens: Mean of a request.
        decode_context: Mean tokens cached for a sequence over the steps of decode.
        decode_reserved: Mean tokens that a sequence has room for, over the same steps.
        longest: Prompt and output of the longest request.
    """

    rate_per_s: float
    prompts: tuple[float, ...]
    gap_scv: float
    output_tokens: float
    decode_context: float
    decode_reserved: float
    longest: int
    longest_prompt: int
    requests: int = 0

    @property
    def prompt_tokens(self) -> float:
        """Mean of a request."""
        return statistics.fmean(self.prompts)

    @property
    def decode_steps(self) -> float:
        """Mean of a request: its first token is prefill's."""
        return max(0.0, self.output_tokens - 1)

    def prompt_at(self, share: float) -> float:
        """Return the prompt that so large a share of prompts does not exceed."""
        return self.prompts[min(len(self.prompts) - 1, int(share * len(self.prompts)))]


def steady(
    prompt_tokens: int, output_tokens: int, rate_per_s: float, gap_scv: float = 1.0
) -> Workload:
    """Return requests that are all alike and come at random."""
    return Workload(
        rate_per_s=rate_per_s,
        prompts=(float(prompt_tokens),),
        gap_scv=gap_scv,
        output_tokens=output_tokens,
        decode_context=prompt_tokens + output_tokens / 2,
        decode_reserved=prompt_tokens + output_tokens,
        longest=prompt_tokens + output_tokens,
        longest_prompt=prompt_tokens,
    )


def of_trace(
    requests: Sequence[Request], rate_per_s: float | None = None, gap_scv: float | None = None
) -> Workload:
    """Return what a trace asks for, at its own rate and burstiness unless others are given.

    Raises TraceError where it has no rate of its own.
    """
    span_s = requests[-1].at_s
    if rate_per_s is None and span_s <= 0:
        raise TraceError(
            f"the trace's {len(requests)} requests come at one time, which is no rate; give --rate"
        )
    prompts = sorted(request.prompt_tokens for request in requests)
    outputs = sum(request.output_tokens for request in requests)
    prompt_steps = sum(request.output_tokens * request.prompt_tokens for request in requests)
    output_steps = sum(request.output_tokens**2 for request in requests)
    return Workload(
        rate_per_s=rate_per_s or (len(requests) - 1) / span_s,
        prompts=_strata(prompts),
        gap_scv=_gap_scv(requests) if gap_scv is None else gap_scv,
        output_tokens=outputs / len(requests),
        decode_context=(prompt_steps + output_steps / 2) / outputs,
        decode_reserved=(prompt_steps + output_steps) / outputs,
        longest=max(request.prompt_tokens + request.output_tokens for request in requests),
        longest_prompt=prompts[-1],
        requests=len(requests),
    )


def _strata(ordered: Sequence[int]) -> tuple[float, ...]:
    """Return the means of equal parts, which keep the mean of all but for rounding."""
    parts = min(_STRATA, len(ordered))
    edges = [len(ordered) * part // parts for part in range(parts + 1)]
    return tuple(statistics.fmean(ordered[start:end]) for start, end in itertools.pairwise(edges))


def _gap_scv(requests: Sequence[Request]) -> float:
    times = [request.at_s for request in requests]
    gaps = [later - earlier for earlier, later in itertools.pairwise(times)]
    mean = statistics.fmean(gaps) if gaps else 0.0
    return statistics.pvariance(gaps) / mean**2 if mean else 1.0
