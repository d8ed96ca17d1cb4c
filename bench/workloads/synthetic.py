"""Requests drawn at random: their lengths, and gamma-distributed gaps between them. Pure."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from bench.workloads.arrivals import Arrival, WorkloadError

Numbers: TypeAlias = NDArray[np.float64]
_AT_ONCE, _TRIES = 1024, 1024
_WAYS = "512, uniform:LOW:HIGH or lognormal:MEDIAN:SIGMA"


@dataclass(frozen=True, kw_only=True)
class Lengths:
    """How long prompts or answers are; `text` is what it was parsed from."""

    text: str
    draw: Callable[[np.random.Generator, int], Numbers]


def lengths(text: str) -> Lengths:
    """Parse lengths: 512, uniform:LOW:HIGH or lognormal:MEDIAN:SIGMA; raises ValueError."""
    kind, _, rest = text.partition(":")
    try:
        if not rest:
            return _fixed(text, int(kind))
        first, second = map(float, rest.split(":"))
    except ValueError as exc:
        raise ValueError(f"must be {_WAYS}") from exc
    match kind:
        case "uniform" | "lognormal" if first < 1:
            raise ValueError("no length can be below 1")
        case "uniform" if first <= second:
            return Lengths(text=text, draw=lambda rng, n: rng.uniform(first, second, n))
        case "lognormal" if second >= 0:
            middle = math.log(first)
            return Lengths(text=text, draw=lambda rng, n: rng.lognormal(middle, second, n))
    raise ValueError(f"must be {_WAYS}")


def _fixed(text: str, tokens: int) -> Lengths:
    if tokens < 1:
        raise ValueError("no length can be below 1")
    return Lengths(text=text, draw=lambda rng, n: np.full(n, float(tokens)))


def arrival_times(count: int, rate: float, burstiness: float, rng: np.random.Generator) -> Numbers:
    """Return the seconds at which requests come, as `vllm bench serve` draws them.

    Gaps are gamma-distributed with shape `burstiness`: 1 is a Poisson process, less comes in
    bursts, infinity is a steady pace. All are then stretched so that the last one comes at
    count / rate.
    """
    if math.isinf(burstiness):
        gaps = np.full(count, 1 / rate)
    else:
        gaps = rng.gamma(shape=burstiness, scale=1 / (rate * burstiness), size=count)
    times = np.cumsum(gaps)
    stretched: Numbers = times * (count / rate / times[-1])
    return stretched


def draw(
    count: int,
    rate: float,
    *,
    burstiness: float,
    prompts: Lengths,
    outputs: Lengths,
    seed: int,
    max_context: int | None,
) -> list[Arrival]:
    """Return so many requests; the same seed gives the same lengths at every rate.

    Raises WorkloadError where hardly any is as short as `max_context`.
    """
    length_rng, gap_rng = np.random.default_rng(seed).spawn(2)
    sizes: list[tuple[int, int]] = []
    for _ in range(_TRIES):
        # Of one size, whatever the count is: a longer run only adds to a shorter one.
        drawn = zip(
            _whole(prompts.draw(length_rng, _AT_ONCE)),
            _whole(outputs.draw(length_rng, _AT_ONCE)),
            strict=True,
        )
        sizes += [each for each in drawn if max_context is None or sum(each) <= max_context]
        if len(sizes) >= count:
            break
        if not sizes:
            raise WorkloadError(
                f"none of {_AT_ONCE} requests drawn has at most {max_context} tokens; lower"
                " --prompt-tokens or --output-tokens, or raise --max-context"
            )
    else:
        raise WorkloadError(f"of {_TRIES * _AT_ONCE} requests drawn only {len(sizes)} fit")
    times = arrival_times(count, rate, burstiness, gap_rng).tolist()
    return [
        Arrival(at_s=at_s - times[0], prompt_tokens=prompt, output_tokens=output)
        for at_s, (prompt, output) in zip(times, sizes, strict=False)
    ]


def _whole(values: Numbers) -> list[int]:
    found: list[int] = np.maximum(1, np.rint(values)).astype(np.int64).tolist()
    return found
