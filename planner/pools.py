"""What instances of one layout give at a rate: the share of requests in time. Pure.

Joins predicted times to the queueing estimates. Prompts are prefilled one at a time, which is what
one gets once they fill a pass, and is on the safe side where they do not.
"""

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from planner.costs import Chunk, Costs
from planner.queueing import Array, Wait, poisson_mean, poisson_within, prefill_wait
from planner.workload import Workload

_GRID = 48


@dataclass(frozen=True, kw_only=True)
class Slo:
    """Limits of a request, and the share of requests that must keep all of them."""

    ttft_s: float
    tpot_s: float
    attainment: float

    @property
    def share_of_each(self) -> float:
        """What each pool must keep for both to keep `attainment`: each may miss half."""
        return 1 - (1 - self.attainment) / 2


class Pool(Protocol):
    """Instances of one layout."""

    def attainment(self, rate_per_s: float, instances: int) -> float:
        """Return the share of requests in time at a rate."""
        ...

    def goodput(self, instances: int) -> float:
        """Return the highest rate at which the pool's share is kept."""
        ...

    def too_slow(self) -> str | None:
        """Say why the limit cannot be kept at any rate; None where it can."""
        ...


class PrefillPool:
    """See Pool; the limit is TTFT."""

    def __init__(self, costs: Costs, workload: Workload, slo: Slo) -> None:
        prompts = [[Chunk(max(1, round(tokens)))] for tokens in workload.prompts]
        self._slo = slo
        self._gap_scv = workload.gap_scv
        self.first_s: Array = np.array([costs.prefill_s(prompt) for prompt in prompts])
        self.busy_s: Array = np.array([costs.prefill_busy_s(prompt) for prompt in prompts])

    def wait(self, rate_per_s: float, instances: int) -> Wait | None:
        """Return the wait for an instance; None where they cannot keep up."""
        return prefill_wait(rate_per_s, self.busy_s, instances, self._gap_scv)

    def attainment(self, rate_per_s: float, instances: int) -> float:
        """See Pool."""
        wait = self.wait(rate_per_s, instances)
        if wait is None:
            return 0.0
        return float(wait.within(self._slo.ttft_s - self.first_s).mean())

    def goodput(self, instances: int) -> float:
        """See Pool."""
        low, high = 0.0, instances / float(self.busy_s.mean())
        for _ in range(30):
            middle = (low + high) / 2
            kept = self.attainment(middle, instances) >= self._slo.share_of_each
            low, high = (middle, high) if kept else (low, middle)
        return low

    def too_slow(self) -> str | None:
        """See Pool."""
        kept = float((self.first_s <= self._slo.ttft_s).mean())
        if kept >= self._slo.share_of_each:
            return None
        slowest = float(np.quantile(self.first_s, self._slo.share_of_each, method="lower"))
        return (
            f"{1 - kept:.0%} of prompts take more than {self._slo.ttft_s * 1e3:,.0f} ms even "
            f"alone; 1 in {1 / (1 - self._slo.share_of_each):.0f} takes {slowest * 1e3:,.0f} ms"
        )


class DecodePool:
    """See Pool; the limit is TPOT.

    Args:
        kv_tokens: Of an instance, over all its dp ranks.
        max_batch: Sequences of an instance that one step may have.
    """

    def __init__(
        self, costs: Costs, workload: Workload, slo: Slo, *, kv_tokens: int, max_batch: int
    ) -> None:
        self._costs = costs
        self._slo = slo
        self._context = workload.decode_context
        self._steps = workload.decode_steps
        self._room = min(max_batch, int(kv_tokens / workload.decode_reserved))
        sizes = np.unique(np.geomspace(1, max(self._room, 1), _GRID).round().astype(int))
        self._sizes: Array = sizes.astype(np.float64)
        self._times_s: Array = np.array([self._step_s(int(size)) for size in sizes])
        self.most = self._most()

    def _step_s(self, batch: int) -> float:
        return self._costs.decode_step_s(batch, batch * self._context)

    def _most(self) -> int:
        """Return the largest batch that fits and whose step is within the limit."""
        low, high = 0, self._room
        while low < high:
            middle = (low + high + 1) // 2
            fast = self._step_s(middle) <= self._slo.tpot_s
            low, high = (middle, high) if fast else (low, middle - 1)
        return low

    def step_s(self, batch: float) -> float:
        """Return a step's time at a mean batch."""
        return float(np.interp(batch, self._sizes, self._times_s))

    def batch(self, rate_per_s: float, instances: int) -> float | None:
        """Return the mean batch of an instance; None where they cannot keep up (Little's law)."""
        needed = rate_per_s * self._steps / instances
        low, high = 0.0, float(self._room)
        if high / self.step_s(high) < needed:
            return None
        for _ in range(40):
            middle = (low + high) / 2
            low, high = (middle, high) if middle / self.step_s(middle) < needed else (low, middle)
        return high

    def attainment(self, rate_per_s: float, instances: int) -> float:
        """See Pool."""
        batch = self.batch(rate_per_s, instances)
        return 0.0 if batch is None else poisson_within(batch, self.most)

    def goodput(self, instances: int) -> float:
        """See Pool."""
        if not self.most:
            return 0.0
        if not self._steps:
            return float("inf")
        batch = poisson_mean(self.most, self._slo.share_of_each)
        return instances * batch / self.step_s(batch) / self._steps

    def too_slow(self) -> str | None:
        """See Pool."""
        if self.most:
            return None
        if not self._room:
            return f"KV has no room for one mean request of {self._context:,.0f} tokens"
        return (
            f"a step of one sequence takes {self._step_s(1) * 1e3:.1f} ms, more than "
            f"{self._slo.tpot_s * 1e3:g} ms"
        )
