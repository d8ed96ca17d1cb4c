"""How long requests wait for prefill, and how many sequences decode together. Pure estimates.

As DistServe (arXiv 2401.09670, section 3) does, each pool is a queue of its own; it takes M/D/1 for
prefill. Here prompts differ and arrivals may come in bursts, so prefill is G/G/k: the mean wait is
Allen and Cunneen's, with Sakasegawa's estimate for k instances (for one instance and random
arrivals both together are exactly M/G/1), and waits are exponential beyond a chance of none. Decode
never queues while its KV fits: sequences under way are M/G/infinity, so their number is Poisson.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Wait:
    """The chance that a request waits at all, and the mean wait of those that do."""

    chance: float
    mean_s: float

    def within(self, limits_s: Array) -> Array:
        """Return the chance that a wait is within each limit; none is within one below 0."""
        if self.mean_s <= 0:
            return np.where(limits_s >= 0, 1.0, 0.0)
        over = self.chance * np.exp(-np.maximum(limits_s, 0.0) / self.mean_s)
        return np.where(limits_s >= 0, 1 - over, 0.0)


def prefill_wait(rate_per_s: float, busy_s: Array, servers: int, gap_scv: float) -> Wait | None:
    """Return the wait for one of `servers` instances; None where they cannot keep up.

    Args:
        busy_s: How long equally frequent requests keep an instance.
        gap_scv: Squared coefficient of variation of the time between arrivals.
    """
    mean_s = float(busy_s.mean())
    load = rate_per_s * mean_s / servers
    if load >= 1:
        return None
    if load <= 0:
        return Wait(chance=0.0, mean_s=0.0)
    busy_scv = float(busy_s.var()) / mean_s**2
    chance = load ** (math.sqrt(2 * (servers + 1)) - 1)
    variation = (gap_scv + busy_scv) / 2
    # The mean over all requests is chance * mean_s: this is of those that wait.
    return Wait(chance=chance, mean_s=mean_s / servers / (1 - load) * variation)


def poisson_within(mean: float, most: int) -> float:
    """Return the chance that a Poisson number of this mean is `most` at most."""
    if most < 0:
        return 0.0
    if mean <= 0:
        return 1.0
    counts = np.arange(most + 1)
    logs = counts * math.log(mean) - mean
    logs[1:] -= np.cumsum(np.log(counts[1:]))
    return min(1.0, float(np.exp(logs).sum()))


def poisson_mean(most: int, share: float) -> float:
    """Return the largest mean at which so large a share of numbers is `most` at most."""
    low, high = 0.0, float(max(most, 0)) + 1
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if poisson_within(middle, most) >= share else (low, middle)
    return low
