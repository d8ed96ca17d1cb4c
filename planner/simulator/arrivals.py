"""When simulated requests come. Pure; owns how a trace is cut, repeated, and made faster."""

import random
from collections.abc import Sequence
from dataclasses import replace

from planner.traces import Request


def at_random(
    count: int, prompt_tokens: int, output_tokens: int, rate_per_s: float, seed: int
) -> list[Request]:
    """Return requests that are all alike and come at random (a Poisson process)."""
    rng = random.Random(seed)
    at_s, found = 0.0, []
    for _ in range(count):
        request = Request(at_s=at_s, prompt_tokens=prompt_tokens, output_tokens=output_tokens)
        found.append(request)
        at_s += rng.expovariate(rate_per_s)
    return found


def repeated(requests: Sequence[Request], count: int) -> list[Request]:
    """Return so many: the first ones, or all of them one time after the other."""
    span_s = requests[-1].at_s * len(requests) / max(1, len(requests) - 1)
    found = []
    for number in range(count):
        rounds, place = divmod(number, len(requests))
        request = requests[place]
        found.append(replace(request, at_s=request.at_s + rounds * span_s))
    return found


def rate_of(requests: Sequence[Request]) -> float:
    """Return the requests a second of a trace; 0 where all come at one time."""
    span_s = requests[-1].at_s
    return (len(requests) - 1) / span_s if span_s > 0 else 0.0


def at_rate(requests: Sequence[Request], rate_per_s: float) -> list[Request]:
    """Return the same requests at another rate, with gaps of the same shape."""
    factor = rate_of(requests) / rate_per_s
    return [replace(request, at_s=request.at_s * factor) for request in requests]
