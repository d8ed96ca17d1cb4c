"""Workloads as a benchmark runs them: requests at whatever rate is wanted. Pure.

Owns how a rate, a length of time and a context's size shape what a trace or a generator has.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

from bench.workloads import arrivals, synthetic
from bench.workloads.arrivals import Arrival, WorkloadError
from bench.workloads.synthetic import Lengths


class Workload(Protocol):
    """Where requests come from."""

    def at(self, rate: float | None, total_s: float, max_context: int | None) -> list[Arrival]:
        """Return the requests of `total_s` seconds at a rate; None is the workload's own.

        None is longer than `max_context`. Raises WorkloadError where there are none or too few.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class Replayed:
    """A trace's requests. At its own rate times are stretched by `time_scale`."""

    requests: Sequence[Arrival]
    time_scale: float
    length_scale: float

    def at(self, rate: float | None, total_s: float, max_context: int | None) -> list[Arrival]:
        """Return the first requests that fit, as `Workload.at`."""
        scaled = [arrivals.scaled(each, self.length_scale) for each in self.requests]
        kept = arrivals.within_context(scaled, max_context)
        if rate is None:
            return arrivals.slowed(kept, self.time_scale)
        return arrivals.at_rate(kept, rate, total_s)


@dataclass(frozen=True, kw_only=True)
class Repaced:
    """A trace's requests at random times (Poisson), the same at every call.

    For runs that are short beside a trace's bursts: of its own times they would see one or none.
    """

    requests: Sequence[Arrival]
    length_scale: float
    seed: int

    def at(self, rate: float | None, total_s: float, max_context: int | None) -> list[Arrival]:
        """Return the first requests that fit, as `Workload.at`."""
        if rate is None:
            raise WorkloadError("requests at random times have no rate of their own; give one")
        scaled = [arrivals.scaled(each, self.length_scale) for each in self.requests]
        kept = arrivals.within_context(scaled, max_context)
        rng = np.random.default_rng(self.seed)
        times = synthetic.arrival_times(len(kept), rate, 1.0, rng).tolist()
        paced = [replace(each, at_s=at_s) for each, at_s in zip(kept, times, strict=True)]
        return arrivals.at_rate(arrivals.within_context(paced, None), rate, total_s)


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """Requests at random. Those that are too long are drawn again, so that the rate is kept."""

    prompts: Lengths
    outputs: Lengths
    burstiness: float
    seed: int

    def at(self, rate: float | None, total_s: float, max_context: int | None) -> list[Arrival]:
        """Return requests at a rate, as `Workload.at`."""
        if rate is None:
            raise WorkloadError("requests at random have no rate of their own; give one")
        return synthetic.draw(
            max(1, round(rate * total_s)),
            rate,
            burstiness=self.burstiness,
            prompts=self.prompts,
            outputs=self.outputs,
            seed=self.seed,
            max_context=max_context,
        )
